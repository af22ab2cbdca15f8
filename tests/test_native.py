"""vapt_fast._C as nvcc compiled it: what it links, what its kernels do, and why it may not run."""

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


def test_versions_are_numbers_also_without_a_driver(native):
    assert native.runtime_version >= 12000
    assert _native.driver_version() >= 0


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

    def change(architectures="80-real,90a-real,100-virtual", driver=13000, capability=(9, 0), gpu=True):
        fake = SimpleNamespace(architectures=architectures, runtime_version=13000)
        monkeypatch.setitem(sys.modules, "vapt_fast._C", fake)
        monkeypatch.setattr(_native, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    change()
    return change


def test_nothing_is_in_the_way(machine):
    assert _dispatch.unavailable_because("cuda") == []
    machine(driver=13020)
    assert _dispatch.unavailable_because("cuda") == []


def test_without_a_gpu(machine):
    machine(gpu=False, driver=0)
    assert _dispatch.unavailable_because("cuda") == [
        "there is no NVIDIA driver",
        "its kernels need a CUDA GPU",
    ]


def test_the_driver_is_too_old_and_the_gpu_unknown(machine):
    machine(driver=12080, capability=(12, 0), architectures="80-real,90a-real")
    too_old, unknown = _dispatch.unavailable_because("cuda")
    assert too_old == "the NVIDIA driver serves CUDA 12.8, its kernels need 13.0"
    assert (
        "compiled for 80-real, 90a-real, not for compute capability 12.0; set VAPT_FAST_CUDA_ARCHS" in unknown
    )


@pytest.mark.parametrize(
    ("architectures", "runs", "runs_not"),
    [
        ("80-real", [(8, 0), (8, 9)], [(7, 5), (8, 7), (9, 0)]),
        ("80", [(8, 7)], []),
        ("87-real", [(8, 7)], [(8, 6), (8, 9)]),
        ("80-virtual", [(8, 0), (8, 7), (9, 0)], [(7, 5)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("90a", [(9, 0)], [(10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("100-virtual", [(10, 0), (12, 0)], [(9, 0)]),
        ("80", [(8, 0), (12, 1)], [(7, 5)]),
        ("80-real,120-real,120-virtual", [(8, 6), (12, 0), (13, 0)], [(9, 0), (10, 0)]),
    ],
)
def test_which_gpus_code_runs_on(machine, architectures, runs, runs_not):
    machine(architectures)
    assert [_native.device_lacks(capability) for capability in runs] == [[]] * len(runs)
    assert all(_native.device_lacks(capability) for capability in runs_not)


def test_ptx_needs_a_driver_as_new_as_the_compiler(machine):
    machine("80", driver=13000, capability=(9, 0))
    assert _dispatch.unavailable_because("cuda") == []
    machine("80", driver=12080, capability=(8, 6))  # machine code
    assert "PTX" not in " ".join(_dispatch.unavailable_because("cuda"))
    machine("80", driver=12080, capability=(9, 0))
    *_, reason = _dispatch.unavailable_because("cuda")
    assert "no machine code for compute capability 9.0, only PTX, which takes a driver of CUDA 13" in reason
    assert "this one serves 12.8; set VAPT_FAST_CUDA_ARCHS" in reason


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
