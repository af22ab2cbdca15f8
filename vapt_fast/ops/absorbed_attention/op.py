"""absorbed_attention: the attention of a few queries that never makes the keys and values of the tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..base import Op, Signature, empty_like
from ..checks import (
    HALF,
    check_float,
    check_length_values,
    check_lengths,
    check_number,
    check_same_device,
    check_score_bias,
    check_shape,
)
from ..measurement import Measurement

__all__ = ["absorbed_attention"]


def absorbed_attention(
    q: Tensor,
    x: Tensor,
    prompts: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute softmax(scale * q K^T + [0, bias]) V by heads, with K = Wk [prompts, x], V = Wv [prompts, x].

    For head m: u = Wk_m^T q_m; the score of row n is x_n . u; y = sum_n p_n x_n; the result is Wv_m y. So for
    R queries Wk and Wv are multiplied by R rows, not by all T + P, forward and backward.

    Args:
        q: (B, R, h, d), queries.
        x: (B, T, C), tokens as the projections read them (normalised).
        prompts: (B, P, C) likewise, or (1, P, C) where they are the same for every image.
        key_weight, value_weight: (h, d, C). Biases of keys change nothing, those of values are the caller's.
            All these tensors may be of any floating dtypes.
        scale: factor of the scores.
        bias: broadcastable to (1, h, R, T), added to the tokens' scores; the prompts' is zero.
        prompt_lengths: (B,), see prompt_attention.
        backend: "auto", "torch" or "triton"; None for the current one, see use_backend.

    Returns:
        (B, R, h, d) in ``q``'s dtype, computed in float32 at least. Differentiable in all floating tensors.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    check_shape("q", q, "(B, R, h, d)", None, None, None, None)
    batch, num_queries, heads, head_dim = q.shape
    check_shape("x", x, "(B, T, C)", batch, None, None)
    num_tokens, dim = x.shape[1:]
    check_shape("prompts", prompts, "(B or 1, P, C)", None, None, dim)
    if prompts.shape[0] not in (1, batch):
        raise ValueError(f"prompts must have a batch of 1 or {batch}, got {prompts.shape[0]}")
    check_shape("key_weight", key_weight, "(h, d, C)", heads, head_dim, dim)
    check_shape("value_weight", value_weight, "(h, d, C)", heads, head_dim, dim)
    check_score_bias(bias, 1, heads, num_queries, num_tokens)
    check_lengths(prompt_lengths, batch)
    if prompt_lengths is not None and not num_tokens:
        raise ValueError("x must have at least one token where prompt_lengths are given, got none")
    scale = check_number("scale", scale)
    tensors = {"q": q, "x": x, "prompts": prompts, "key_weight": key_weight, "value_weight": value_weight}
    check_float(**tensors, bias=bias)
    check_same_device(**tensors, bias=bias, prompt_lengths=prompt_lengths)
    # The scores pass through one more product than usual, and there are few of them: at least float32.
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device.type):
        # u_m = Wk_m^T q_m: the query in the space of the normalised tokens.
        u = torch.einsum("brhd,hdc->bhrc", q.to(dtype) * scale, key_weight.to(dtype)).flatten(1, 2)
        if bias is not None:
            bias = bias.to(dtype).expand(1, heads, num_queries, -1).flatten(1, 2)
        (y,) = _OP(backend, Arguments(u, x, prompts, bias, prompt_lengths))
        y = torch.unflatten(y, 1, (heads, num_queries))
        return torch.einsum("bhrc,hdc->brhd", y, value_weight.to(dtype)).to(q.dtype)


class Arguments(NamedTuple):
    """The queries u (B, M, C) of all heads, M = h * R, float32 or float64; bias (1, M, T) in their dtype."""

    u: Tensor
    x: Tensor
    prompts: Tensor
    bias: Tensor | None
    prompt_lengths: Tensor | None


class Outputs(NamedTuple):
    """y (B, M, C) and the softmax p (B, M, P + T), in the dtype of the queries."""

    y: Tensor
    p: Tensor


class Saved(NamedTuple):
    """What the backward reads."""

    u: Tensor
    x: Tensor
    prompts: Tensor
    p: Tensor
    prompt_lengths: Tensor | None


class Gradients(NamedTuple):
    """In the shapes and dtypes of the arguments; that of the bias (1, M, T)."""

    u: Tensor | None
    x: Tensor | None
    prompts: Tensor | None
    bias: Tensor | None


class _AbsorbedAttention(Op):
    name = "absorbed_attention"
    measured = (
        Measurement(
            "triton",
            1.9,
            "forward 53 µs against 101",
            fits=lambda args: args.x.dtype in HALF and args.prompt_lengths is None,
        ),
    )
    signature = Signature(Arguments, Outputs, Saved, Gradients)

    def check(self, args: Arguments) -> Arguments:
        return args  # made here: the public function has checked what it was given

    def check_values(self, args: Arguments) -> None:
        check_length_values(args.prompt_lengths, args.prompts.shape[1])

    def allocate(self, args: Arguments) -> Outputs:
        num_keys = args.prompts.shape[1] + args.x.shape[1]
        return Outputs(empty_like(args.u), args.u.new_empty((*args.u.shape[:2], num_keys)))

    def save(self, args: Arguments, out: Outputs) -> Saved:
        return Saved(args.u, args.x, args.prompts, out.p, args.prompt_lengths)

    def allocate_gradients(self, saved: Saved, needed: Collection[str]) -> Gradients:
        tensors = {"u": saved.u, "x": saved.x, "prompts": saved.prompts}
        grads = (empty_like(tensor) if name in needed else None for name, tensor in tensors.items())
        bias_shape = (1, saved.u.shape[1], saved.x.shape[1])
        bias = saved.u.new_empty(bias_shape) if "bias" in needed else None
        return Gradients._make((*grads, bias))


_OP = _AbsorbedAttention()
