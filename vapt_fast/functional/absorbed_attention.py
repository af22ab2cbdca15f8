"""The attention of a few query rows without ever making the keys and values of the tokens."""

from __future__ import annotations

from torch import Tensor

from ._checks import (
    check_float,
    check_number,
    check_same_device,
    check_score_bias,
    check_shape,
)
from ._implementation import run

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
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q K^T + [0, bias]) V with K = Wk [prompts, x], V = Wv [prompts, x], head by head.

    For head m: u = Wk_m^T q_m; the score of row n is x_n . u; y = sum_n p_n x_n; the result is Wv_m y. So for
    R query rows the products of Wk and Wv with all T + P rows vanish, forward and backward.

    Args:
        q: (B, R, h, d), queries.
        x: (B, T, C), tokens as the projections read them (normalised).
        prompts: (B, P, C) likewise, or (1, P, C) where they are the same for every image.
        key_weight, value_weight: (h, d, C). Biases of keys change nothing, those of values are the caller's.
            All these tensors may be of any floating dtypes.
        scale: factor of the scores.
        bias: broadcastable to (1, h, R, T), added to the tokens' scores; the prompts' is zero.
        backend: "auto", "torch" or "triton"; None for the current one, see use_backend.

    Returns:
        (B, R, h, d) in ``q``'s dtype, computed in float32 at least. Differentiable in all tensors.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    check_shape("q", q, "(B, R, h, d)", None, None, None, None)
    batch, rows, heads, head_dim = q.shape
    check_shape("x", x, "(B, T, C)", batch, None, None)
    num_tokens, dim = x.shape[1:]
    check_shape("prompts", prompts, "(B or 1, P, C)", None, None, dim)
    if prompts.shape[0] not in (1, batch):
        raise ValueError(f"prompts must have a batch of 1 or {batch}, got {prompts.shape[0]}")
    check_shape("key_weight", key_weight, "(h, d, C)", heads, head_dim, dim)
    check_shape("value_weight", value_weight, "(h, d, C)", heads, head_dim, dim)
    check_score_bias(bias, 1, heads, rows, num_tokens)
    scale = check_number("scale", scale)
    tensors = {"q": q, "x": x, "prompts": prompts, "key_weight": key_weight, "value_weight": value_weight}
    check_float(**tensors, bias=bias)
    check_same_device(**tensors, bias=bias)
    return run("absorbed_attention", backend, q, x, prompts, key_weight, value_weight, scale, bias)
