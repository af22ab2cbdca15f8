"""absorbed_attention on Triton: the launches, as ops that autograd, torch.compile and torch.export know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...kernels import absorbed_attention as kernels
from .._autograd import differentiable_once, no_zeros, refuse_forward_mode
from .._why_not import why_not_dtypes
from . import configs
from ._launch import add_chunks, launch, num_blocks

__all__ = ["absorbed_attention", "why_not_absorbed_attention"]


def absorbed_attention(
    q: Tensor,
    x: Tensor,
    prompts: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """See vapt_fast.functional.absorbed_attention."""
    tensors = (q, x, prompts, key_weight, value_weight, bias)
    refuse_forward_mode("absorbed_attention", *(t for t in tensors if t is not None))
    _, rows, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries = torch.einsum("brhd,hdc->bhrc", q.to(dtype) * scale, key_weight.to(dtype)).flatten(1, 2)
        if bias is not None:
            bias = bias.expand(1, heads, rows, -1).flatten(1, 2)
        y = _forward(queries, x, prompts, bias)[0]
        out = torch.einsum("bhrc,hdc->brhd", y.unflatten(1, (heads, rows)), value_weight.to(dtype))
    return out.to(q.dtype)


def why_not_absorbed_attention(q: Tensor, x: Tensor, prompts: Tensor, *_: Any) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    return why_not_dtypes(q=q, x=x, prompts=prompts)


def _strided(tensor: Tensor, batch: int) -> tuple[Tensor | int, ...]:
    """(B or 1, *, C) as the kernels take it, with the strides of B = ``batch``."""
    return (tensor, *tensor.expand(batch, -1, -1).stride())


def _arithmetic(queries: Tensor, x: Tensor) -> torch.dtype:
    """The dtype that says how products are computed."""
    return queries.dtype if queries.dtype == torch.float64 else x.dtype


# ---- each kernel's launch


def _inner_products(queries: Tensor, x: Tensor, prompts: Tensor) -> Tensor:
    """(B, M, P + T), of queries (B, M, C) with rows."""
    (batch, num_queries, dim), num_prompts = queries.shape, prompts.shape[1]
    num_keys = num_prompts + x.shape[1]
    arithmetic = _arithmetic(queries, x)
    config = configs.absorbed_attention(arithmetic, num_queries)
    products = torch.empty((batch, num_queries, num_keys), dtype=queries.dtype, device=x.device)
    launch(
        kernels.scores,
        config,
        batch * num_blocks(config, BLOCK_M=num_queries, BLOCK_K=num_keys),
        *(products, *(_strided(t, batch) for t in (queries, prompts, x))),
        *(num_queries, num_prompts, num_keys, dim),
        PRECISION=configs.product_precision(arithmetic),
    )
    return products


def _weighted_sums(weights: Tensor, x: Tensor, prompts: Tensor) -> Tensor:
    """(B, M, C), of rows with weights (B, M, P + T)."""
    batch, num_queries, num_keys = weights.shape
    dim = x.shape[2]
    arithmetic = _arithmetic(weights, x)
    config = configs.absorbed_attention(arithmetic, num_queries)
    sums = torch.empty((batch, num_queries, dim), dtype=weights.dtype, device=x.device)
    launch(
        kernels.weighted_sums,
        config,
        batch * num_blocks(config, BLOCK_M=num_queries, BLOCK_C=dim),
        *(sums, weights, *(_strided(t, batch) for t in (prompts, x))),
        *(num_queries, prompts.shape[1], num_keys, dim),
        PRECISION=configs.product_precision(arithmetic),
    )
    return sums


# ---- forward


@torch.library.custom_op("vapt_fast::absorbed_attention", mutates_args=())
def _forward(queries: Tensor, x: Tensor, prompts: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, M, C) and p (B, M, P + T) of queries (B, M, C), in their dtype; bias (1, M, T)."""
    scores = _inner_products(queries, x, prompts)
    if bias is not None:
        scores[..., prompts.shape[1] :] += bias
    p = scores.softmax(dim=-1)
    return _weighted_sums(p, x, prompts), p


@_forward.register_fake
def _(queries: Tensor, x: Tensor, prompts: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    p_shape = (*queries.shape[:2], prompts.shape[1] + x.shape[1])
    return torch.empty(queries.shape, dtype=queries.dtype, device=x.device), queries.new_empty(p_shape)


# ---- backward: an op for each gradient, since often only some of them are needed


@torch.library.custom_op("vapt_fast::absorbed_attention_grad_scores", mutates_args=())
def _grad_scores(grad_y: Tensor, x: Tensor, prompts: Tensor, p: Tensor) -> Tensor:
    """(B, M, P + T)."""
    grad_p = _inner_products(grad_y, x, prompts)
    return torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)


@_grad_scores.register_fake
def _(grad_y: Tensor, x: Tensor, prompts: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(p)


@torch.library.custom_op("vapt_fast::absorbed_attention_grad_queries", mutates_args=())
def _grad_queries(grad_scores: Tensor, x: Tensor, prompts: Tensor) -> Tensor:
    """(B, M, C)."""
    return _weighted_sums(grad_scores, x, prompts)


@_grad_queries.register_fake
def _(grad_scores: Tensor, x: Tensor, prompts: Tensor) -> Tensor:
    return grad_scores.new_empty((*grad_scores.shape[:2], x.shape[2]))


@torch.library.custom_op("vapt_fast::absorbed_attention_grad_rows", mutates_args=())
def _grad_rows(
    rows: Tensor, first_key: int, grad_scores: Tensor, p: Tensor, queries: Tensor, grad_y: Tensor
) -> Tensor:
    """The gradient of ``rows``, x or prompts, which are the keys from ``first_key`` on."""
    batch, num_queries, num_keys = p.shape
    _, num_rows, dim = rows.shape
    # The gradient of rows that all images share is summed over the images, in p's dtype.
    shared = rows.shape[0] != batch
    images = configs.images_per_program(batch) if shared else 1
    chunks = triton.cdiv(batch, images)
    dtype = p.dtype if shared else rows.dtype
    grad = torch.empty((chunks, num_rows, dim), dtype=dtype, device=rows.device)
    arithmetic = _arithmetic(queries, rows)
    config = configs.absorbed_attention(arithmetic, num_queries)
    launch(
        kernels.grad_rows,
        config,
        chunks * num_blocks(config, BLOCK_K=num_rows, BLOCK_C=dim),
        *(grad, grad_scores, p, _strided(queries, batch), _strided(grad_y, batch)),
        *(batch, num_queries, num_rows, num_keys, dim, first_key, images),
        PRECISION=configs.product_precision(arithmetic),
    )
    return add_chunks(grad).unsqueeze(0).to(rows.dtype) if shared else grad


@_grad_rows.register_fake
def _(rows: Tensor, *args: Any) -> Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    queries, x, prompts, bias = inputs
    _, p = output
    no_zeros(ctx, p)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(queries, x, prompts, p)


def _backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 4
    queries, x, prompts, p = ctx.saved_tensors
    needed, num_prompts = ctx.needs_input_grad, prompts.shape[1]
    grad_queries = grad_x = grad_prompts = grad_bias = None
    grad_scores = _grad_scores(grad_y, x, prompts, p)
    common = grad_scores, p, queries, grad_y
    if needed[0]:
        grad_queries = _grad_queries(grad_scores, x, prompts)
    if needed[1]:
        grad_x = _grad_rows(x, num_prompts, *common)
    if needed[2]:
        grad_prompts = _grad_rows(prompts, 0, *common)
    if needed[3]:
        grad_bias = grad_scores[..., num_prompts:].sum(dim=0, keepdim=True).to(ctx.bias_dtype)
    return differentiable_once("absorbed_attention", grad_queries, grad_x, grad_prompts, grad_bias)


_forward.register_autograd(_backward, setup_context=_setup_context)
