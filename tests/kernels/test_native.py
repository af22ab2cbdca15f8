"""vapt_fast._C as nvcc compiled it: what it links, what its kernels do, and why it may not run."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from native import MISSING, instructions, stacks

from vapt_fast.info import report
from vapt_fast.ops import device as devices

# ---- the compiled module, where there is one


@pytest.fixture(scope="module")
def native():
    missing = devices.native_missing_reasons()
    if missing:
        pytest.skip(missing[0])
    return devices.native()


@pytest.fixture(scope="module")
def stack_of(native):
    """See native.stacks."""
    if MISSING:
        pytest.skip(f"there is no {', '.join(MISSING)}")
    return stacks(native)


def test_it_links_nothing_of_pytorch_and_no_cuda(native):
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {native.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
libraries = open("/proc/self/maps").read()
assert "torch" not in sys.modules and "torch" not in libraries
assert "libcuda" not in libraries, libraries
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"LD_LIBRARY_PATH": ""})


def test_the_runtime_says_whether_a_device_is_supported(native):
    assert native.runtime_version >= 12000
    why = native.unsupported_because(0)
    assert why == "" if torch.cuda.is_available() else why.startswith("cudaError")


def test_no_kernel_spills(native, stack_of):
    assert {"attention" in kernel for kernel in stack_of} == {True, False}
    for kernel, architectures in stack_of.items():
        assert architectures == {"sm_90a": 0}, f"{kernel} spills"


def test_machine_code(native, stack_of):
    """Tensor cores and loads of 16 bytes; no atomics and no local memory."""
    kernels = instructions(native, "sm_90a")
    assert kernels.keys() == stack_of.keys()
    for kernel, counts in kernels.items():
        if "cutlass" in kernel:
            assert any(name.startswith("HGMMA") for name in counts), kernel
            assert not any(name.startswith(("LDL", "STL", "ATOM", "RED")) for name in counts), kernel
            continue

        def some(*names, also="", counts=counts):
            return any(name.startswith(names) and also in name for name in counts)

        # Where registers are short the compiler waits for each product, which it only says in passing.
        waits = sum(count for name, count in counts.items() if name.startswith("WARPGROUP.DEPBAR"))
        products = sum(count for name, count in counts.items() if name.startswith("HGMMA"))
        assert products > 2 * waits, kernel
        assert some("LDG", "LDGSTS", also=".128"), kernel
        assert not some("ATOM", "RED.", "REDG", "REDS"), f"{kernel} adds in no fixed order"
        assert not some("LDL", "STL"), f"{kernel} spills"


# ---- why it can't run


@pytest.fixture
def machine(monkeypatch):
    """A machine with everything, of which parts can be taken away."""

    def forget():
        for function in (devices._cuda_unavailable_reasons, devices._device_unsupported_reasons):
            function.cache_clear()

    def change(why="", gpu=True, capability=(9, 0)):
        fake = SimpleNamespace(runtime_version=13000)
        fake.unsupported_because = lambda device: why
        monkeypatch.setitem(sys.modules, "vapt_fast._C", fake)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        forget()

    change()
    yield change
    forget()


@pytest.mark.parametrize("gpu", [True, False])
def test_it_needs_a_gpu(machine, gpu):
    machine(gpu=gpu)
    assert devices.unavailable_reasons("cuda") == ([] if gpu else ["its kernels need a CUDA GPU"])


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)], ids=str)
def test_it_needs_hopper(machine, capability):
    machine(capability=capability)
    found = ".".join(map(str, capability))
    reason = f"cuda:0 has compute capability {found}, its kernels need 9.0"
    assert devices.unavailable_reasons("cuda") == [reason]
    assert devices.unsupported_reasons("cuda", torch.device("cuda", 0)) == [reason]


@pytest.mark.parametrize("device", [torch.device("cuda"), torch.device("cuda", 0)], ids=str)
def test_what_the_runtime_says_is_the_reason(machine, device):
    why = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
    machine(why)
    (reason,) = devices.unsupported_reasons("cuda", device)
    assert reason == f"its kernels, compiled by CUDA 13.0, don't run on cuda:0: {why}; update the driver"
    assert devices.unavailable_reasons("cuda") == [reason]


@pytest.mark.parametrize("note", [None, "there is no nvcc; install one"])
def test_not_compiled(machine, monkeypatch, tmp_path, note):
    monkeypatch.setitem(sys.modules, "vapt_fast._C", None)
    monkeypatch.setattr(devices, "NOTE", tmp_path / "_C_missing.txt")
    if note:
        devices.NOTE.write_text(f"{note}\n")
    (reason,) = devices.unavailable_reasons("cuda")
    why = note or "pip install, which builds them, was not run"
    assert f"without its compiled kernels: {why}; then install it again with pip" in reason
    assert reason in report()


def test_not_loadable(machine, monkeypatch):
    def fail(name):
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.99' not found")

    monkeypatch.delitem(sys.modules, "vapt_fast._C")
    monkeypatch.setattr(devices.importlib, "import_module", fail)
    (reason,) = devices.unavailable_reasons("cuda")
    assert reason.startswith("vapt_fast._C can't be imported: libstdc++.so.6")


def test_the_report_names_what_was_compiled(machine):
    assert "compiled kernels: by CUDA 13.0 for sm_90a" in report()
