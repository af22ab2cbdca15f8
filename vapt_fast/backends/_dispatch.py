"""Which backend runs: its names, how one is chosen, and why one can't run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "BackendUnavailable",
    "check_backend",
    "resolve",
    "use_backend",
]

BACKENDS = {
    "auto": "the fastest that can run here, op by op",
    "reference": "the paper, literally, in plain PyTorch: the oracle",
    "torch": "the exact rewrites in ordinary PyTorch operations, on every device",
    "triton": "Triton kernels",
    "cuda": "CUDA C++ kernels",
}
ENVIRONMENT_VARIABLE = "VAPT_FAST_BACKEND"

_chosen: ContextVar[str | None] = ContextVar("vapt_fast_backend", default=None)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and can't run; the message gives every reason."""


def unavailable_because(name: str) -> list[str]:
    """Every reason why backend ``name`` can't run on this machine; empty if it can."""
    if name in ("triton", "cuda"):
        return [f"this version of vapt_fast has no {BACKENDS[name]}"]
    return []


def check_backend(name: str, source: str = "backend") -> str:
    """``name`` if it is a backend that can run.

    Args:
        name: one of BACKENDS.
        source: what the name came from, for the message.

    Raises:
        TypeError: not a str.
        ValueError: not the name of a backend.
        BackendUnavailable: it can't run here.
    """
    if not isinstance(name, str):
        raise TypeError(f"{source} must be a str, one of {tuple(BACKENDS)}, got {name!r}")
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {tuple(BACKENDS)}, got {name!r}")
    reasons = unavailable_because(name)
    if reasons:
        raise BackendUnavailable(f"{source} {name!r} can't run: " + "; ".join(reasons))
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything within the ``with`` block (of this thread or task) on one backend.

    It overrides a model's own ``backend`` and the environment variable VAPT_FAST_BACKEND.

    Args:
        name: "reference", "torch", "triton", "cuda" or "auto"; see ``python -m vapt_fast.info``.

    Raises:
        TypeError, ValueError: not the name of a backend.
        BackendUnavailable: it can't run here; nothing falls back in silence.
    """
    token = _chosen.set(check_backend(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def fastest() -> str:
    """What "auto" stands for on this machine."""
    return "torch"


def resolve(preferred: str | None = None) -> str:
    """The backend to run now; never "auto".

    The innermost ``use_backend`` decides, else ``preferred`` (a model's own choice), else the environment
    variable, else "auto".
    """
    name = _chosen.get() or preferred
    if name is None:
        name = check_backend(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)
    return fastest() if name == "auto" else name
