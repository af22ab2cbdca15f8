"""What the kernels of prompt_pool share, whichever language they are in: their ops, as autograd sees them.

Such an op takes x, branch, layer_scale, norm_weight, norm_bias, matrix, weight, bias, the dtype of normed,
num_prefix, eps and prompt_eps. It returns total (see ``empty_total``), normed, pooled, and what it keeps for
the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._autocast import autocast_dtype
from ._autograd import no_zeros, or_zeros, refuse_forward_mode
from ._residual import total_dtype

__all__ = ["incoming_gradients", "pool_by", "setup_context"]


def pool_by(
    op: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    matrix: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of prompt_pool by ``op``; ``options`` are num_prefix, eps and prompt_eps."""
    tensors = (x, matrix, weight, bias, norm_weight, norm_bias, branch, layer_scale)
    refuse_forward_mode("prompt_pool", *(t for t in tensors if t is not None))
    weight, bias = weight.to(matrix.dtype), bias.to(matrix.dtype)
    dtype = autocast_dtype(total_dtype(x, branch), x.device)
    total, normed, pooled, *_ = op(
        x, branch, layer_scale, norm_weight, norm_bias, matrix, weight, bias, dtype, *options
    )
    return x if branch is None else total, normed, pooled


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save total, layer_scale, norm_weight, matrix, weight, bias, and what the op kept."""
    x, branch, layer_scale, norm_weight, _, matrix, weight, bias, *ctx.options = inputs
    total, _, _, *kept = output
    no_zeros(ctx, *kept)
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype
    ctx.save_for_backward(
        x if branch is None else total, layer_scale, norm_weight, matrix, weight, bias, *kept
    )


def incoming_gradients(
    ctx: Any,
    total: Tensor,
    matrix: Tensor,
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    grad_pooled: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Those of total, None where it is x itself, of normed and of pooled, zeros where there is none."""
    each_row = total[:, :1].expand(-1, matrix.shape[0], -1)
    return (
        None if ctx.dtypes[1] is None else grad_total,
        or_zeros(grad_normed, total, ctx.options[0]),
        or_zeros(grad_pooled, each_row, matrix.dtype),
    )
