"""prompt_pool on CUDA: the launches, as ops that autograd, torch.compile and torch.export know."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from .._autograd import differentiable_once
from .._native import native
from .._pool import incoming_gradients, pool_by, setup_context
from .._residual import empty_gradients, empty_total, residual_gradients, total_dtype
from .._why_not import why_not_frozen
from ._launch import address, aligned, launch, rows

__all__ = ["ONE_PASS", "prompt_pool", "why_not_prompt_pool"]

# Whether to read the tokens once, by clusters of thread blocks, where device and sizes allow it. Tests and
# benchmarks turn it off, to compare.
ONE_PASS = True


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
    reasons = []
    dtype = autocast_dtype(total_dtype(x, branch), x.device)
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"normed must be float16 or bfloat16, got {dtype}")
    if x.dtype not in (dtype, torch.float32):
        reasons.append(f"x must be float32 or normed's {dtype}, got {x.dtype}")
    if branch is not None and branch.dtype != dtype:
        reasons.append(f"branch must be normed's {dtype}, got {branch.dtype}")
    if matrix.dtype != torch.float32:
        reasons.append(f"matrix must be float32, got {matrix.dtype}")
    if x.shape[-1] % 8 or not x.shape[-1]:
        reasons.append(f"tokens must have 8, 16, 24, ... channels, got {x.shape[-1]}")
    return reasons + why_not_frozen(norm_weight=norm_weight, norm_bias=norm_bias, layer_scale=layer_scale)


# ---- what the kernels take


def _sizes(tokens: Tensor, matrix: Tensor, dtype: torch.dtype) -> Any:
    """The op's sizes for vapt_fast._C; ``dtype`` is normed's."""
    (batch, num_tokens, channels), (num_rows, num_patches) = tokens.shape, matrix.shape
    return native().PromptPoolSizes(
        dtype=str(dtype).removeprefix("torch."),
        float32_tokens=tokens.dtype == torch.float32,
        batch=batch,
        prefix=num_tokens - num_patches,
        patches=num_patches,
        channels=channels,
        rows=num_rows,
    )


def _vector(tensor: Tensor | None) -> Tensor | None:
    """A (C,) as the kernels take it."""
    return None if tensor is None else aligned(tensor.to(torch.float32))


def _readable(matrix: Tensor) -> Tensor:
    """The matrix with contiguous columns."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


# ---- forward


@torch.library.custom_op("vapt_fast::cuda_prompt_pool", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See csrc/include.

    total (see empty_total) and normed (B, T, C), this one in ``dtype``, pooled (B, R, C), mean and rstd
    (B, T).
    """
    total, normed, pooled, mean, rstd = outputs = _empty_outputs(x, branch, matrix, dtype)
    x, branch = aligned(x), None if branch is None else aligned(branch)
    layer_scale, weight, bias, matrix = (
        _vector(layer_scale),
        _vector(weight),
        _vector(bias),
        _readable(matrix),
    )
    norm_weight, norm_bias = _vector(norm_weight), _vector(norm_bias)
    launch(
        "prompt_pool_forward",
        x,
        sizes=_sizes(x, matrix, dtype),
        eps=eps,
        prompt_eps=prompt_eps,
        x=rows(x),
        branch=rows(branch),
        layer_scale=address(layer_scale),
        matrix=rows(matrix),
        weight=address(weight),
        bias=address(bias),
        norm_weight=address(norm_weight),
        norm_bias=address(norm_bias),
        total=address(None if branch is None else total),
        normed=address(normed),
        pooled=address(pooled),
        mean=address(mean),
        rstd=address(rstd),
        one_pass=ONE_PASS,
    )
    return outputs


def _empty_outputs(
    x: Tensor, branch: Tensor | None, matrix: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_tokens, dim = x.shape
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    pooled = torch.empty((batch, matrix.shape[0], dim), dtype=matrix.dtype, device=x.device)
    mean, rstd = (torch.empty((batch, num_tokens), dtype=matrix.dtype, device=x.device) for _ in range(2))
    return empty_total(x, branch), normed, pooled, mean, rstd


@_forward.register_fake
def _(x: Tensor, branch: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    _, _, _, matrix, _, _, dtype, *_ = args
    return _empty_outputs(x, branch, matrix, dtype)


# ---- backward


@torch.library.custom_op("vapt_fast::cuda_prompt_pool_backward", mutates_args=())
def _gradients(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    grad_pooled: Tensor,
    total: Tensor,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    matrix: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    num_prefix: int,
    eps: float,
    prompt_eps: float,
    x_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and branch (see empty_gradients), of the matrix, of weight and bias as (2, C)."""
    grad_x, grad_branch, grad_matrix, grad_affine = outputs = _empty_gradients(
        total, matrix, x_dtype, branch_dtype
    )
    sizes = _sizes(total, matrix, dtype)
    workspace = torch.empty(
        native().prompt_pool_backward_workspace(sizes), dtype=torch.float32, device=total.device
    )
    total, grad_normed, grad_pooled = aligned(total), aligned(grad_normed), aligned(grad_pooled)
    grad_total = None if grad_total is None else aligned(grad_total)
    layer_scale, norm_weight, matrix = _vector(layer_scale), _vector(norm_weight), _readable(matrix)
    weight, bias = _vector(weight), _vector(bias)
    grad_weight, grad_bias = grad_affine.unbind()
    launch(
        "prompt_pool_backward",
        total,
        sizes=sizes,
        eps=eps,
        prompt_eps=prompt_eps,
        total=rows(total),
        grad_total=rows(grad_total),
        grad_normed=rows(grad_normed),
        grad_pooled=rows(grad_pooled),
        layer_scale=address(layer_scale),
        matrix=rows(matrix),
        weight=address(weight),
        bias=address(bias),
        norm_weight=address(norm_weight),
        mean=address(mean),
        rstd=address(rstd),
        workspace=address(workspace),
        grad_x=address(None if x_dtype is None else grad_x),
        grad_branch=address(None if branch_dtype is None else grad_branch),
        grad_matrix=address(grad_matrix),
        grad_weight=address(grad_weight),
        grad_bias=address(grad_bias),
        one_pass=ONE_PASS,
    )
    return outputs


def _empty_gradients(
    total: Tensor, matrix: Tensor, x_dtype: torch.dtype | None, branch_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_matrix = torch.empty(matrix.shape, dtype=matrix.dtype, device=total.device)
    grad_affine = torch.empty((2, total.shape[-1]), dtype=matrix.dtype, device=total.device)
    return *empty_gradients(total, x_dtype, branch_dtype), grad_matrix, grad_affine


@_gradients.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    _, _, _, total, _, _, matrix, *_, x_dtype, branch_dtype = args
    return _empty_gradients(total, matrix, x_dtype, branch_dtype)


# ---- autograd


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    total, layer_scale, _, matrix, *_ = saved = ctx.saved_tensors
    write = partial(_gradients, *incoming_gradients(ctx, total, matrix, *grads[:3]), *saved, *ctx.options)
    grad_x, grad_branch, grad_matrix, grad_affine = residual_gradients(
        write, ctx.dtypes, ctx.needs_input_grad[:2], layer_scale
    )
    grad_x, grad_branch, *learned = differentiable_once(
        "prompt_pool", grad_x, grad_branch, grad_matrix, *grad_affine.unbind()
    )
    return grad_x, grad_branch, None, None, None, *learned, None, None, None, None


_forward.register_autograd(_backward, setup_context=setup_context)
