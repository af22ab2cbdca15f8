"""The literal forward pass: the paper, word for word, in plain PyTorch. The oracle of every other backend.

Before block i the P prompt tokens are placed after the prefix tokens; after it they are thrown away, unless
they travel on (VPT-shallow). How prompts are computed is in vapt_fast.prompts; vapt_fast.forward.fused is the
same function, rewritten to be cheap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import backbones
from ..modules import call_within
from ..prompts import Prompts

__all__ = ["forward_tokens", "insert"]


def forward_tokens(
    model: nn.Module,
    prompts: Prompts,
    images: Tensor,
    masks: list[Any],
    *,
    num_blocks: int | None = None,
    taps: dict[int, Tensor] | None = None,
    checkpointing: bool = False,
) -> tuple[Tensor, int]:
    """All tokens after the last block, before the final norm.

    Args:
        model: the timm backbone.
        prompts: the learnable parameters.
        images: (B, in_chans, height, width).
        masks: of the dropouts, one for each entry of ``prompts.blocks``.
        num_blocks: run only this many first blocks.
        taps: the tokens (B, T, C) after block i, without prompts, are stored under each key i that is there.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Returns:
        tokens (B, S + Q + N, C) and Q, the number of prompt tokens they hold after the S prefix tokens.
    """
    tokens, positions = backbones.embed(model, images)
    num_prefix, depth = model.num_prefix_tokens, len(model.blocks)
    num_blocks = depth if num_blocks is None else num_blocks
    travelling = 0

    def run_blocks(blocks: nn.Module, tokens: Tensor) -> Tensor:
        nonlocal travelling
        for index in range(num_blocks):
            start, count = num_prefix + travelling, 0
            given = prompts.compute(index, tokens[:, start:], masks[index]) if index < len(masks) else None
            if given is not None:
                tokens, count = insert(tokens, given, start), given.shape[1]
            arguments = (model, index, tokens, positions.with_extra(travelling + count))
            if checkpointing:
                tokens = checkpoint(backbones.call_block, *arguments, use_reentrant=False)
            else:
                tokens = backbones.call_block(*arguments)
            if count and prompts.travels(index, depth):
                travelling += count
            else:
                tokens = backbones.remove_prompts(tokens, start, count)
            if taps is not None and index in taps:
                taps[index] = backbones.remove_prompts(tokens, num_prefix, travelling)
        return tokens

    return call_within(model.blocks, run_blocks, tokens), travelling


def insert(tokens: Tensor, prompts: Tensor, at: int) -> Tensor:
    """Return the tokens (B, T, C) with ``prompts`` (B or 1, P, C) placed before token ``at``."""
    before, after = tokens.tensor_split([at], dim=1)
    prompts = prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
    return torch.cat([before, prompts, after], dim=1)
