"""Backends by name: which one runs, and how one is chosen."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .device import unavailable_reasons

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "BackendUnavailableError",
    "check_backend",
    "resolve",
    "use_backend",
    "warn_once",
]

# What each name means. An op that has no kernels of that sort runs as under "torch".
BACKENDS = {
    "auto": "the fastest that was measured, op by op; else torch",
    "reference": "the paper, literally, in plain PyTorch: the oracle",
    "torch": "the exact rewrites in ordinary PyTorch operations, on every device",
    "triton": "Triton kernels",
    "cuda": "CUDA C++ kernels, for Hopper GPUs",
}
ENVIRONMENT_VARIABLE = "VAPT_FAST_BACKEND"

_chosen: ContextVar[str | None] = ContextVar("vapt_fast_backend", default=None)


class _ChosenByThread(threading.local):
    """The same for torch.compile, which guards on it; PyTorch 2.11 can't trace a ContextVar."""

    name: str | None = None


_chosen_when_compiling = _ChosenByThread()


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and can't run; the message gives every reason."""


def check_backend(name: str, source: str = "backend", also: tuple[str, ...] = ()) -> str:
    """Return ``name`` if it is a backend that can run.

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
    reasons = unavailable_reasons(name)
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
        BackendUnavailableError: it can't run here; nothing falls back in silence. "auto" is a mix, and runs
            an op on PyTorch's operations where nothing was measured to be faster.
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
