"""prompt_pool on Triton: the launches of vapt_fast.kernels.prompt_pool, and of add_norm's forward."""

from __future__ import annotations

import torch
import triton
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
    (batch, num_tokens, dim), num_rows = x.shape, matrix.shape[-2]
    norm = (args.norm_weight, args.norm_bias, args.eps)
    launch_forward(x, args.branch, args.layer_scale, *norm, out.total, out.normed, out.mean, out.rstd)
    tokens = x if args.branch is None else out.total
    halves = _halves(tokens, matrix)
    weights = _empty_weights(tokens, matrix)
    shift = matrix.new_empty((batch, num_rows)) if halves else None
    row_sums = _write_weights(args, tokens, out.mean, out.rstd, weights, shift)
    config = tuning.config("fwd", matrix.dtype, tokens.dtype, num_rows)
    launch(
        kernels.prompt_pool_fwd_kernel,
        config,
        batch * num_blocks(config, BLOCK_R=num_rows, BLOCK_C=dim),
        *(strided(tokens), weights, shift, row_sums, strided(args.weight), strided(args.bias)),
        *(out.mean, out.pooled, out.raw, num_tokens, weights.shape[-1], dim, num_rows, args.num_prefix),
        PRECISION=product_precision(args.dtype),
        HALVES=halves,
    )


def backward(saved: Saved, grad_results: tuple[Tensor | None, ...], grads: Gradients) -> None:
    """Write the gradients that are needed: of the tokens, which are often frozen, and of what is learned."""
    total, norm = saved.total, (saved.mean, saved.rstd)
    grad_total, grad_normed, grad_pooled = incoming_gradients(saved, grad_results)
    of_tokens = grads.x is not None or grads.branch is not None
    weights = _empty_weights(total, saved.matrix) if of_tokens else None
    row_sums = _write_weights(saved, total, *norm, weights, None)
    factor, sums = _write_grads(saved, grad_pooled, row_sums, grads.affine)
    means = _write_products(saved, grad_normed if of_tokens else None, factor, sums, grads.matrix)
    if weights is not None and means is not None:
        _write_grad_tokens(saved, (grad_total, grad_normed), weights, factor, means, grads)


def _write_weights(
    args: Arguments | Saved,
    tokens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weights: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """``weights`` and ``shift`` as the kernel has them, where given; return the sums of M's rows (B, R)."""
    matrix = args.matrix
    (batch, num_tokens, _), num_rows = tokens.shape, matrix.shape[-2]
    row_sums = matrix.new_empty((batch, num_rows))
    config = tuning.config("weights", matrix.dtype, tokens.dtype, num_rows)
    launch(
        kernels.prompt_pool_weights_kernel,
        config,
        batch * num_blocks(config, BLOCK_R=num_rows),
        *(strided(matrix), mean, rstd, weights, shift, row_sums),
        *(num_tokens, _num_columns(num_tokens), num_rows, args.num_prefix),
        EPS=args.eps,
        PROMPT_EPS=args.prompt_eps,
        HALVES=_halves(tokens, matrix),
    )
    return row_sums


def _write_grads(
    saved: Saved, grad_pooled: Tensor, row_sums: Tensor, grad_affine: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The factor grad_pooled * weight and sums, as the kernel has them; and ``grad_affine``, where given."""
    matrix = saved.matrix
    (batch, num_rows, dim), halves = grad_pooled.shape, _halves(saved.total, matrix)
    config = tuning.config("bwd_grads", matrix.dtype, saved.total.dtype, num_rows)
    blocks = num_blocks(config, BLOCK_C=dim)
    factor = _empty_factor((batch, num_rows), dim, matrix, halves)
    sums = matrix.new_empty((batch, blocks, 2, num_rows))
    by_image = saved.weight.ndim == 2
    partial = grad_affine if grad_affine is None or by_image else matrix.new_empty((batch, 2, dim))
    launch(
        kernels.prompt_pool_bwd_grads_kernel,
        config,
        batch * blocks,
        *(strided(grad_pooled), saved.raw, row_sums, strided(saved.weight), strided(saved.bias)),
        *(factor, sums, partial, dim, num_rows),
        HALVES=halves,
    )
    if partial is not None and not by_image:
        sum_chunks(partial, out=grad_affine)
    return factor, sums


def _write_products(
    saved: Saved, grad_normed: Tensor | None, factor: Tensor, sums: Tensor, grad_matrix: Tensor | None
) -> Tensor | None:
    """The means (2, B, T) for the gradients of the tokens, given ``grad_normed``; and ``grad_matrix``."""
    total, matrix = saved.total, saved.matrix
    (batch, num_tokens, dim), num_rows = total.shape, matrix.shape[-2]
    means = None if grad_normed is None else matrix.new_empty((2, batch, num_tokens))
    by_image = matrix.ndim == 3
    partial = grad_matrix if grad_matrix is None or by_image else matrix.new_empty((batch, *matrix.shape))
    config = tuning.config("bwd_products", matrix.dtype, total.dtype, num_rows)
    launch(
        kernels.prompt_pool_bwd_products_kernel,
        config,
        batch * num_blocks(config, BLOCK_T=num_tokens),
        *map(strided, (total, grad_normed, matrix, saved.norm_weight)),
        *(saved.mean, saved.rstd, factor, sums, means, partial),
        *(batch, num_tokens, dim, num_rows, saved.num_prefix, sums.shape[1]),
        EPS=saved.eps,
        PROMPT_EPS=saved.prompt_eps,
        PRECISION=product_precision(saved.dtype),
        HALVES=_halves(total, matrix),
        BLOCKS=triton.next_power_of_2(sums.shape[1]),
    )
    if partial is not None and not by_image:
        sum_chunks(partial, out=grad_matrix)
    return means


def _write_grad_tokens(
    saved: Saved,
    incoming: tuple[Tensor | None, Tensor],
    weights: Tensor,
    factor: Tensor,
    means: Tensor,
    grads: Gradients,
) -> None:
    total, matrix = saved.total, saved.matrix
    (batch, num_tokens, dim), num_rows = total.shape, matrix.shape[-2]
    config = tuning.config("bwd_tokens", matrix.dtype, total.dtype, num_rows)
    launch(
        kernels.prompt_pool_bwd_tokens_kernel,
        config,
        batch * num_blocks(config, BLOCK_T=num_tokens, BLOCK_C=dim),
        *map(strided, (total, *incoming, saved.norm_weight, saved.layer_scale)),
        *(saved.mean, saved.rstd, weights, factor, means, grads.x, grads.branch),
        *(batch, num_tokens, weights.shape[-1], dim, num_rows),
        PRECISION=product_precision(saved.dtype),
        HALVES=_halves(total, matrix),
    )


def _empty_weights(tokens: Tensor, matrix: Tensor) -> Tensor:
    """(B, R, T') in M's dtype or (B, R, 2, T') in bfloat16; rows of whole 32 bytes are loaded at once."""
    batch, num_tokens, _ = tokens.shape
    rows = (batch, matrix.shape[-2])
    return _empty_factor(rows, _num_columns(num_tokens), matrix, _halves(tokens, matrix))


def _empty_factor(rows: tuple[int, int], size: int, matrix: Tensor, halves: bool) -> Tensor:
    if halves:
        return matrix.new_empty((*rows, 2, size), dtype=torch.bfloat16)
    return matrix.new_empty((*rows, size))


def _num_columns(num_tokens: int) -> int:
    return -(-num_tokens // 16) * 16


def _halves(tokens: Tensor, matrix: Tensor) -> bool:
    """Whether the factors of products are in bfloat16, in halves where they were not; see the kernels."""
    return tokens.dtype == torch.bfloat16 and matrix.dtype == torch.float32
