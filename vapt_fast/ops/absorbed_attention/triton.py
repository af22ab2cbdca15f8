"""absorbed_attention on Triton: the launches of vapt_fast.kernels.absorbed_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels import absorbed_attention as kernels
from ..checks import unsupported_dtypes
from ..triton_launch import (
    Strided,
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
    return unsupported_dtypes(x=args.x, prompts=args.prompts)


def forward(args: Arguments, out: Outputs) -> None:
    """Write y and p."""
    scores, lengths = torch.empty_like(out.p), strided(args.prompt_lengths)
    _write_products(scores, args.u, args.x, args.prompts, lengths, -math.inf)
    if args.bias is not None:
        scores[..., args.prompts.shape[1] :] += args.bias
    torch.softmax(scores, dim=-1, out=out.p)
    _write_sums(out.y, out.p, args.x, args.prompts, lengths)


def backward(saved: Saved, grad_results: tuple[Tensor], grads: Gradients) -> None:
    """Write the gradients that are needed."""
    u, x, prompts, p, prompt_lengths = saved
    (grad_y,) = grad_results
    grad_p, lengths = torch.empty_like(p), strided(prompt_lengths)
    _write_products(grad_p, grad_y, x, prompts, lengths, 0.0)
    grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
    num_prompts = prompts.shape[1]
    if grads.u is not None:
        _write_sums(grads.u, grad_scores, x, prompts, lengths)
    if grads.x is not None:
        _write_grad_rows(grads.x, num_prompts, None, grad_scores, p, u, grad_y)
    if grads.prompts is not None:
        _write_grad_rows(grads.prompts, 0, lengths, grad_scores, p, u, grad_y)
    if grads.bias is not None:
        torch.sum(grad_scores[..., num_prompts:], dim=0, keepdim=True, out=grads.bias)


def _arithmetic(u: Tensor, x: Tensor) -> torch.dtype:
    """The dtype that says how products are computed."""
    return u.dtype if u.dtype == torch.float64 else x.dtype


def _write_products(
    products: Tensor, u: Tensor, x: Tensor, prompts: Tensor, lengths: Strided | None, padding: float
) -> None:
    """The inner products (B, M, P + T) of u (B, M, C) with the rows of prompts and x.

    Those with prompts that do not exist are ``padding``.
    """
    (batch, num_queries, dim), num_keys = u.shape, products.shape[-1]
    arithmetic = _arithmetic(u, x)
    config = tuning.config("scores", arithmetic, num_queries)
    launch(
        kernels.absorbed_attention_scores_kernel,
        config,
        batch * num_blocks(config, BLOCK_M=num_queries, BLOCK_K=num_keys),
        *(products, *(strided(t, batch) for t in (u, prompts, x)), lengths),
        *(num_queries, prompts.shape[1], num_keys, dim),
        PADDING=0.0 if lengths is None else padding,
        PRECISION=product_precision(arithmetic),
    )


def _write_sums(sums: Tensor, weights: Tensor, x: Tensor, prompts: Tensor, lengths: Strided | None) -> None:
    """The sums (B, M, C) of the rows of prompts and x, with weights (B, M, P + T)."""
    (batch, num_queries, num_keys), dim = weights.shape, x.shape[2]
    arithmetic = _arithmetic(weights, x)
    config = tuning.config("sums", arithmetic, num_queries)
    launch(
        kernels.absorbed_attention_sums_kernel,
        config,
        batch * num_blocks(config, BLOCK_M=num_queries, BLOCK_C=dim),
        *(sums, weights, *(strided(t, batch) for t in (prompts, x)), lengths),
        *(num_queries, prompts.shape[1], num_keys, dim),
        PRECISION=product_precision(arithmetic),
    )


def _write_grad_rows(
    grad: Tensor,
    first_key: int,
    lengths: Strided | None,
    grad_scores: Tensor,
    p: Tensor,
    u: Tensor,
    grad_y: Tensor,
) -> None:
    """The gradient of x or of prompts, which are the keys from ``first_key`` on."""
    batch, num_queries, num_keys = p.shape
    _, num_rows, dim = grad.shape
    # The gradient of rows that all images share is summed over the images, in p's dtype.
    shared = grad.shape[0] != batch
    images = images_per_program(batch) if shared else 1
    chunks = -(-batch // images)
    partial = torch.empty((chunks, num_rows, dim), dtype=p.dtype, device=p.device) if shared else grad
    arithmetic = _arithmetic(u, grad)
    config = tuning.config("bwd_rows", arithmetic, num_queries)
    launch(
        kernels.absorbed_attention_bwd_rows_kernel,
        config,
        chunks * num_blocks(config, BLOCK_K=num_rows, BLOCK_C=dim),
        *(partial, grad_scores, p, strided(u, batch), strided(grad_y, batch), lengths),
        *(batch, num_queries, num_rows, num_keys, dim, first_key, images),
        PRECISION=product_precision(arithmetic),
    )
    if shared:
        grad.copy_(sum_chunks(partial))
