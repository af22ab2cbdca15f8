"""Where the tokens of a sequence are. Prompts stand after the prefix and have no position."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Positions", "pad_bias", "remove_prompts"]


@dataclass(frozen=True)
class Positions:
    """Where the tokens are, in the forms that blocks are told.

    Attributes:
        rope: sines and cosines (N, 2d) of the patch tokens, or (L, h, N, 2d) where they differ by block.
        rope_by_block: whether the first dimension of ``rope`` is the block.
        bias: (h, T, T) or (1, h, T, T), added to the attention scores of every block, or None.
        num_extra: prompt tokens that stand between the prefix and the patch tokens. They have no position:
            rotary embeddings leave them as they are, and their attention bias is zero.
    """

    rope: Tensor | None = None
    rope_by_block: bool = False
    bias: Tensor | None = None
    num_extra: int = 0

    def with_extra(self, count: int) -> Positions:
        """The same positions with ``count`` more prompt tokens in the sequence."""
        return self if count == 0 else replace(self, num_extra=self.num_extra + count)

    def patch_rope(self, block: int) -> Tensor | None:
        """The rotary embedding of the patch tokens alone for block ``block``."""
        return self.rope[block] if self.rope is not None and self.rope_by_block else self.rope

    def sequence_rope(self, block: int) -> Tensor | None:
        """The rotary embedding of prompt and patch tokens: rotation by 0 (sine 0, cosine 1) for prompts."""
        rope = self.patch_rope(block)
        if rope is None or self.num_extra == 0:
            return rope
        *lead, _, width = rope.shape
        sine = rope.new_zeros(*lead, self.num_extra, width // 2)
        return torch.cat([torch.cat([sine, torch.ones_like(sine)], dim=-1), rope], dim=-2)


def pad_bias(bias: Tensor, count: int, num_prefix: int) -> Tensor:
    """``bias`` (..., T, T) with zero rows and columns for ``count`` prompt tokens after the prefix."""
    if count == 0:
        return bias
    for dim in (-2, -1):
        prefix, patches = bias.tensor_split([num_prefix], dim=dim)
        shape = list(bias.shape)
        shape[dim] = count
        bias = torch.cat([prefix, bias.new_zeros(shape), patches], dim=dim)
    return bias


def remove_prompts(tokens: Tensor, num_prefix: int, count: int) -> Tensor:
    """The tokens (B, T, C) without the ``count`` prompt tokens after the prefix."""
    return torch.cat([tokens[:, :num_prefix], tokens[:, num_prefix + count :]], dim=1) if count else tokens
