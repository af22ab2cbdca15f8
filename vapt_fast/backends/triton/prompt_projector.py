"""prompt_projector on Triton: the launches, as ops that autograd, torch.compile and torch.export know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...kernels import prompt_projector as kernels
from .._autograd import differentiable_once, no_zeros, refuse_forward_mode
from .._why_not import why_not_dtypes, why_not_frozen
from . import configs
from ._launch import add_chunks, launch, num_blocks

__all__ = ["prompt_projector", "why_not_prompt_projector"]


def prompt_projector(
    pooled: Tensor,
    bias: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    scale: Tensor | float,
    channel_mask: Tensor | None,
    feature_mask: Tensor | None,
    activation: str,
    eps: float | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See vapt_fast.functional.prompt_projector."""
    learned, factor = (None, scale) if not isinstance(scale, Tensor) else (scale, 1.0)
    tensors, affine = (pooled, bias, down, up, learned, channel_mask, feature_mask), (norm_weight, norm_bias)
    refuse_forward_mode("prompt_projector", *(t for t in (*tensors, *affine) if t is not None))
    tensors = (None if t is None else t.to(pooled.dtype) for t in tensors)
    return _forward(*tensors, *affine, factor, activation, eps, dtype)[0]


def why_not_prompt_projector(
    pooled: Tensor,
    bias: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    scale: Tensor | float,
    channel_mask: Tensor | None,
    feature_mask: Tensor | None,
    activation: str,
    eps: float | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dtype: torch.dtype,
) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    frozen = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    reasons = why_not_dtypes(**frozen)
    if pooled.dtype not in (torch.float32, torch.float64):
        reasons.append(f"pooled must be float32 or float64, got {pooled.dtype}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        reasons.append(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if down is not None and down.shape[0] > configs.LARGEST_PROJECTOR:
        reasons.append(f"down must have at most {configs.LARGEST_PROJECTOR} rows, got {down.shape[0]}")
    return reasons + why_not_frozen(channel_mask=channel_mask, feature_mask=feature_mask, **frozen)


def _strided(tensor: Tensor | None) -> tuple[Tensor | int, ...] | None:
    """``tensor`` as the kernels take it."""
    return None if tensor is None else (tensor, *tensor.stride())


def _by_prompt(channel_mask: Tensor | None, pooled: Tensor) -> Tensor | None:
    """(B, 1, C) as (B, P, C), without copying."""
    return None if channel_mask is None else channel_mask.expand(pooled.shape)


def _arithmetic(pooled: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that says how products are computed, for prompts of ``dtype``."""
    return pooled.dtype if pooled.dtype == torch.float64 else dtype


def _sizes(pooled: Tensor, down: Tensor | None) -> tuple[int, int, int, int]:
    """B * P, P, C and r."""
    batch, num_prompts, dim = pooled.shape
    return batch * num_prompts, num_prompts, dim, 0 if down is None else down.shape[0]


# ---- forward


@torch.library.custom_op("vapt_fast::prompt_projector", mutates_args=())
def _forward(
    pooled: Tensor,
    bias: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    scale: Tensor | None,
    channel_mask: Tensor | None,
    feature_mask: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    factor: float,
    activation: str,
    eps: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """prompts (B, P, C), hidden (B, P, r), mean and rstd as (2, B, P); see kernels.prompt_projector.

    r is 0 without a projector, the 2 is 0 without a norm.
    """
    prompts, hidden, statistics = _empty_outputs(pooled, down, eps, dtype)
    num_rows, *sizes, width = _sizes(pooled, down)
    arithmetic = _arithmetic(pooled, dtype)
    config = configs.prompt_projector("project", arithmetic, width)
    learned = (pooled, bias, down, up)
    masks = (_by_prompt(channel_mask, pooled), feature_mask)
    affine = (norm_weight, norm_bias)
    launch(
        kernels.project,
        config,
        num_blocks(config, BLOCK_ROWS=num_rows),
        *(prompts, hidden, *_mean_and_rstd(statistics)),
        *(*map(_strided, learned), scale, *map(_strided, (*masks, *affine))),
        *(num_rows, *sizes, width),
        SCALE=factor,
        ACTIVATION=activation,
        EPS=eps,
        PRECISION=configs.product_precision(arithmetic),
    )
    return prompts, hidden, statistics


def _empty_outputs(
    pooled: Tensor, down: Tensor | None, eps: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_prompts, _ = pooled.shape
    width = 0 if down is None else down.shape[0]
    prompts = torch.empty(pooled.shape, dtype=dtype, device=pooled.device)
    hidden = torch.empty((batch, num_prompts, width), dtype=pooled.dtype, device=pooled.device)
    shape = (0 if eps is None else 2, batch, num_prompts)
    return prompts, hidden, torch.empty(shape, dtype=pooled.dtype, device=pooled.device)


def _mean_and_rstd(statistics: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return statistics.unbind() if statistics.shape[0] else (None, None)


@_forward.register_fake
def _(pooled: Tensor, bias: Tensor, down: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, eps, dtype = args
    return _empty_outputs(pooled, down, eps, dtype)


# ---- backward: one op for each row's gradients, one for the weights of the projector


@torch.library.custom_op("vapt_fast::prompt_projector_backward", mutates_args=())
def _backward_rows(
    grad_prompts: Tensor,
    pooled: Tensor,
    bias: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    scale: Tensor | None,
    channel_mask: Tensor | None,
    feature_mask: Tensor | None,
    norm_weight: Tensor | None,
    hidden: Tensor,
    statistics: Tensor,
    factor: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of pooled, of hidden, of bias and of scale (0,) or (1,); and two means of each row.

    They are those of the kernels' grad_of_raw, in the shape of ``statistics``.
    """
    num_rows, *sizes, width = _sizes(pooled, down)
    arithmetic = _arithmetic(pooled, grad_prompts.dtype)
    config = configs.prompt_projector("project_backward", arithmetic, width)
    grad_pooled, grad_hidden, means, _, _ = _empty_gradients(pooled, scale, hidden, statistics)
    sums = torch.empty(pooled.shape[:2], dtype=pooled.dtype, device=pooled.device)
    products = None if scale is None else torch.empty_like(sums)
    learned = (pooled, bias, down, up)
    masks = (_by_prompt(channel_mask, pooled), feature_mask)
    launch(
        kernels.project_backward,
        config,
        num_blocks(config, BLOCK_ROWS=num_rows),
        *(grad_pooled, grad_hidden, means if means.shape[0] else None, sums, products),
        *(*map(_strided, (grad_prompts, *learned)), scale, *map(_strided, (*masks, norm_weight))),
        *(hidden, *_mean_and_rstd(statistics)),
        *(num_rows, *sizes, width),
        SCALE=factor,
        ACTIVATION=activation,
        PRECISION=configs.product_precision(arithmetic),
    )
    grad_scale = products.sum().view(1) if scale is not None else pooled.new_empty(0)
    return grad_pooled, grad_hidden, means, sums.sum(dim=0), grad_scale


def _empty_gradients(
    pooled: Tensor, scale: Tensor | None, hidden: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (
        pooled.shape,
        hidden.shape,
        statistics.shape,
        pooled.shape[1:2],
        (0 if scale is None else 1,),
    )
    return tuple(torch.empty(shape, dtype=pooled.dtype, device=pooled.device) for shape in shapes)


@_backward_rows.register_fake
def _(
    grad_prompts: Tensor,
    pooled: Tensor,
    bias: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    scale: Tensor | None,
    channel_mask: Tensor | None,
    feature_mask: Tensor | None,
    norm_weight: Tensor | None,
    hidden: Tensor,
    statistics: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(pooled, scale, hidden, statistics)


@torch.library.custom_op("vapt_fast::prompt_projector_backward_weights", mutates_args=())
def _backward_weights(
    grad_prompts: Tensor,
    pooled: Tensor,
    bias: Tensor,
    up: Tensor,
    scale: Tensor | None,
    channel_mask: Tensor | None,
    feature_mask: Tensor | None,
    norm_weight: Tensor | None,
    hidden: Tensor,
    grad_hidden: Tensor,
    statistics: Tensor,
    means: Tensor,
    factor: float,
    activation: str,
) -> Tensor:
    """(2, r, C): the gradient of down and, transposed, that of up."""
    batch, num_prompts, dim = pooled.shape
    width = up.shape[1]
    arithmetic = _arithmetic(pooled, grad_prompts.dtype)
    config = configs.prompt_projector("weights_backward", arithmetic, width)
    images = configs.images_per_program(batch)
    chunks = triton.cdiv(batch, images)
    partial = torch.empty((chunks, 2, width, dim), dtype=pooled.dtype, device=pooled.device)
    masks = (_by_prompt(channel_mask, pooled), feature_mask)
    launch(
        kernels.weights_backward,
        config,
        chunks * num_blocks(config, BLOCK_C=dim),
        *(partial, *map(_strided, (grad_prompts, pooled, bias, up)), scale),
        *map(_strided, (*masks, norm_weight)),
        *(hidden, grad_hidden, *_mean_and_rstd(statistics), means if means.shape[0] else None),
        *(batch * num_prompts, num_prompts, dim, width, images * num_prompts),
        SCALE=factor,
        ACTIVATION=activation,
        PRECISION=configs.product_precision(arithmetic),
    )
    return add_chunks(partial)


@_backward_weights.register_fake
def _(grad_prompts: Tensor, pooled: Tensor, bias: Tensor, up: Tensor, *args: Any) -> Tensor:
    return torch.empty((2, up.shape[1], pooled.shape[2]), dtype=pooled.dtype, device=pooled.device)


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, ctx.factor, ctx.activation, _, _ = inputs
    _, hidden, statistics = output
    no_zeros(ctx, hidden, statistics)
    ctx.save_for_backward(*tensors, hidden, statistics)


def _backward(ctx: Any, grad_prompts: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_prompts is None:
        return (None,) * 13
    pooled, bias, down, up, *factors, hidden, statistics = ctx.saved_tensors
    scale, needed, options = factors[0], ctx.needs_input_grad, (ctx.factor, ctx.activation)
    grad_pooled, grad_hidden, means, grad_bias, grad_scale = _backward_rows(
        grad_prompts, pooled, bias, down, up, *factors, hidden, statistics, *options
    )
    grad_down = grad_up = None
    if needed[2] or needed[3]:
        grad_down, grad_up = _backward_weights(
            grad_prompts, pooled, bias, up, *factors, hidden, grad_hidden, statistics, means, *options
        ).unbind()
        grad_up = grad_up.t()
    if scale is None:
        grad_scale = None
    grads = (grad_pooled, grad_bias, grad_down, grad_up, grad_scale)
    return *differentiable_once("prompt_projector", *grads), *[None] * 8


_forward.register_autograd(_backward, setup_context=_setup_context)
