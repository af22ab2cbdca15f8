"""What ops share that begin with x + layer_scale * branch.

What PyTorch knows as an op may return neither its input nor one tensor twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["empty_gradients", "empty_total", "residual_gradients", "total_dtype"]


def total_dtype(x: Tensor, branch: Tensor | None) -> torch.dtype:
    """That of x + branch."""
    return x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)


def empty_total(x: Tensor, branch: Tensor | None) -> Tensor:
    """For x + layer_scale * branch, (B, T, C); (0,) without branch, where the total is x itself."""
    return torch.empty(0 if branch is None else x.shape, dtype=total_dtype(x, branch), device=x.device)


def empty_gradients(
    total: Tensor, x_dtype: torch.dtype | None, branch_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """For those of x and branch, (B, T, C); (0,) in place of one that has no dtype: nobody wants it."""

    def empty(dtype: torch.dtype | None) -> Tensor:
        if dtype is None:
            return torch.empty(0, dtype=total.dtype, device=total.device)
        return torch.empty(total.shape, dtype=dtype, device=total.device)

    return empty(x_dtype), empty(branch_dtype)


def residual_gradients(
    write: Callable[[torch.dtype | None, torch.dtype | None], tuple[Tensor, ...]],
    dtypes: tuple[torch.dtype, torch.dtype | None],
    needed: tuple[bool, bool],
    layer_scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x and branch, None where not needed, and what else ``write`` makes.

    Where those of x and branch are the same, they are one tensor.

    Args:
        write: makes them, in the dtypes it is given; see ``empty_gradients``.
        dtypes: of x and branch.
        needed: which of the two need a gradient.
        layer_scale: of branch.
    """
    x_dtype, branch_dtype = (dtype if need else None for dtype, need in zip(dtypes, needed, strict=True))
    same = layer_scale is None and x_dtype == branch_dtype
    grad_x, grad_branch, *others = write(x_dtype, None if same else branch_dtype)
    if x_dtype is None:
        grad_x = None
    if same:
        grad_branch = grad_x
    elif branch_dtype is None:
        grad_branch = None
    return grad_x, grad_branch, *others
