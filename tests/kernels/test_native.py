"""vapt_fast._C as nvcc compiled it: what it links, what its kernels do, and why it may not run."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from native import MISSING, instructions, stacks

from vapt_fast.backends import _dispatch, _native
from vapt_fast.info import report

# ---- the compiled module, where there is one


@pytest.fixture(scope="module")
def native():
    if _native.missing_because():
        pytest.skip(_native.missing_because()[0])
    return _native.native()


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
    """On no architecture that this module was compiled for, by default all that are supported."""
    compiled = [name for name in native.architectures.split(",") if not name.endswith("-virtual")]
    assert bool(stack_of) == bool(compiled)
    for kernel, architectures in stack_of.items():
        assert len(architectures) == len(compiled), kernel
        assert not any(architectures.values()), f"{kernel} spills: {architectures}"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_machine_code(native, stack_of, architecture):
    """Tensor cores and loads of 16 bytes where they belong; atomics and local memory nowhere."""
    if not any(architecture in architectures for architectures in stack_of.values()):
        pytest.skip(f"not compiled for {architecture}")
    for kernel, counts in instructions(native, architecture).items():
        function = kernel.split()[1].split("<")[0]
        if architecture == "sm_80" and function in ("normalise_and_pool", "products_and_gradients"):
            continue  # clusters begin with sm_90: they are empty

        def some(*names, also="", counts=counts):
            return any(name.startswith(names) and also in name for name in counts)

        assert some("HMMA", "HGMMA", "UTCHMMA") == (function not in ("normalise", "add_chunks")), kernel
        assert some("LDG", "LDGSTS", also=".128") == (function != "add_chunks"), kernel
        assert not some("ATOM", "RED.", "REDG", "REDS"), f"{kernel} adds in no fixed order"
        assert not some("LDL", "STL"), f"{kernel} spills"


# ---- why it can't run


@pytest.fixture
def machine(monkeypatch):
    """A machine with everything, of which parts can be taken away."""

    def change(why="", gpu=True):
        fake = SimpleNamespace(architectures="80-real,90a-real,100-virtual", runtime_version=13000)
        fake.unsupported_because = lambda device: why
        monkeypatch.setitem(sys.modules, "vapt_fast._C", fake)
        _native.device_lacks.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    change()
    yield change
    _native.device_lacks.cache_clear()


def test_nothing_is_in_the_way(machine):
    assert _dispatch.unavailable_because("cuda") == []


def test_without_a_gpu(machine):
    machine(gpu=False)
    assert _dispatch.unavailable_because("cuda") == ["its kernels need a CUDA GPU"]


@pytest.mark.parametrize("device", [torch.device("cuda"), torch.device("cuda", 0)], ids=str)
def test_what_the_runtime_says_is_the_reason(machine, device):
    why = "cudaErrorNoKernelImageForDevice: no kernel image is available for execution on the device"
    machine(why)
    (reason,) = _dispatch.device_lacks("cuda", device)
    assert reason.startswith(
        "its kernels, compiled by CUDA 13.0 for 80-real, 90a-real, 100-virtual, don't run on cuda:0: " + why
    )
    assert "set VAPT_FAST_CUDA_ARCHS and install it again" in reason
    assert _dispatch.unavailable_because("cuda") == [reason]


def test_not_compiled(machine, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vapt_fast._C", None)
    note = tmp_path / "_C_missing.txt"
    monkeypatch.setattr(_native, "NOTE", note)
    (reason,) = _dispatch.unavailable_because("cuda")
    assert "pip install, which builds them, was not run; then install it again with pip" in reason
    note.write_text("there is no nvcc; install one\n")
    (reason,) = _dispatch.unavailable_because("cuda")
    assert "without its compiled kernels: there is no nvcc; install one; then install it again" in reason
    assert reason in report()


def test_not_loadable(machine, monkeypatch):
    def fail(name):
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.99' not found")

    monkeypatch.delitem(sys.modules, "vapt_fast._C")
    monkeypatch.setattr(_native.importlib, "import_module", fail)
    (reason,) = _dispatch.unavailable_because("cuda")
    assert reason.startswith("vapt_fast._C can't be imported: libstdc++.so.6")


def test_the_report_names_what_was_compiled(machine):
    assert "compiled kernels: by CUDA 13.0 for 80-real, 90a-real, 100-virtual" in report()
