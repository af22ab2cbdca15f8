"""prompt_attention on Triton: the launches of vapt_fast.kernels.prompt_attention."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...kernels import prompt_attention as kernels
from ..base import empty_like
from ..checks import unsupported_mixture
from ..triton_launch import STRIDE_LIMIT, Strided, launch, num_blocks, strided
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
    given = _given(args)
    _launch_by_queries(kernels.prompt_attention_fwd_kernel, "fwd", (out.lse,), out.out, args, given)


def backward(saved: Saved, grad_results: tuple[Tensor], grads: Gradients) -> None:
    """Write the gradients of queries, keys and values, of tokens and prompts, that are needed."""
    args, given, batch = Arguments(*saved[2:]), _given(saved), saved.q.shape[0]
    grad_out = _strided(grad_results[0], batch)
    statistics = (saved.lse, _row_dot(saved.out, saved.lse, grad_out))
    incoming = (*statistics, grad_out)
    if grads.q is not None:
        kernel = kernels.prompt_attention_bwd_queries_kernel
        _launch_by_queries(kernel, "bwd_queries", statistics, grads.q, args, given, grad_out)
    if grads.k is not None and grads.v is not None:
        of_tokens = (given.q, given.k, given.v, given.bias, None)
        _launch_by_keys((grads.k, grads.v), incoming, args, *of_tokens)
    if grads.prompt_k is not None and grads.prompt_v is not None:
        of_prompts = (given.q, given.prompt_k, given.prompt_v, None, given.prompt_lengths)
        if saved.prompt_k.shape[0] == batch:
            _launch_by_keys((grads.prompt_k, grads.prompt_v), incoming, args, *of_prompts)
        else:
            # Those of keys that all images share are summed over the images, in the dtype of lse.
            by_image = saved.lse.new_empty((2, batch, *saved.prompt_k.shape[1:]))
            _launch_by_keys(by_image.unbind(), incoming, args, *of_prompts)
            for grad, total in zip((grads.prompt_k, grads.prompt_v), by_image.sum(dim=1), strict=True):
                grad.copy_(total)


# ---- what the kernels take


def _strided(tensor: Tensor, batch: int) -> Strided:
    """(B or 1, T, h, d) as the kernels take it: with the strides of B = ``batch``, T and h."""
    of_images, of_rows, of_heads, of_channels = tensor.stride()
    if of_channels != 1 or of_rows >= STRIDE_LIMIT:
        tensor = tensor.contiguous()
        of_images, of_rows, of_heads, _ = tensor.stride()
    return tensor, of_images if tensor.shape[0] == batch else 0, of_rows, of_heads


def _strided_bias(bias: Tensor | None, batch: int, heads: int) -> Strided | None:
    """The bias as the kernels take it: with the strides of (B, h, Tq, T)."""
    if bias is None:
        return None
    if max(bias.stride()[-2:]) >= STRIDE_LIMIT:
        bias = bias.contiguous()
    return (bias, *bias.expand(batch, heads, -1, -1).stride())


class _Given(NamedTuple):
    """The arguments with their strides."""

    q: Strided
    k: Strided
    v: Strided
    prompt_k: Strided
    prompt_v: Strided
    bias: Strided | None
    prompt_lengths: Strided | None


def _given(args: Arguments | Saved) -> _Given:
    batch, _, heads, _ = args.q.shape
    return _Given(
        _strided(args.q, batch),
        _strided(args.k, batch),
        _strided(args.v, batch),
        _strided(args.prompt_k, batch),
        _strided(args.prompt_v, batch),
        _strided_bias(args.bias, batch, heads),
        strided(args.prompt_lengths),
    )


# ---- launches


def _launch_by_queries(
    kernel: Any,
    name: str,
    statistics: tuple[Tensor, ...],
    result: Tensor,
    args: Arguments,
    given: _Given,
    *incoming: Strided,
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
        *(_strided(result, batch), *given, *incoming),
        *(num_queries, num_tokens, num_prompts, heads, heads // num_kv_heads),
        SCALE=args.scale,
        HEAD_DIM=dim,
    )


def _row_dot(out: Tensor, lse: Tensor, grad_out: Strided) -> Tensor:
    """row_dot (B, h, Tq): the products of the rows of out and of its gradient."""
    batch, num_queries, heads, dim = out.shape
    config = tuning.config("fwd", out.dtype, dim, BLOCK_QUERIES=num_queries)
    row_dot = empty_like(lse)
    launch(
        kernels.prompt_attention_row_dot_kernel,
        config,
        batch * heads * num_blocks(config, BLOCK_QUERIES=num_queries),
        *(row_dot, _strided(out, batch), grad_out, num_queries, heads),
        HEAD_DIM=dim,
    )
    return row_dot


def _launch_by_keys(
    results: tuple[Tensor, ...],
    incoming: tuple[Tensor, Tensor, Strided],
    args: Arguments,
    q: Strided,
    k: Strided,
    v: Strided,
    bias: Strided | None,
    key_lengths: Strided | None,
) -> None:
    """Write the gradients of k and v, the tokens' or the prompts', for each image on its own."""
    batch, num_queries, heads, dim = args.q.shape
    _, num_keys, num_kv_heads, _ = results[0].shape
    lse, row_dot, grad_out = incoming
    config = tuning.config(
        "bwd_keys", args.q.dtype, dim, biased=bias is not None, BLOCK_QUERIES=num_queries, BLOCK_KEYS=num_keys
    )
    launch(
        kernels.prompt_attention_bwd_keys_kernel,
        config,
        batch * num_kv_heads * num_blocks(config, BLOCK_KEYS=num_keys),
        *(lse, row_dot, *[_strided(t, batch) for t in results], q, k, v, bias, key_lengths, grad_out),
        *(num_queries, num_keys, heads, heads // num_kv_heads),
        SCALE=args.scale,
        HEAD_DIM=dim,
    )
