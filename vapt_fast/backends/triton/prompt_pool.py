"""prompt_pool on Triton: the launches, as ops that autograd, torch.compile and torch.export know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...kernels import prompt_pool as kernels
from .._autograd import differentiable_once, refuse_forward_mode
from . import configs
from ._launch import launch, num_blocks

__all__ = ["prompt_pool", "why_not_prompt_pool"]


def prompt_pool(
    x: Tensor, matrix: Tensor, weight: Tensor, bias: Tensor, num_prefix: int, eps: float, prompt_eps: float
) -> tuple[Tensor, Tensor]:
    """See vapt_fast.functional.prompt_pool."""
    refuse_forward_mode("prompt_pool", x, matrix, weight, bias)
    dtype = matrix.dtype
    outputs = _forward(x, matrix, weight.to(dtype), bias.to(dtype), num_prefix, eps, prompt_eps)
    return outputs[0], outputs[1]


def why_not_prompt_pool(x: Tensor, matrix: Tensor, *_: Any) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    reasons = []
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        reasons.append(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if matrix.dtype not in (torch.float32, torch.float64):
        reasons.append(f"matrix must be float32 or float64, got {matrix.dtype}")
    return reasons


# ---- forward


@torch.library.custom_op("vapt_fast::prompt_pool", mutates_args=())
def _forward(
    x: Tensor, matrix: Tensor, weight: Tensor, bias: Tensor, num_prefix: int, eps: float, prompt_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """normed (B, T, C), pooled and raw (B, R, C), mean and rstd (B, T); see vapt_fast.kernels.prompt_pool."""
    batch, num_tokens, dim = x.shape
    rows = matrix.shape[0]
    config = configs.prompt_pool(matrix.dtype, rows)
    normed, pooled, raw, mean, rstd = _empty_outputs(x, matrix)
    launch(
        kernels.normalise,
        config.normalise,
        batch * num_blocks(config.normalise, BLOCK_T=num_tokens),
        *(x, *x.stride()),
        *(normed, mean, rstd, num_tokens, dim),
        EPS=eps,
    )
    launch(
        kernels.pool,
        config.pool,
        batch * num_blocks(config.pool, BLOCK_R=rows, BLOCK_C=dim),
        *(x, *x.stride()),
        *(matrix, *matrix.stride()),
        *(weight, *weight.stride()),
        *(bias, *bias.stride()),
        *(mean, rstd, pooled, raw, num_tokens, dim, rows, num_prefix),
        EPS=eps,
        PROMPT_EPS=prompt_eps,
        PRECISION=configs.product_precision(x.dtype),
    )
    return normed, pooled, raw, mean, rstd


def _empty_outputs(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, num_tokens, dim), rows = x.shape, matrix.shape[0]
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pooled, raw = (torch.empty((batch, rows, dim), dtype=matrix.dtype, device=x.device) for _ in range(2))
    mean, rstd = (torch.empty((batch, num_tokens), dtype=matrix.dtype, device=x.device) for _ in range(2))
    return normed, pooled, raw, mean, rstd


@_forward.register_fake
def _(
    x: Tensor, matrix: Tensor, weight: Tensor, bias: Tensor, num_prefix: int, eps: float, prompt_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(x, matrix)


# ---- backward: one op for the tokens, which are often frozen, and one for what is learned


@torch.library.custom_op("vapt_fast::prompt_pool_backward_tokens", mutates_args=())
def _backward_tokens(
    grad_normed: Tensor,
    grad_pooled: Tensor,
    x: Tensor,
    matrix: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_prefix: int,
    eps: float,
    prompt_eps: float,
) -> Tensor:
    """The gradient of x, (B, T, C)."""
    batch, num_tokens, dim = x.shape
    rows = matrix.shape[0]
    config = configs.prompt_pool(matrix.dtype, rows)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        kernels.tokens_backward,
        config.tokens_backward,
        batch * num_blocks(config.tokens_backward, BLOCK_T=num_tokens),
        *(x, *x.stride()),
        *(grad_normed, *grad_normed.stride()),
        *(grad_pooled, *grad_pooled.stride()),
        *(matrix, *matrix.stride()),
        *(weight, *weight.stride()),
        *(mean, rstd, grad_x, num_tokens, dim, rows, num_prefix),
        EPS=eps,
        PROMPT_EPS=prompt_eps,
        PRECISION=configs.product_precision(x.dtype),
    )
    return grad_x


@_backward_tokens.register_fake
def _(grad_normed: Tensor, grad_pooled: Tensor, x: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("vapt_fast::prompt_pool_backward_learned", mutates_args=())
def _backward_learned(
    grad_pooled: Tensor,
    x: Tensor,
    matrix: Tensor,
    weight: Tensor,
    bias: Tensor,
    raw: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_prefix: int,
    eps: float,
    prompt_eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of the matrix (R, N), and those of weight and bias as (2, C)."""
    batch, num_tokens, dim = x.shape
    rows, num_patches = matrix.shape
    config = configs.prompt_pool(matrix.dtype, rows)
    images = configs.images_per_program(batch)
    chunks = triton.cdiv(batch, images)
    partial_matrix = torch.empty((chunks, rows, num_patches), dtype=matrix.dtype, device=x.device)
    partial_affine = torch.empty((chunks, 2, dim), dtype=matrix.dtype, device=x.device)
    launch(
        kernels.matrix_backward,
        config.matrix_backward,
        chunks * num_blocks(config.matrix_backward, BLOCK_R=rows, BLOCK_N=num_patches),
        *(x, *x.stride()),
        *(grad_pooled, *grad_pooled.stride()),
        *(weight, *weight.stride()),
        *(bias, *bias.stride()),
        *(mean, rstd, partial_matrix, batch, num_tokens, dim, rows, num_prefix, images),
        EPS=eps,
        PROMPT_EPS=prompt_eps,
        PRECISION=configs.product_precision(x.dtype),
    )
    launch(
        kernels.affine_backward,
        config.affine_backward,
        chunks * num_blocks(config.affine_backward, BLOCK_C=dim),
        *(grad_pooled, *grad_pooled.stride()),
        *(matrix, *matrix.stride()),
        *(raw, partial_affine, batch, dim, rows, num_patches, images),
    )
    return _add_chunks(partial_matrix, config.add_chunks), _add_chunks(partial_affine, config.add_chunks)


def _add_chunks(partial: Tensor, config: configs.Launch) -> Tensor:
    total = torch.empty(partial.shape[1:], dtype=partial.dtype, device=partial.device)
    programs = num_blocks(config, BLOCK=total.numel())
    launch(kernels.add_chunks, config, programs, partial, total, partial.shape[0], total.numel())
    return total


@_backward_learned.register_fake
def _(grad_pooled: Tensor, x: Tensor, matrix: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    grad_matrix = torch.empty(matrix.shape, dtype=matrix.dtype, device=x.device)
    return grad_matrix, torch.empty((2, x.shape[-1]), dtype=matrix.dtype, device=x.device)


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, matrix, weight, bias, *ctx.options = inputs
    _, _, raw, mean, rstd = output
    ctx.mark_non_differentiable(raw, mean, rstd)
    ctx.save_for_backward(x, matrix, weight, bias, raw, mean, rstd)


def _backward(ctx: Any, grad_normed: Tensor, grad_pooled: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, matrix, weight, bias, raw, mean, rstd = ctx.saved_tensors
    grad_x = grad_matrix = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _backward_tokens(grad_normed, grad_pooled, x, matrix, weight, mean, rstd, *ctx.options)
    if any(ctx.needs_input_grad[1:4]):
        grad_matrix, grad_affine = _backward_learned(
            grad_pooled, x, matrix, weight, bias, raw, mean, rstd, *ctx.options
        )
        grad_weight, grad_bias = grad_affine.unbind()
    grads = differentiable_once("prompt_pool", grad_x, grad_matrix, grad_weight, grad_bias)
    return *grads, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
