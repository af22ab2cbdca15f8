"""prompt_pool on Triton: the launches of vapt_fast.kernels.prompt_pool, and of add_norm's forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import prompt_pool as kernels
from ..add_norm.triton import launch_forward
from ..checks import unsupported_dtypes
from ..triton_launch import images_per_program, launch, num_blocks, product_precision, strided, sum_chunks
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
    config = tuning.configs(matrix.dtype, num_rows).fwd
    launch(
        kernels.prompt_pool_fwd_kernel,
        config,
        batch * num_blocks(config, BLOCK_R=num_rows, BLOCK_C=dim),
        *map(strided, (x if args.branch is None else out.total, matrix, args.weight, args.bias)),
        *(out.mean, out.rstd, out.pooled, out.raw, num_tokens, dim, num_rows, args.num_prefix),
        **_constants(args),
    )


def backward(saved: Saved, grad_results: tuple[Tensor | None, ...], grads: Gradients) -> None:
    """Write the gradients that are needed: of the tokens, which are often frozen, and of what is learned."""
    incoming = incoming_gradients(saved, grad_results)
    if grads.x is not None or grads.branch is not None:
        _write_grad_tokens(saved, incoming, grads)
    if grads.matrix is not None:
        _write_grad_learned(saved, incoming[2], grads)


def _write_grad_tokens(
    saved: Saved, incoming: tuple[Tensor | None, Tensor, Tensor], grads: Gradients
) -> None:
    total, matrix = saved.total, saved.matrix
    (batch, num_tokens, dim), num_rows = total.shape, matrix.shape[0]
    config = tuning.configs(matrix.dtype, num_rows).bwd_tokens
    launch(
        kernels.prompt_pool_bwd_tokens_kernel,
        config,
        batch * num_blocks(config, BLOCK_T=num_tokens),
        *map(strided, (total, *incoming)),
        *map(strided, (matrix, saved.weight, saved.norm_weight, saved.layer_scale)),
        *(saved.mean, saved.rstd, grads.x, grads.branch, num_tokens, dim, num_rows, saved.num_prefix),
        **_constants(saved),
    )


def _write_grad_learned(saved: Saved, grad_pooled: Tensor, grads: Gradients) -> None:
    total, matrix = saved.total, saved.matrix
    (batch, num_tokens, dim), (num_rows, num_patches) = total.shape, matrix.shape
    configs = tuning.configs(matrix.dtype, num_rows)
    images = images_per_program(batch)
    chunks = -(-batch // images)
    partial_matrix = matrix.new_empty((chunks, num_rows, num_patches))
    partial_affine = matrix.new_empty((chunks, 2, dim))
    launch(
        kernels.prompt_pool_bwd_matrix_kernel,
        configs.bwd_matrix,
        chunks * num_blocks(configs.bwd_matrix, BLOCK_R=num_rows, BLOCK_N=num_patches),
        *map(strided, (total, grad_pooled, saved.weight, saved.bias)),
        *(saved.mean, saved.rstd, partial_matrix),
        *(batch, num_tokens, dim, num_rows, saved.num_prefix, images),
        **_constants(saved),
    )
    launch(
        kernels.prompt_pool_bwd_affine_kernel,
        configs.bwd_affine,
        chunks * num_blocks(configs.bwd_affine, BLOCK_C=dim),
        *map(strided, (grad_pooled, matrix)),
        *(saved.raw, partial_affine, batch, dim, num_rows, num_patches, images),
    )
    sum_chunks(partial_matrix, out=grads.matrix)
    sum_chunks(partial_affine, out=grads.affine)


def _constants(args: Arguments | Saved) -> dict[str, float | str]:
    return {"EPS": args.eps, "PROMPT_EPS": args.prompt_eps, "PRECISION": product_precision(args.dtype)}
