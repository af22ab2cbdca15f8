"""prompt_projector on Triton: the launches of vapt_fast.kernels.prompt_projector."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import prompt_projector as kernels
from ..base import empty_like
from ..checks import KERNEL_DTYPES, unsupported_dtypes
from ..triton_launch import images_per_program, launch, num_blocks, product_precision, strided, sum_chunks
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
    if (
        args.bias.ndim == 2
        or (args.down is not None and args.down.ndim == 3)
        or (args.scale is not None and args.scale.shape[0] != 1)
    ):
        reasons.append("bias, down, up and scale must be those of all images, got one for each image")
    return reasons


def forward(args: Arguments, out: Outputs) -> None:
    """Write prompts, hidden features, and mean and rstd."""
    num_rows, *sizes = _sizes(args)
    arithmetic = _arithmetic(args.pooled, args.dtype)
    config = tuning.config("fwd", arithmetic, sizes[-1])
    launch(
        kernels.prompt_projector_fwd_kernel,
        config,
        num_blocks(config, BLOCK_ROWS=num_rows),
        *(out.prompts, out.hidden, *_mean_and_rstd(out.statistics)),
        *_learned(args),
        *_masks(args),
        *map(strided, (args.norm_weight, args.norm_bias)),
        *(num_rows, *sizes),
        SCALE=args.factor,
        ACTIVATION=args.activation,
        EPS=args.eps,
        PRECISION=product_precision(arithmetic),
    )


def backward(saved: Saved, grad_results: tuple[Tensor], grads: Gradients) -> None:
    """Write the gradients of pooled and of all that is learned."""
    (grad_prompts,), pooled = grad_results, saved.pooled
    num_rows, num_prompts, dim, width = _sizes(saved)
    arithmetic = _arithmetic(pooled, grad_prompts.dtype)
    options = {
        "SCALE": saved.factor,
        "ACTIVATION": saved.activation,
        "PRECISION": product_precision(arithmetic),
    }
    statistics = _mean_and_rstd(saved.statistics)
    grad_hidden = empty_like(saved.hidden)
    means = empty_like(saved.statistics) if saved.statistics.shape[0] else None
    sums = pooled.new_empty(pooled.shape[:2])
    products = None if saved.scale is None else empty_like(sums)
    config = tuning.config("bwd_rows", arithmetic, width)
    launch(
        kernels.prompt_projector_bwd_rows_kernel,
        config,
        num_blocks(config, BLOCK_ROWS=num_rows),
        *(grads.pooled, grad_hidden, means, sums, products),
        *(strided(grad_prompts), *_learned(saved), *_masks(saved), strided(saved.norm_weight)),
        *(saved.hidden, *statistics),
        *(num_rows, num_prompts, dim, width),
        **options,
    )
    torch.sum(sums, dim=0, out=grads.bias)
    if grads.scale is not None and products is not None:
        grads.scale.copy_(products.sum())
    if grads.weights is None:
        return
    config = tuning.config("bwd_weights", arithmetic, width)
    batch = pooled.shape[0]
    images = images_per_program(batch)
    partial = pooled.new_empty((-(-batch // images), *grads.weights.shape))
    launch(
        kernels.prompt_projector_bwd_weights_kernel,
        config,
        partial.shape[0] * num_blocks(config, BLOCK_C=dim),
        *(partial, *map(strided, (grad_prompts, pooled, saved.bias, saved.up)), saved.scale),
        *(*_masks(saved), strided(saved.norm_weight)),
        *(saved.hidden, grad_hidden, *statistics, means),
        *(num_rows, num_prompts, dim, width, images * num_prompts),
        **options,
    )
    sum_chunks(partial, out=grads.weights)


def _learned(args: Arguments | Saved) -> tuple:
    return *map(strided, (args.pooled, args.bias, args.down, args.up)), args.scale


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
    return batch * num_prompts, num_prompts, dim, 0 if args.down is None else args.down.shape[0]


def _mean_and_rstd(statistics: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if not statistics.shape[0]:
        return None, None
    mean, rstd = statistics.unbind()
    return mean, rstd
