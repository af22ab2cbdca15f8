"""Which backend runs: its names, how one is chosen, and why one can't run."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

from . import _native

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "IMPLEMENTATIONS",
    "BackendUnavailableError",
    "capability",
    "check_backend",
    "device_lacks",
    "resolve",
    "unavailable_because",
    "use_backend",
    "warn_once",
]

BACKENDS = {
    "auto": "the fastest that was measured, op by op; else torch",
    "reference": "the paper, literally, in plain PyTorch: the oracle",
    "torch": "the exact rewrites in ordinary PyTorch operations, on every device",
    "triton": "Triton kernels",
    "cuda": "CUDA C++ kernels",
}
ENVIRONMENT_VARIABLE = "VAPT_FAST_BACKEND"

# Op -> its implementations. Under "triton" or "cuda" an op without such kernels runs as under "torch"; what
# runs under "auto" is in _measurements.
# "cudnn" and "flash" are PyTorch's attention by that library alone, names that only this op knows.
IMPLEMENTATIONS = {
    "add_norm": ("torch", "triton"),
    "prompt_pool": ("torch", "triton", "cuda"),
    "prompt_projector": ("torch", "triton"),
    "prompt_attention": ("torch", "triton", "cudnn", "flash"),
    "mlp": ("torch", "triton"),
    "absorbed_attention": ("torch", "triton"),
}

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)

_chosen: ContextVar[str | None] = ContextVar("vapt_fast_backend", default=None)


class _ChosenByThread(threading.local):
    """The same for torch.compile, which guards on it; PyTorch 2.11 can't trace a ContextVar."""

    name: str | None = None


_chosen_when_compiling = _ChosenByThread()


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and can't run; the message gives every reason."""


def unavailable_because(name: str) -> list[str]:
    """Every reason why backend ``name`` can't run on this machine; empty if it can."""
    if name == "triton":
        return _triton_unavailable_because()
    if name == "cuda":
        return _cuda_unavailable_because()
    return []


@torch.compiler.assume_constant_result  # torch.compile need not trace what stays true for a whole process
def _triton_unavailable_because() -> list[str]:
    reasons = []
    try:
        import triton
    except ImportError:
        reasons.append("triton is not installed")
    else:
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MINIMUM_TRITON:
            needed = ".".join(map(str, MINIMUM_TRITON))
            reasons.append(f"triton {triton.__version__} is too old, its kernels need {needed}")
        elif not interpreting():
            compiler = os.environ.get("CC")
            reasons += _tools_missing(compiler, os.environ.get("PATH"), triton.knobs.cache.dir)
    if not interpreting():
        if torch.version.cuda is None or not torch.cuda.is_available():
            reasons.append("its kernels need a CUDA GPU (or TRITON_INTERPRET=1, to run them slowly on CPU)")
        else:
            reasons += device_lacks("triton", torch.device("cuda", torch.cuda.current_device()))
    return reasons


@cache  # this is asked for each op of each block
def _tools_missing(compiler: str | None, path: str | None, cache_dir: str) -> list[str]:
    """What Triton needs beside itself to launch a kernel: a C compiler and a folder that it may write to."""
    reasons = []
    if not compiler and not any(shutil.which(name, path=path) for name in ("gcc", "clang")):
        reasons.append("Triton finds no C compiler: install gcc or clang, or set CC")
    folder = Path(cache_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        reasons.append(f"Triton can't write to its cache {folder}: set TRITON_CACHE_DIR")
    return reasons


@torch.compiler.assume_constant_result
def _cuda_unavailable_because() -> list[str]:
    missing = _native.missing_because()
    if torch.version.cuda is None or not torch.cuda.is_available():
        return [*missing, "its kernels need a CUDA GPU"]
    return missing or device_lacks("cuda", torch.device("cuda", torch.cuda.current_device()))


@torch.compiler.assume_constant_result
def device_lacks(name: str, device: torch.device) -> list[str]:
    """What ``device`` lacks to run an implementation of an op, ``name``; empty if nothing."""
    if name == "torch" or (name == "triton" and device.type == "cpu" and interpreting()):
        return []
    if device.type != "cuda":
        interpreted = ", and on CPU tensors with TRITON_INTERPRET=1" if name == "triton" else ""
        return [f"its kernels run on CUDA tensors{interpreted}; got {device}"]
    if capability(device) < MINIMUM_CAPABILITY:
        given, needed = (".".join(map(str, c)) for c in (capability(device), MINIMUM_CAPABILITY))
        return [f"{device} has compute capability {given}, its kernels need {needed}"]
    if name == "cuda":
        return _native.device_lacks(torch.cuda.current_device() if device.index is None else device.index)
    return []


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, which runs kernels on CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_backend(name: str, source: str = "backend", also: tuple[str, ...] = ()) -> str:
    """``name`` if it is a backend that can run.

    Args:
        name: one of BACKENDS, or of ``also``.
        source: what the name came from, for the message.
        also: further names that are accepted.

    Raises:
        TypeError: not a str.
        ValueError: not the name of a backend.
        BackendUnavailableError: it can't run here.
    """
    known = (*BACKENDS, *(other for other in also if other not in BACKENDS))
    if not isinstance(name, str):
        raise TypeError(f"{source} must be a str, one of {known}, got {name!r}")
    if name not in known:
        raise ValueError(f"{source} must be one of {known}, got {name!r}")
    reasons = unavailable_because(name)
    if reasons:
        raise BackendUnavailableError(f"{source} {name!r} can't run: " + "; ".join(reasons))
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything within the ``with`` block (of this thread or task) on one backend.

    It overrides a model's own ``backend`` and the environment variable VAPT_FAST_BACKEND.

    Args:
        name: "auto", "reference", "torch", "triton" or "cuda"; see ``vapt-fast info``.

    Raises:
        TypeError, ValueError: not the name of a backend.
        BackendUnavailableError: it can't run here; nothing falls back in silence. "auto" is a mix, and runs an op
            on PyTorch's operations where nothing was measured to be faster.
    """
    token = _chosen.set(check_backend(name))
    outer, _chosen_when_compiling.name = _chosen_when_compiling.name, name
    try:
        yield
    finally:
        _chosen.reset(token)
        _chosen_when_compiling.name = outer


def resolve(preferred: str | None = None) -> str:
    """The backend to run now, a name of BACKENDS.

    The innermost ``use_backend`` decides, else ``preferred`` (a model's own choice), else the environment
    variable, else "auto".
    """
    chosen = _chosen_when_compiling.name if torch.compiler.is_compiling() else _chosen.get()
    name = chosen or preferred
    if name is None:
        name = check_backend(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)
    return name


@torch.compiler.assume_constant_result
def warn_once(message: str) -> None:
    """Warn, the first time in this process that there is cause to say ``message``."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


_said: set[str] = set()
