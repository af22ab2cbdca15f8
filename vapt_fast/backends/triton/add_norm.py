"""add_norm on Triton: the launches, as ops that autograd, torch.compile and torch.export know."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import add_norm as kernels
from .._autocast import autocast_dtype
from .._autograd import differentiable_once, no_zeros, or_zeros, refuse_forward_mode
from .._residual import empty_gradients, empty_total, residual_gradients, total_dtype
from .._why_not import why_not_dtypes, why_not_frozen
from . import configs
from ._launch import launch, num_blocks, strided

__all__ = ["add_norm", "launch_forward", "why_not_add_norm"]


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See vapt_fast.functional.add_norm."""
    refuse_forward_mode("add_norm", *(t for t in (x, branch, weight, bias, layer_scale) if t is not None))
    dtype = autocast_dtype(total_dtype(x, branch), x.device)
    total, normed, _, _ = _forward(x, branch, layer_scale, weight, bias, eps, dtype)
    return x if branch is None else total, normed


def why_not_add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    eps: float,
) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    frozen = {"weight": weight, "bias": bias, "layer_scale": layer_scale}
    return [*why_not_dtypes(x=x, branch=branch, **frozen), *why_not_frozen(**frozen)]


# ---- forward


@torch.library.custom_op("vapt_fast::add_norm", mutates_args=())
def _forward(
    x: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total (see empty_total) and normed (B, T, C), this one in ``dtype``, mean and rstd (B, T)."""
    outputs = _empty_outputs(x, branch, dtype)
    launch_forward(x, branch, layer_scale, weight, bias, *outputs, eps)
    return outputs


def launch_forward(
    x: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> None:
    """Write total (where branch is given), normed, mean and rstd; see vapt_fast.kernels.add_norm."""
    batch, num_tokens, dim = x.shape
    config = configs.add_norm(mean.dtype, dim)
    launch(
        kernels.forward,
        config,
        num_blocks(config, BLOCK_T=batch * num_tokens),
        *strided(x, 3),
        *strided(branch, 3),
        *strided(layer_scale, 1),
        *strided(weight, 1),
        *strided(bias, 1),
        *(total, normed, mean, rstd, batch * num_tokens, num_tokens, dim),
        EPS=eps,
        CHUNKS=num_blocks(config, BLOCK_C=dim),
    )


def _empty_outputs(
    x: Tensor, branch: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistic = torch.promote_types(total_dtype(x, branch), torch.float32)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:2], dtype=statistic, device=x.device) for _ in range(2))
    return empty_total(x, branch), normed, mean, rstd


@_forward.register_fake
def _(x: Tensor, branch: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(x, branch, args[-1])


# ---- backward


@torch.library.custom_op("vapt_fast::add_norm_backward", mutates_args=())
def _backward_residual(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    layer_scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and branch; see empty_gradients."""
    batch, num_tokens, dim = total.shape
    config = configs.add_norm(mean.dtype, dim)
    grad_x, grad_branch = empty_gradients(total, x_dtype, branch_dtype)
    launch(
        kernels.backward,
        config,
        num_blocks(config, BLOCK_T=batch * num_tokens),
        *strided(total, 3),
        *strided(grad_total, 3),
        *strided(grad_normed, 3),
        *strided(layer_scale, 1),
        *strided(weight, 1),
        *(mean, rstd),
        *(None if x_dtype is None else grad_x, None if branch_dtype is None else grad_branch),
        *(batch * num_tokens, num_tokens, dim),
        CHUNKS=num_blocks(config, BLOCK_C=dim),
    )
    return grad_x, grad_branch


@_backward_residual.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    _, _, total, *_, x_dtype, branch_dtype = args
    return empty_gradients(total, x_dtype, branch_dtype)


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, branch, layer_scale, weight, _, _, _ = inputs
    total, normed, mean, rstd = output
    no_zeros(ctx, mean, rstd)
    ctx.normed_dtype = normed.dtype
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype
    ctx.save_for_backward(x if branch is None else total, layer_scale, weight, mean, rstd)


def _backward(
    ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    total, layer_scale, weight, mean, rstd = ctx.saved_tensors
    if ctx.dtypes[1] is None:
        grad_total = None
    grad_normed = or_zeros(grad_normed, total, ctx.normed_dtype)
    write = partial(_backward_residual, grad_total, grad_normed, total, layer_scale, weight, mean, rstd)
    # Its output needs a gradient only where x or branch does: all else is frozen.
    grads = residual_gradients(write, ctx.dtypes, ctx.needs_input_grad[:2], layer_scale)
    return *differentiable_once("add_norm", *grads), None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
