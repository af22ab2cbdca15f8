"""prompt_projector on Triton: the launches of vapt_fast.kernels.prompt_projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import prompt_projector as kernels
from ...kernels import prompt_projector_in_registers as in_registers
from ..base import empty_like
from ..checks import KERNEL_DTYPES, unsupported_dtypes
from ..triton_launch import (
    Config,
    images_per_program,
    launch,
    num_blocks,
    product_precision,
    strided,
    sum_chunks,
)
from . import tuning
from .op import Arguments, Gradients, Outputs, Saved

__all__ = ["backward", "forward", "unsupported_reasons"]


def unsupported_reasons(args: Arguments) -> list[str]:
    """Every reason why the kernels can't take ``args``."""
    reasons = unsupported_dtypes(norm_weight=args.norm_weight, norm_bias=args.norm_bias)
    reasons += unsupported_dtypes((torch.float32, torch.float64), pooled=args.pooled)
    if args.dtype not in KERNEL_DTYPES:
        reasons.append(f"dtype must be float16, bfloat16, float32 or float64, got {args.dtype}")
    if args.down is not None and args.down.shape[-2] > tuning.LARGEST_PROJECTOR:
        reasons.append(f"down must have at most {tuning.LARGEST_PROJECTOR} rows, got {args.down.shape[-2]}")
    return reasons


def forward(args: Arguments, out: Outputs) -> None:
    """Write prompts, hidden features, and mean and rstd."""
    (_, _, dim, width), arithmetic = _sizes(args), _arithmetic(args.pooled, args.dtype)
    config = tuning.config("fwd", arithmetic, width, dim, args.activation)
    _launch_by_rows(
        (kernels.prompt_projector_fwd_kernel, in_registers.prompt_projector_fwd_in_registers_kernel),
        config,
        args,
        arithmetic,
        *(out.prompts, out.hidden, *_mean_and_rstd(out.statistics)),
        *_learned(args, config),
        *_masks(args),
        *map(strided, (args.norm_weight, args.norm_bias)),
        EPS=args.eps,
    )


def backward(saved: Saved, grad_results: tuple[Tensor], grads: Gradients) -> None:
    """Write the gradients of pooled and of all that is learned."""
    (grad_prompts,), pooled, statistics = grad_results, saved.pooled, _mean_and_rstd(saved.statistics)
    (_, _, dim, width), arithmetic = _sizes(saved), _arithmetic(pooled, grad_prompts.dtype)
    grad_hidden = empty_like(saved.hidden)
    means = empty_like(saved.statistics) if saved.statistics.shape[0] else None
    sums = grads.bias if saved.bias.ndim == 2 else pooled.new_empty(pooled.shape[:2])
    products = None if saved.scale is None else pooled.new_empty(pooled.shape[:2])
    config = tuning.config("bwd_rows", arithmetic, width, dim, saved.activation)
    _launch_by_rows(
        (
            kernels.prompt_projector_bwd_rows_kernel,
            in_registers.prompt_projector_bwd_rows_in_registers_kernel,
        ),
        config,
        saved,
        arithmetic,
        *(grads.pooled, grad_hidden, means, sums, products),
        *(strided(grad_prompts), *_learned(saved, config), *_masks(saved), strided(saved.norm_weight)),
        *(saved.hidden, *statistics),
    )
    if sums is not grads.bias:
        torch.sum(sums, dim=0, out=grads.bias)
    if grads.scale is not None and products is not None:
        grads.scale.copy_(products.sum() if grads.scale.shape[0] == 1 else products.sum(dim=1))
    if grads.weights is not None:
        kept = (saved.hidden, grad_hidden, *statistics, means)
        _write_grad_weights(saved, grad_prompts, kept, grads.weights)


def _launch_by_rows(
    forms: tuple[Any, Any],
    config: Config,
    args: Arguments | Saved,
    arithmetic: torch.dtype,
    *given: Any,
    **constants: Any,
) -> None:
    """Run one of two kernels that go over the rows: the general one, or that with the rows in registers."""
    num_rows, num_prompts, dim, width = _sizes(args)
    constants |= {"SCALE": args.factor, "ACTIVATION": args.activation, "BY_IMAGE": _by_image(args)}
    if _in_registers(config):
        numbers: tuple[int, ...] = (num_rows, num_prompts)
        constants |= {"DIM": dim, "CHUNKS": num_blocks(config, BLOCK_C=dim), "WIDTH": width}
    else:
        numbers = (num_rows, num_prompts, dim, width)
        constants["PRECISION"] = product_precision(arithmetic)
    kernel = forms[_in_registers(config)]
    launch(kernel, config, _num_row_blocks(args, config), *given, *numbers, **constants)


def _write_grad_weights(saved: Saved, grad_prompts: Tensor, kept: tuple, grad_weights: Tensor) -> None:
    """Write the gradients of down and up, from what the kernels before have ``kept``."""
    sizes, arithmetic = _sizes(saved), _arithmetic(saved.pooled, grad_prompts.dtype)
    _, num_prompts, dim, width = sizes
    config = tuning.config("bwd_weights", arithmetic, width, dim, saved.activation)
    batch = saved.pooled.shape[0]
    images = 1 if _by_image(saved) else images_per_program(batch)
    partial = grad_weights
    if not _by_image(saved):
        partial = grad_weights.new_empty((-(-batch // images), *grad_weights.shape))
    pooled, bias, _, up, scale = _learned(saved, config)
    launch(
        kernels.prompt_projector_bwd_weights_kernel,
        config,
        partial.shape[0] * num_blocks(config, BLOCK_C=dim),
        *(partial, strided(grad_prompts), pooled, bias, up, scale),
        *(*_masks(saved), strided(saved.norm_weight)),
        *(*kept, *sizes, images * num_prompts),
        SCALE=saved.factor,
        ACTIVATION=saved.activation,
        PRECISION=product_precision(arithmetic),
        BY_IMAGE=_by_image(saved),
    )
    if partial is not grad_weights:
        sum_chunks(partial, out=grad_weights)


def _in_registers(config: Config) -> bool:
    """Whether rows stay in registers: a product of a tensor core has 16 of them."""
    return config.blocks["BLOCK_ROWS"] < 16


def _learned(args: Arguments | Saved, config: Config) -> tuple:
    """pooled, bias, down, up and scale; a scale of all images without a stride."""
    scale, up = args.scale, args.up
    of_all = scale is not None and scale.shape[0] == 1
    if up is not None and _in_registers(config):
        up = up.mT.contiguous()
    weights = map(strided, (args.pooled, args.bias, args.down, up))
    return *weights, (scale,) if of_all else strided(scale)


def _by_image(args: Arguments | Saved) -> bool:
    """Whether each image has a projector of its own, so that the rows of a program are of one image."""
    return args.down is not None and args.down.ndim == 3


def _num_row_blocks(args: Arguments | Saved, config: Config) -> int:
    """How many programs take all rows."""
    batch, num_prompts, _ = args.pooled.shape
    if _by_image(args):
        return batch * num_blocks(config, BLOCK_ROWS=num_prompts)
    return num_blocks(config, BLOCK_ROWS=batch * num_prompts)


def _masks(args: Arguments | Saved) -> tuple:
    """The masks (B, P, C) and (B, P, r), the first one without copying."""
    channels = None if args.channel_mask is None else args.channel_mask.expand(args.pooled.shape)
    return strided(channels), strided(args.feature_mask)


def _arithmetic(pooled: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that says how products are computed, for prompts of ``dtype``."""
    return pooled.dtype if pooled.dtype == torch.float64 else dtype


def _sizes(args: Arguments | Saved) -> tuple[int, int, int, int]:
    """B * P, P, C and r."""
    batch, num_prompts, dim = args.pooled.shape
    return batch * num_prompts, num_prompts, dim, 0 if args.down is None else args.down.shape[-2]


def _mean_and_rstd(statistics: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if not statistics.shape[0]:
        return None, None
    mean, rstd = statistics.unbind()
    return mean, rstd
