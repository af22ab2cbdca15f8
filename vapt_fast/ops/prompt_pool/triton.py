"""prompt_pool on Triton: the launches of vapt_fast.kernels.prompt_pool, and of add_norm's forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import prompt_pool as kernels
from ..add_norm.triton import launch_forward
from ..checks import unsupported_dtypes
from ..triton_launch import launch, num_blocks, product_precision, strided, sum_chunks
from . import tuning
from .op import Arguments, Gradients, Outputs, Saved, incoming_gradients

__all__ = ["backward", "forward", "unsupported_reasons"]


def unsupported_reasons(args: Arguments) -> list[str]:
    """Every reason why the kernels can't take ``args``."""
    reasons = unsupported_dtypes(
        x=args.x,
        branch=args.branch,
        layer_scale=args.layer_scale,
        norm_weight=args.norm_weight,
        norm_bias=args.norm_bias,
    )
    return reasons + unsupported_dtypes((torch.float32, torch.float64), matrix=args.matrix)


def forward(args: Arguments, out: Outputs) -> None:
    """Write all outputs."""
    x, matrix = args.x, args.matrix
    (batch, num_tokens, dim), num_rows = x.shape, matrix.shape[0]
    norm = (args.norm_weight, args.norm_bias, args.eps)
    launch_forward(x, args.branch, args.layer_scale, *norm, out.total, out.normed, out.mean, out.rstd)
    tokens = x if args.branch is None else out.total
    config = tuning.config("fwd", matrix.dtype, tokens.dtype, num_rows)
    launch(
        kernels.prompt_pool_fwd_kernel,
        config,
        batch * num_blocks(config, BLOCK_R=num_rows, BLOCK_C=dim),
        *map(strided, (tokens, matrix, args.weight, args.bias)),
        *(out.mean, out.rstd, out.pooled, out.raw, num_tokens, dim, num_rows, args.num_prefix),
        HALVES=_halves(tokens, matrix),
        **_constants(args),
    )


def backward(saved: Saved, grad_results: tuple[Tensor | None, ...], grads: Gradients) -> None:
    """Write the gradients that are needed: of the tokens, which are often frozen, and of what is learned."""
    incoming = incoming_gradients(saved, grad_results)
    of_tokens = grads.x is not None or grads.branch is not None
    means, partial = _write_products(saved, *incoming[1:], of_tokens, grads.matrix is not None)
    if means is not None:
        _write_grad_tokens(saved, incoming, means, grads)
    if partial is not None:
        sum_chunks(partial, out=grads.matrix)
        _write_grad_affine(saved, incoming[2], grads)


def _write_products(
    saved: Saved, grad_normed: Tensor, grad_pooled: Tensor, of_tokens: bool, of_matrix: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The means (2, B, T) for the gradients of the tokens, and the gradient of M by images (B, R, N)."""
    total, matrix = saved.total, saved.matrix
    (batch, num_tokens, dim), num_rows = total.shape, matrix.shape[0]
    means = saved.mean.new_empty((2, batch, num_tokens)) if of_tokens else None
    partial = matrix.new_empty((batch, *matrix.shape)) if of_matrix else None
    config = tuning.config("bwd_products", matrix.dtype, total.dtype, num_rows)
    launch(
        kernels.prompt_pool_bwd_products_kernel,
        config,
        batch * num_blocks(config, BLOCK_T=num_tokens),
        *map(strided, (total, grad_normed if of_tokens else None, grad_pooled)),
        *map(strided, (matrix, saved.weight, saved.bias, saved.norm_weight)),
        *(saved.mean, saved.rstd, means, partial),
        *(batch, num_tokens, dim, num_rows, saved.num_prefix),
        HALVES=_halves(total, matrix),
        **_constants(saved),
    )
    return means, partial


def _write_grad_tokens(
    saved: Saved, incoming: tuple[Tensor | None, Tensor, Tensor], means: Tensor, grads: Gradients
) -> None:
    total, matrix = saved.total, saved.matrix
    (batch, num_tokens, dim), num_rows = total.shape, matrix.shape[0]
    config = tuning.config("bwd_tokens", matrix.dtype, total.dtype, num_rows)
    launch(
        kernels.prompt_pool_bwd_tokens_kernel,
        config,
        batch * num_blocks(config, BLOCK_T=num_tokens, BLOCK_C=dim),
        *map(strided, (total, *incoming)),
        *map(strided, (matrix, saved.weight, saved.norm_weight, saved.layer_scale)),
        *(saved.mean, saved.rstd, means, grads.x, grads.branch),
        *(batch, num_tokens, dim, num_rows, saved.num_prefix),
        **_constants(saved),
    )


def _write_grad_affine(saved: Saved, grad_pooled: Tensor, grads: Gradients) -> None:
    matrix = saved.matrix
    batch, dim = saved.total.shape[0], saved.total.shape[-1]
    config = tuning.config("bwd_affine", matrix.dtype, saved.total.dtype, matrix.shape[0])
    partial = matrix.new_empty((batch, 2, dim))
    launch(
        kernels.prompt_pool_bwd_affine_kernel,
        config,
        batch * num_blocks(config, BLOCK_C=dim),
        *map(strided, (grad_pooled, matrix)),
        *(saved.raw, partial, dim, *matrix.shape),
    )
    sum_chunks(partial, out=grads.affine)


def _halves(tokens: Tensor, matrix: Tensor) -> bool:
    """Whether products are made of two halves in bfloat16, see the kernels."""
    return tokens.dtype == torch.bfloat16 and matrix.dtype == torch.float32


def _constants(args: Arguments | Saved) -> dict[str, float | str]:
    return {"EPS": args.eps, "PROMPT_EPS": args.prompt_eps, "PRECISION": product_precision(args.dtype)}
