"""What ops share that begin with total = x + layer_scale * branch."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .autograd import placeholder
from .base import empty_like

__all__ = ["add_residual", "empty_residual_gradients", "empty_total", "residual_gradients", "total_dtype"]


def add_residual(x: Tensor, branch: Tensor | None, layer_scale: Tensor | None) -> Tensor:
    """x + layer_scale * branch, in the dtype of x + branch; x itself without branch."""
    if branch is None:
        return x
    added = branch if layer_scale is None else layer_scale * branch
    return (x + added).to(total_dtype(x, branch))


def total_dtype(x: Tensor, branch: Tensor | None) -> torch.dtype:
    """The dtype of x + branch."""
    return x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)


def empty_total(x: Tensor, branch: Tensor | None) -> Tensor:
    """The total (B, T, C), not initialised; (0,) without branch, where it is x itself."""
    return placeholder(x) if branch is None else empty_like(x, total_dtype(x, branch))


def empty_residual_gradients(
    total: Tensor,
    layer_scale: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    needed: Collection[str],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and branch (B, T, C), not initialised; None for one that is not needed.

    None also for that of branch where it is the same as that of x; see ``residual_gradients``.
    """
    same = layer_scale is None and x_dtype == branch_dtype
    of_x = empty_like(total, x_dtype) if "x" in needed or (same and "branch" in needed) else None
    of_branch = empty_like(total, branch_dtype) if "branch" in needed and not same else None
    return of_x, of_branch


def residual_gradients(of_x: Tensor | None, of_branch: Tensor | None) -> dict[str, Tensor | None]:
    """The gradients of x and branch by name; one tensor for both where only that of x was made."""
    return {"x": of_x, "branch": of_x if of_branch is None else of_branch}
