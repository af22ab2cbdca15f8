"""What ops share that begin with x + gain * delta.

What PyTorch knows as an op may return neither its input nor one tensor twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["empty_gradients", "empty_total", "residual_gradients", "total_dtype"]


def total_dtype(x: Tensor, delta: Tensor | None) -> torch.dtype:
    """That of x + delta."""
    return x.dtype if delta is None else torch.promote_types(x.dtype, delta.dtype)


def empty_total(x: Tensor, delta: Tensor | None) -> Tensor:
    """For x + gain * delta, (B, T, C); (0,) without delta, where the total is x itself."""
    return torch.empty(0 if delta is None else x.shape, dtype=total_dtype(x, delta), device=x.device)


def empty_gradients(
    total: Tensor, x_dtype: torch.dtype | None, delta_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """For those of x and delta, (B, T, C); (0,) in place of one that has no dtype: nobody wants it."""

    def empty(dtype: torch.dtype | None) -> Tensor:
        if dtype is None:
            return torch.empty(0, dtype=total.dtype, device=total.device)
        return torch.empty(total.shape, dtype=dtype, device=total.device)

    return empty(x_dtype), empty(delta_dtype)


def residual_gradients(
    write: Callable[[torch.dtype | None, torch.dtype | None], tuple[Tensor, ...]],
    dtypes: tuple[torch.dtype, torch.dtype | None],
    needed: tuple[bool, bool],
    gain: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x and delta, None where not needed, and what else ``write`` makes.

    Where those of x and delta are the same, they are one tensor.

    Args:
        write: makes them, in the dtypes it is given; see ``empty_gradients``.
        dtypes: of x and delta.
        needed: which of the two need a gradient.
        gain: of delta.
    """
    x_dtype, delta_dtype = (dtype if need else None for dtype, need in zip(dtypes, needed, strict=True))
    same = gain is None and x_dtype == delta_dtype
    grad_x, grad_delta, *others = write(x_dtype, None if same else delta_dtype)
    if x_dtype is None:
        grad_x = None
    if same:
        grad_delta = grad_x
    elif delta_dtype is None:
        grad_delta = None
    return grad_x, grad_delta, *others
