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
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See vapt_fast.functional.add_norm."""
    refuse_forward_mode("add_norm", *(t for t in (x, delta, weight, bias, gain) if t is not None))
    dtype = autocast_dtype(total_dtype(x, delta), x.device)
    total, normed, _, _ = _forward(x, delta, gain, weight, bias, eps, dtype)
    return x if delta is None else total, normed


def why_not_add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    eps: float,
) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    frozen = {"weight": weight, "bias": bias, "gain": gain}
    return [*why_not_dtypes(x=x, delta=delta, **frozen), *why_not_frozen(**frozen)]


# ---- forward


@torch.library.custom_op("vapt_fast::add_norm", mutates_args=())
def _forward(
    x: Tensor,
    delta: Tensor | None,
    gain: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total (see empty_total) and normed (B, T, C), this one in ``dtype``, mean and rstd (B, T)."""
    outputs = _empty_outputs(x, delta, dtype)
    launch_forward(x, delta, gain, weight, bias, *outputs, eps)
    return outputs


def launch_forward(
    x: Tensor,
    delta: Tensor | None,
    gain: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> None:
    """Write total (where delta is given), normed, mean and rstd; see vapt_fast.kernels.add_norm."""
    batch, num_tokens, dim = x.shape
    config = configs.add_norm(mean.dtype, dim)
    launch(
        kernels.forward,
        config,
        num_blocks(config, BLOCK_T=batch * num_tokens),
        *strided(x, 3),
        *strided(delta, 3),
        *strided(gain, 1),
        *strided(weight, 1),
        *strided(bias, 1),
        *(total, normed, mean, rstd, batch * num_tokens, num_tokens, dim),
        EPS=eps,
        CHUNKS=num_blocks(config, BLOCK_C=dim),
    )


def _empty_outputs(
    x: Tensor, delta: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistic = torch.promote_types(total_dtype(x, delta), torch.float32)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:2], dtype=statistic, device=x.device) for _ in range(2))
    return empty_total(x, delta), normed, mean, rstd


@_forward.register_fake
def _(x: Tensor, delta: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(x, delta, args[-1])


# ---- backward


@torch.library.custom_op("vapt_fast::add_norm_backward", mutates_args=())
def _backward_residual(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    gain: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype | None,
    delta_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and delta; see empty_gradients."""
    batch, num_tokens, dim = total.shape
    config = configs.add_norm(mean.dtype, dim)
    grad_x, grad_delta = empty_gradients(total, x_dtype, delta_dtype)
    launch(
        kernels.backward,
        config,
        num_blocks(config, BLOCK_T=batch * num_tokens),
        *strided(total, 3),
        *strided(grad_total, 3),
        *strided(grad_normed, 3),
        *strided(gain, 1),
        *strided(weight, 1),
        *(mean, rstd),
        *(None if x_dtype is None else grad_x, None if delta_dtype is None else grad_delta),
        *(batch * num_tokens, num_tokens, dim),
        CHUNKS=num_blocks(config, BLOCK_C=dim),
    )
    return grad_x, grad_delta


@_backward_residual.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    _, _, total, *_, x_dtype, delta_dtype = args
    return empty_gradients(total, x_dtype, delta_dtype)


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, delta, gain, weight, _, _, _ = inputs
    total, normed, mean, rstd = output
    no_zeros(ctx, mean, rstd)
    ctx.normed_dtype = normed.dtype
    ctx.dtypes = x.dtype, None if delta is None else delta.dtype
    ctx.save_for_backward(x if delta is None else total, gain, weight, mean, rstd)


def _backward(
    ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    total, gain, weight, mean, rstd = ctx.saved_tensors
    if ctx.dtypes[1] is None:
        grad_total = None
    grad_normed = or_zeros(grad_normed, total, ctx.normed_dtype)
    write = partial(_backward_residual, grad_total, grad_normed, total, gain, weight, mean, rstd)
    # Its output needs a gradient only where x or delta does: all else is frozen.
    grads = residual_gradients(write, ctx.dtypes, ctx.needs_input_grad[:2], gain)
    return *differentiable_once("add_norm", *grads), None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
