"""What this machine can run: the only file that asks which GPU there is, and what is installed for it.

A new sort of implementation (of an AMD or Intel GPU, of a CPU) is a name in ``backend.BACKENDS`` and a
function here that says what it lacks. The answers hold for a whole process and are asked for once.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch

__all__ = [
    "capability",
    "compiled_by",
    "fp8_unsupported_reasons",
    "interpreting",
    "native",
    "native_missing_reasons",
    "onednn_is_faster",
    "triton_missing_reasons",
    "unavailable_reasons",
    "unsupported_reasons",
]

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)
NATIVE_CAPABILITY = (9, 0)  # vapt_fast._C is compiled for sm_90a alone
MINIMUM_FP8_CAPABILITY = (8, 9)
ONEDNN_SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm)"
    " -> Tensor Y"
)
NOTE = Path(__file__).parent.parent / "_C_missing.txt"  # setup.py leaves it where there is no _C
INSTALL_AGAIN = "install it again with pip install --force-reinstall --no-deps --no-cache-dir"


# torch.compile need not trace what stays true for a whole process.
@torch.compiler.assume_constant_result
def unavailable_reasons(name: str) -> list[str]:
    """Every reason why backend ``name`` can't run on this machine; empty if it can."""
    if name == "triton":
        return _triton_unavailable_reasons(interpreting())
    if name == "cuda":
        return _cuda_unavailable_reasons()
    return []


@torch.compiler.assume_constant_result
def unsupported_reasons(name: str, device: torch.device) -> list[str]:
    """Every reason why ``device`` can't run the kernels of backend ``name``; empty if it can."""
    if device.type == "cpu" and name == "triton" and interpreting():
        return []
    if device.type != "cuda":
        interpreted = ", and on CPU tensors with TRITON_INTERPRET=1" if name == "triton" else ""
        return [f"its kernels run on CUDA tensors{interpreted}; got {device}"]
    return _device_unsupported_reasons(
        name, torch.cuda.current_device() if device.index is None else device.index
    )


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def fp8_unsupported_reasons(device: torch.device) -> list[str]:
    """Every reason why ``device`` has no products in FP8; empty for a CPU, which mimics them."""
    if device.type in ("cpu", "meta"):
        return []
    if device.type != "cuda" or torch.version.cuda is None:
        return [f"they need a CUDA GPU, got {device}"]
    found = torch.cuda.get_device_capability(device)
    if found >= MINIMUM_FP8_CAPABILITY:
        return []
    given, needed = (".".join(map(str, c)) for c in (found, MINIMUM_FP8_CAPABILITY))
    return [f"{device} has compute capability {given}, they need {needed}"]


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, which runs kernels on CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _device_unsupported_reasons(name: str, index: int) -> list[str]:
    found = torch.cuda.get_device_capability(index)
    needed = NATIVE_CAPABILITY if name == "cuda" else MINIMUM_CAPABILITY
    fits = found == needed if name == "cuda" else found >= needed
    if not fits:
        given, wanted = (".".join(map(str, c)) for c in (found, needed))
        return [f"cuda:{index} has compute capability {given}, its kernels need {wanted}"]
    return _native_unsupported_reasons(index) if name == "cuda" else []


# ---- CPUs


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN, called directly, was measured to multiply matrices in float32 faster than MKL.

    So it is on AMD's processors with AVX-512: 450 billion operations a second against 210.
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
        and _onednn_schema() == ONEDNN_SCHEMA
    )


def _processor() -> str:
    """What the system says of the processor, its maker among it."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()


def _onednn_schema() -> str | None:
    """The arguments of PyTorch's function for a product by oneDNN, which it may change; None: it is gone."""
    try:
        return str(torch.ops.mkldnn._linear_pointwise.default._schema)
    except AttributeError:
        return None


# ---- Triton


def triton_missing_reasons() -> list[str]:
    """Why this installation has no Triton that its kernels can be compiled with; empty if it has."""
    try:
        import triton
    except ImportError:
        return ["triton is not installed"]
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MINIMUM_TRITON:
        needed = ".".join(map(str, MINIMUM_TRITON))
        return [f"triton {triton.__version__} is too old, its kernels need {needed}"]
    return []


@functools.cache
def _triton_unavailable_reasons(interpreted: bool) -> list[str]:
    reasons = triton_missing_reasons()
    if not reasons and not interpreted:
        import triton

        reasons += _missing_tools(triton.knobs.cache.dir)
    if not interpreted:
        if torch.version.cuda is None or not torch.cuda.is_available():
            reasons.append("its kernels need a CUDA GPU (or TRITON_INTERPRET=1, to run them slowly on CPU)")
        else:
            reasons += _device_unsupported_reasons("triton", torch.cuda.current_device())
    return reasons


def _missing_tools(cache_dir: str) -> list[str]:
    """What Triton needs beside itself to launch a kernel: a C compiler and a folder that it may write to."""
    reasons = []
    if not os.environ.get("CC") and not any(shutil.which(name) for name in ("gcc", "clang")):
        reasons.append("Triton finds no C compiler: install gcc or clang, or set CC")
    folder = Path(cache_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        reasons.append(f"Triton can't write to its cache {folder}: set TRITON_CACHE_DIR")
    return reasons


# ---- vapt_fast._C, the compiled CUDA kernels


@functools.cache
def _cuda_unavailable_reasons() -> list[str]:
    missing = native_missing_reasons()
    if torch.version.cuda is None or not torch.cuda.is_available():
        return [*missing, "its kernels need a CUDA GPU"]
    return missing or _device_unsupported_reasons("cuda", torch.cuda.current_device())


def native() -> ModuleType:
    """vapt_fast._C.

    Raises:
        ImportError: this installation has none, see ``native_missing_reasons``.
    """
    module = sys.modules.get("vapt_fast._C")  # importing it again takes longer, and each launch asks for it
    return importlib.import_module("vapt_fast._C") if module is None else module


def native_missing_reasons() -> list[str]:
    """Why this installation has no vapt_fast._C; empty if it has."""
    try:
        native()
    except ModuleNotFoundError:
        why = NOTE.read_text().strip() if NOTE.exists() else "pip install, which builds them, was not run"
        return [f"vapt_fast was installed without its compiled kernels: {why}; then {INSTALL_AGAIN}"]
    except ImportError as error:
        return [f"vapt_fast._C can't be imported: {error}"]
    return []


def _native_unsupported_reasons(index: int) -> list[str]:
    """Why CUDA device ``index`` can't run the compiled kernels, by the CUDA runtime; empty if it can.

    The driver may be too old for them.
    """
    with torch.cuda.device(index):  # which it makes current
        why = native().unsupported_because(index)
    if not why:
        return []
    return [
        f"its kernels, compiled by CUDA {compiled_by()}, don't run on cuda:{index}: {why}; update the driver"
    ]


def compiled_by() -> str:
    """The version of CUDA, as 13.0."""
    version = native().runtime_version
    return f"{version // 1000}.{version % 1000 // 10}"
