"""Joint tensors of queries, keys and values."""

from __future__ import annotations

from torch import Tensor

__all__ = ["unpack"]


def unpack(
    qkv: Tensor, prompt_kv: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, prompt_k and prompt_v as prompt_attention takes them, views of the joint tensors.

    Args:
        qkv: (B, T, (h + 2g) * d), h = ``num_heads``, g = ``num_kv_heads``.
        prompt_kv: (B or 1, P, 2g * d).
    """
    dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    q, k, v = qkv.unflatten(-1, (-1, dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    prompt_k, prompt_v = prompt_kv.unflatten(-1, (-1, dim)).split(num_kv_heads, dim=2)
    return q, k, v, prompt_k, prompt_v
