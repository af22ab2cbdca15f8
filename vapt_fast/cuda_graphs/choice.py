"""Whether CUDA graphs are used: an argument, a context, an environment variable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["ENVIRONMENT_VARIABLE", "CudaGraphError", "check_choice", "choice", "use_cuda_graphs"]

ENVIRONMENT_VARIABLE = "VAPT_FAST_CUDA_GRAPHS"
_VALUES = {"0": False, "1": True, "": None}

_chosen: ContextVar[tuple[bool | None] | None] = ContextVar("vapt_fast_cuda_graphs", default=None)


class CudaGraphError(RuntimeError):
    """CUDA graphs were demanded and can't serve a call; the message gives every reason."""


@contextmanager
def use_cuda_graphs(enabled: bool | None) -> Iterator[None]:
    """Use CUDA graphs, or don't, in everything within the ``with`` block (of this thread or task).

    It overrides a model's own ``cuda_graphs`` and the environment variable VAPT_FAST_CUDA_GRAPHS.

    Args:
        enabled: False to launch each kernel by itself. True to raise CudaGraphError where a call can't be
            served by a graph. None for graphs wherever they are safe.

    Raises:
        TypeError: neither a bool nor None.
    """
    token = _chosen.set((check_choice(enabled),))
    try:
        yield
    finally:
        _chosen.reset(token)


def check_choice(enabled: bool | None) -> bool | None:
    """Return ``enabled`` if it is a choice; raise TypeError elsewhere."""
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(f"cuda_graphs must be True, False or None (where they are safe), got {enabled!r}")
    return enabled


def choice(preferred: bool | None = None) -> bool | None:
    """Return what holds now, as ``enabled`` of use_cuda_graphs.

    The innermost ``use_cuda_graphs`` decides, else ``preferred`` (a model's own), else the environment.

    Raises:
        ValueError: the environment variable is none of "0", "1".
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen[0]
    if preferred is not None:
        return preferred
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value not in _VALUES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 0 or 1, got {value!r}")
    return _VALUES[value]
