"""prompt_pool on Triton: the launches, as ops that autograd, torch.compile and torch.export know."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from ...kernels import prompt_pool as kernels
from .._autograd import differentiable_once
from .._pool import incoming_gradients, pool_by, setup_context
from .._residual import empty_gradients, empty_total, residual_gradients
from .._why_not import why_not_dtypes, why_not_frozen
from . import configs
from ._launch import add_chunks, launch, num_blocks, strided
from .add_norm import launch_forward

__all__ = ["prompt_pool", "why_not_prompt_pool"]


def prompt_pool(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See vapt_fast.functional.prompt_pool."""
    return pool_by(_forward, *args)


def why_not_prompt_pool(
    x: Tensor,
    matrix: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    num_prefix: int,
    eps: float,
    prompt_eps: float,
) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    frozen = {"norm_weight": norm_weight, "norm_bias": norm_bias, "layer_scale": layer_scale}
    reasons = why_not_dtypes(x=x, branch=branch, **frozen)
    if matrix.dtype not in (torch.float32, torch.float64):
        reasons.append(f"matrix must be float32 or float64, got {matrix.dtype}")
    return [*reasons, *why_not_frozen(**frozen)]


# ---- forward


@torch.library.custom_op("vapt_fast::prompt_pool", mutates_args=())
def _forward(
    x: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    matrix: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    num_prefix: int,
    eps: float,
    prompt_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See vapt_fast.kernels.prompt_pool.

    total (see empty_total) and normed (B, T, C), this one in ``dtype``, pooled and raw (B, R, C), mean and
    rstd (B, T).
    """
    batch, num_tokens, dim = x.shape
    rows = matrix.shape[0]
    config = configs.prompt_pool(matrix.dtype, rows)
    total, normed, pooled, raw, mean, rstd = outputs = _empty_outputs(x, branch, matrix, dtype)
    launch_forward(x, branch, layer_scale, norm_weight, norm_bias, total, normed, mean, rstd, eps)
    tokens = x if branch is None else total
    launch(
        kernels.pool,
        config.pool,
        batch * num_blocks(config.pool, BLOCK_R=rows, BLOCK_C=dim),
        *strided(tokens, 3),
        *strided(matrix, 2),
        *strided(weight, 1),
        *strided(bias, 1),
        *(mean, rstd, pooled, raw, num_tokens, dim, rows, num_prefix),
        EPS=eps,
        PROMPT_EPS=prompt_eps,
        PRECISION=configs.product_precision(dtype),
    )
    return outputs


def _empty_outputs(
    x: Tensor, branch: Tensor | None, matrix: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, num_tokens, dim), rows = x.shape, matrix.shape[0]
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    pooled, raw = (torch.empty((batch, rows, dim), dtype=matrix.dtype, device=x.device) for _ in range(2))
    mean, rstd = (torch.empty((batch, num_tokens), dtype=matrix.dtype, device=x.device) for _ in range(2))
    return empty_total(x, branch), normed, pooled, raw, mean, rstd


@_forward.register_fake
def _(x: Tensor, branch: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    _, _, _, matrix, _, _, dtype, *_ = args
    return _empty_outputs(x, branch, matrix, dtype)


# ---- backward: one op for the tokens, which are often frozen, and one for what is learned


@torch.library.custom_op("vapt_fast::prompt_pool_backward_tokens", mutates_args=())
def _backward_tokens(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    grad_pooled: Tensor,
    total: Tensor,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    matrix: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    num_prefix: int,
    eps: float,
    prompt_eps: float,
    x_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and branch; see empty_gradients."""
    batch, num_tokens, dim = total.shape
    rows = matrix.shape[0]
    config = configs.prompt_pool(matrix.dtype, rows)
    grad_x, grad_branch = empty_gradients(total, x_dtype, branch_dtype)
    launch(
        kernels.tokens_backward,
        config.tokens_backward,
        batch * num_blocks(config.tokens_backward, BLOCK_T=num_tokens),
        *strided(total, 3),
        *strided(grad_total, 3),
        *strided(grad_normed, 3),
        *strided(grad_pooled, 3),
        *strided(matrix, 2),
        *strided(weight, 1),
        *strided(norm_weight, 1),
        *strided(layer_scale, 1),
        *(mean, rstd),
        *(None if x_dtype is None else grad_x, None if branch_dtype is None else grad_branch),
        *(num_tokens, dim, rows, num_prefix),
        EPS=eps,
        PROMPT_EPS=prompt_eps,
        PRECISION=configs.product_precision(dtype),
    )
    return grad_x, grad_branch


@_backward_tokens.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    _, _, _, total, *_, x_dtype, branch_dtype = args
    return empty_gradients(total, x_dtype, branch_dtype)


@torch.library.custom_op("vapt_fast::prompt_pool_backward_learned", mutates_args=())
def _backward_learned(
    grad_pooled: Tensor,
    total: Tensor,
    matrix: Tensor,
    weight: Tensor,
    bias: Tensor,
    raw: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    num_prefix: int,
    eps: float,
    prompt_eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of the matrix (R, N), and those of weight and bias as (2, C)."""
    batch, num_tokens, dim = total.shape
    rows, num_patches = matrix.shape
    config = configs.prompt_pool(matrix.dtype, rows)
    images = configs.images_per_program(batch)
    chunks = triton.cdiv(batch, images)
    partial_matrix = torch.empty((chunks, rows, num_patches), dtype=matrix.dtype, device=total.device)
    partial_affine = torch.empty((chunks, 2, dim), dtype=matrix.dtype, device=total.device)
    launch(
        kernels.matrix_backward,
        config.matrix_backward,
        chunks * num_blocks(config.matrix_backward, BLOCK_R=rows, BLOCK_N=num_patches),
        *strided(total, 3),
        *strided(grad_pooled, 3),
        *strided(weight, 1),
        *strided(bias, 1),
        *(mean, rstd, partial_matrix, batch, num_tokens, dim, rows, num_prefix, images),
        EPS=eps,
        PROMPT_EPS=prompt_eps,
        PRECISION=configs.product_precision(dtype),
    )
    launch(
        kernels.affine_backward,
        config.affine_backward,
        chunks * num_blocks(config.affine_backward, BLOCK_C=dim),
        *strided(grad_pooled, 3),
        *strided(matrix, 2),
        *(raw, partial_affine, batch, dim, rows, num_patches, images),
    )
    return add_chunks(partial_matrix), add_chunks(partial_affine)


@_backward_learned.register_fake
def _(grad_pooled: Tensor, total: Tensor, matrix: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    grad_matrix = torch.empty(matrix.shape, dtype=matrix.dtype, device=total.device)
    return grad_matrix, torch.empty((2, total.shape[-1]), dtype=matrix.dtype, device=total.device)


# ---- autograd


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    total, layer_scale, norm_weight, matrix, weight, bias, raw, mean, rstd = ctx.saved_tensors
    grad_total, grad_normed, grad_pooled = incoming_gradients(ctx, total, matrix, *grads[:3])
    grad_x = grad_branch = grad_matrix = grad_weight = grad_bias = None
    if any(ctx.needs_input_grad[:2]):
        write = partial(
            _backward_tokens,
            *(
                grad_total,
                grad_normed,
                grad_pooled,
                total,
                layer_scale,
                norm_weight,
                matrix,
                weight,
                mean,
                rstd,
            ),
            *ctx.options,
        )
        grad_x, grad_branch = residual_gradients(write, ctx.dtypes, ctx.needs_input_grad[:2], layer_scale)
    if any(ctx.needs_input_grad[5:8]):
        grad_matrix, grad_affine = _backward_learned(
            grad_pooled, total, matrix, weight, bias, raw, mean, rstd, *ctx.options
        )
        grad_weight, grad_bias = grad_affine.unbind()
    grad_x, grad_branch, *learned = differentiable_once(
        "prompt_pool", grad_x, grad_branch, grad_matrix, grad_weight, grad_bias
    )
    return grad_x, grad_branch, None, None, None, *learned, None, None, None, None


_forward.register_autograd(_backward, setup_context=setup_context)
