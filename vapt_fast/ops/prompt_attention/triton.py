"""prompt_attention on Triton: the launches of vapt_fast.kernels.prompt_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import prompt_attention as kernels
from ..checks import unsupported_mixture
from ..triton_launch import STRIDE_LIMIT, launch, num_blocks
from . import tuning
from .op import Arguments, Gradients, Outputs, Saved

__all__ = ["backward", "forward", "unsupported_reasons"]


def unsupported_reasons(args: Arguments) -> list[str]:
    """Every reason why the kernels can't take ``args``."""
    reasons = unsupported_mixture(args.q, args.k, args.v, args.prompt_k, args.prompt_v)
    if not 1 <= args.q.shape[-1] <= tuning.LARGEST_HEAD:
        reasons.append(f"heads must have 1 to {tuning.LARGEST_HEAD} channels, got {args.q.shape[-1]}")
    return reasons


def forward(args: Arguments, out: Outputs) -> None:
    """Write out and lse."""
    _launch_by_queries(kernels.prompt_attention_fwd_kernel, "fwd", (out.lse,), out.out, args)


def backward(saved: Saved, grad_results: tuple[Tensor], grads: Gradients) -> None:
    """Write the gradients of queries, keys and values, of tokens and prompts, that are needed."""
    args, (grad_out,) = Arguments._make(saved[2:]), grad_results
    row_dot = _row_dot(saved.out, saved.lse, grad_out)
    statistics = (saved.lse, row_dot)
    if grads.q is not None:
        kernel = kernels.prompt_attention_bwd_queries_kernel
        _launch_by_queries(kernel, "bwd_queries", statistics, grads.q, args, grad_out)
    if grads.k is not None and grads.v is not None:
        own = (args.k, args.v, args.bias)
        _launch_by_keys((grads.k, grads.v), grad_out, statistics, args, *own)
    if grads.prompt_k is not None and grads.prompt_v is not None:
        prompts = (args.prompt_k, args.prompt_v, None)
        if len(args.prompt_k) == len(args.q):
            _launch_by_keys((grads.prompt_k, grads.prompt_v), grad_out, statistics, args, *prompts)
        else:
            # Those of keys that all images share are summed over the images, in the dtype of lse.
            shape = (2, len(args.q), *args.prompt_k.shape[1:])
            by_image = torch.empty(shape, dtype=row_dot.dtype, device=row_dot.device)
            _launch_by_keys(by_image.unbind(), grad_out, statistics, args, *prompts)
            for grad, total in zip((grads.prompt_k, grads.prompt_v), by_image.sum(dim=1), strict=True):
                grad.copy_(total)


# ---- what the kernels take


def _strided(tensor: Tensor, batch: int) -> tuple[Tensor | int, ...]:
    """(B or 1, T, h, d) as the kernels take it: with the strides of B = ``batch``, T and h."""
    of_images, of_rows, of_heads, of_channels = tensor.stride()
    if of_channels != 1 or of_rows >= STRIDE_LIMIT:
        tensor = tensor.contiguous()
        of_images, of_rows, of_heads, _ = tensor.stride()
    return tensor, of_images if len(tensor) == batch else 0, of_rows, of_heads


def _strided_bias(bias: Tensor | None, batch: int, heads: int) -> tuple[Tensor | int, ...] | None:
    """The bias as the kernels take it: with the strides of (B, h, Tq, T)."""
    if bias is None:
        return None
    if max(bias.stride()[-2:]) >= STRIDE_LIMIT:
        bias = bias.contiguous()
    return (bias, *bias.expand(batch, heads, -1, -1).stride())


# ---- launches


def _launch_by_queries(
    kernel: Any, name: str, statistics: tuple[Tensor, ...], result: Tensor, args: Arguments, *incoming: Tensor
) -> None:
    """Run a kernel that goes over the queries and writes a ``result`` like q."""
    batch, num_queries, heads, dim = args.q.shape
    num_tokens, num_prompts, num_kv_heads = args.k.shape[1], args.prompt_k.shape[1], args.k.shape[2]
    config = tuning.config(
        name,
        args.q.dtype,
        dim,
        biased=args.bias is not None,
        BLOCK_QUERIES=num_queries,
        BLOCK_TOKENS=num_tokens,
        BLOCK_PROMPTS=num_prompts,
    )
    launch(
        kernel,
        config,
        batch * heads * num_blocks(config, BLOCK_QUERIES=num_queries),
        *statistics,
        *(_strided(t, batch) for t in (result, *args[:5])),
        _strided_bias(args.bias, batch, heads),
        *(_strided(t, batch) for t in incoming),
        *(num_queries, num_tokens, num_prompts, heads, heads // num_kv_heads),
        SCALE=args.scale,
        HEAD_DIM=dim,
    )


def _row_dot(out: Tensor, lse: Tensor, grad_out: Tensor) -> Tensor:
    """row_dot (B, h, Tq): the products of the rows of out and of its gradient."""
    batch, num_queries, heads, dim = out.shape
    config = tuning.config("fwd", out.dtype, dim, BLOCK_QUERIES=num_queries)
    row_dot = torch.empty_like(lse)
    launch(
        kernels.prompt_attention_row_dot_kernel,
        config,
        batch * heads * num_blocks(config, BLOCK_QUERIES=num_queries),
        *(row_dot, _strided(out, batch), _strided(grad_out, batch), num_queries, heads),
        HEAD_DIM=dim,
    )
    return row_dot


def _launch_by_keys(
    results: tuple[Tensor, ...],
    grad_out: Tensor,
    statistics: tuple[Tensor, Tensor],
    args: Arguments,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
) -> None:
    """Write the gradients of k and v, the tokens' or the prompts', for each image on its own."""
    batch, num_queries, heads, dim = args.q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    config = tuning.config(
        "bwd_keys", args.q.dtype, dim, biased=bias is not None, BLOCK_QUERIES=num_queries, BLOCK_KEYS=num_keys
    )
    launch(
        kernels.prompt_attention_bwd_keys_kernel,
        config,
        batch * num_kv_heads * num_blocks(config, BLOCK_KEYS=num_keys),
        *statistics,
        *(_strided(t, batch) for t in (*results, args.q, k, v)),
        _strided_bias(bias, batch, heads),
        _strided(grad_out, batch),
        *(num_queries, num_keys, heads, heads // num_kv_heads),
        SCALE=args.scale,
        HEAD_DIM=dim,
    )
