"""Attention whose keys and values are the prompts' and the tokens', and whose queries are the tokens'."""

from __future__ import annotations

from torch import Tensor

from ._checks import check_float, check_same_device, check_shape
from ._implementation import run

__all__ = ["prompt_attention"]


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
        scale: factor of the scores.
        bias: broadcastable to (B, h, Tq, T), added to the tokens' scores; the prompts' is zero.
        backend: "auto", "torch" or "triton"; None for the current one, see vapt_fast.use_backend.

    Returns:
        (B, Tq, h, d) in ``q``'s dtype. Differentiable in all tensors; the Triton kernels, whose backward is
        written by hand, only once and not in ``bias``, which must not require a gradient there.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailable: the backend can't run here, or not with these arguments.
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
    if bias is not None and bias.shape[-2:] != (num_queries, num_tokens):
        raise ValueError(f"bias must be (..., {num_queries}, {num_tokens}), got {tuple(bias.shape)}")
    check_float(q=q, k=k, v=v, prompt_k=prompt_k, prompt_v=prompt_v, bias=bias)
    check_same_device(q=q, k=k, v=v, prompt_k=prompt_k, prompt_v=prompt_v, bias=bias)
    return run("prompt_attention", backend, q, k, v, prompt_k, prompt_v, scale, bias)
