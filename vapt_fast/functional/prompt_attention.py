"""Attention whose keys and values are the prompts' and the tokens', and whose queries are the tokens'."""

from __future__ import annotations

from torch import Tensor

from ..backends._packed import unpack
from ._checks import (
    check_float,
    check_integer,
    check_number,
    check_one_dtype,
    check_same_device,
    check_score_bias,
    check_shape,
)
from ._implementation import choose, function, run

__all__ = ["prompt_attention", "prompt_attention_packed"]

# Implementations that write the gradients of joint tensors as such; with the others autograd joins them.
WITH_PACKED_FORM = ("triton", "cuda")


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q [prompt_k, k]^T + [0, bias]) [prompt_v, v], head by head.

    Prompts that are thrown away after the block need no query of their own.

    Args:
        q: (B, Tq, h, d).
        k, v: (B, T, g, d); g divides h, and each g serves h / g heads in a row (grouped queries).
        prompt_k, prompt_v: (B, P, g, d), or (1, P, g, d) where they are the same for every image.
            All these tensors are of one floating dtype, unless autocast casts them.
        scale: factor of the scores.
        bias: broadcastable to (B, h, Tq, T), added to the tokens' scores; the prompts' is zero.
        backend: "auto", "torch", "triton" or "cuda"; "cudnn" or "flash" for PyTorch's attention by
            that library alone, over concatenated keys; None for the current one, see vapt_fast.use_backend.

    Returns:
        (B, Tq, h, d) in ``q``'s dtype. Differentiable in all tensors; the kernels, whose backward is written
        by hand, only once. Those of "triton" not in ``bias``, which must not require a gradient there; those
        of "cuda" are for float16 and bfloat16, heads of 8, 16, ... 128 channels and no bias.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    check_shape("q", q, "(B, Tq, h, d)", None, None, None, None)
    batch, num_queries, heads, dim = q.shape
    check_shape("k", k, "(B, T, g, d)", batch, None, None, dim)
    num_tokens, groups = k.shape[1:3]
    check_shape("v", v, "(B, T, g, d)", batch, num_tokens, groups, dim)
    if heads % groups:
        raise ValueError(f"k must have heads that divide q's {heads}, got {groups}")
    check_shape("prompt_k", prompt_k, "(B or 1, P, g, d)", None, None, groups, dim)
    check_shape("prompt_v", prompt_v, "(B or 1, P, g, d)", *prompt_k.shape)
    if prompt_k.shape[0] not in (1, batch):
        raise ValueError(f"prompt_k must have a batch of 1 or {batch}, got {prompt_k.shape[0]}")
    check_score_bias(bias, batch, heads, num_queries, num_tokens)
    scale = check_number("scale", scale)
    tensors = {"q": q, "k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
    check_float(**tensors, bias=bias)
    check_same_device(**tensors, bias=bias)
    check_one_dtype(**tensors)
    return run("prompt_attention", backend, q, k, v, prompt_k, prompt_v, scale, bias)


def prompt_attention_packed(
    qkv: Tensor,
    prompt_kv: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """prompt_attention of the queries, keys and values that one projection made, in one tensor.

    The same as splitting ``qkv`` and ``prompt_kv``, but their gradients are written in one piece: a split's
    backward concatenates, which reads and writes all of them once more.

    Args:
        qkv: (B, T, (h + 2g) * d), the queries of h = ``num_heads`` heads, then the keys and the values of
            g = ``num_kv_heads``; g divides h.
        prompt_kv: (B, P, 2g * d), keys and values of the prompts, or (1, P, 2g * d) where they are the same
            for every image.
        num_heads, num_kv_heads, scale, bias, backend: see prompt_attention.

    Returns:
        (B, T, h, d) in ``qkv``'s dtype. Differentiable in all tensors, as prompt_attention is.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    num_heads = check_integer("num_heads", num_heads, least=1)
    num_kv_heads = check_integer("num_kv_heads", num_kv_heads, least=1)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
    check_shape("qkv", qkv, "(B, T, (h + 2g) * d)", None, None, None)
    batch, num_tokens, width = qkv.shape
    num_parts = num_heads + 2 * num_kv_heads
    if width % num_parts or not width:
        raise ValueError(f"qkv must be (B, T, {num_parts} * d), got {tuple(qkv.shape)}")
    prompt_width = 2 * num_kv_heads * (width // num_parts)
    check_shape("prompt_kv", prompt_kv, "(B or 1, P, 2g * d)", None, None, prompt_width)
    if prompt_kv.shape[0] not in (1, batch):
        raise ValueError(f"prompt_kv must have a batch of 1 or {batch}, got {prompt_kv.shape[0]}")
    check_score_bias(bias, batch, num_heads, num_tokens, num_tokens)
    scale = check_number("scale", scale)
    check_float(qkv=qkv, prompt_kv=prompt_kv, bias=bias)
    check_same_device(qkv=qkv, prompt_kv=prompt_kv, bias=bias)
    check_one_dtype(qkv=qkv, prompt_kv=prompt_kv)
    separate = (*unpack(qkv, prompt_kv, num_heads, num_kv_heads), scale, bias)
    name = choose("prompt_attention", backend, *separate)
    if name in WITH_PACKED_FORM:
        packed = function("prompt_attention_packed", name)
        return packed(qkv, prompt_kv, num_heads, num_kv_heads, scale, bias)
    return function("prompt_attention", name)(*separate)
