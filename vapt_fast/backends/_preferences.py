"""What "auto" prefers to PyTorch's own operations, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["PREFERENCES", "Preference"]


def _always(*args: object) -> bool:
    return True


@dataclass(frozen=True)
class Preference:
    """An implementation of an op that is faster than PyTorch's operations on some GPUs, for some arguments.

    Attributes:
        op, implementation: keys and values of _dispatch.IMPLEMENTATIONS.
        capabilities: compute capabilities of the GPUs that it holds for, as (9, 0).
        dtypes: that the op computes in: of its first argument, or of autocast where that is on.
        why: the measurement, or the model, that put it here.
        fits: which arguments of the op (positional, as its implementations take them) it holds for.
    """

    op: str
    implementation: str
    capabilities: tuple[tuple[int, int], ...]
    dtypes: tuple[torch.dtype, ...]
    why: str
    fits: Callable[..., bool] = _always


# The first entry that matches decides. Empty, so PyTorch's operations everywhere: no kernel has been run on a
# GPU yet, and a kernel that was never seen to be right there is not worth any speed.
PREFERENCES: tuple[Preference, ...] = ()
