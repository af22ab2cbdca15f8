"""The literal forward pass: the paper, word for word, in plain PyTorch. The oracle of every other backend.

Before block i the P prompt tokens are placed after the prefix tokens; after it they are thrown away
(VPT-shallow: they travel on). How prompts are computed is in vapt_fast.prompts; see vapt_fast.forward.fused
for the same function, rewritten to be cheap.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import backbones
from ..modules import call_within
from ..prompts import Masks, Prompts

__all__ = ["forward_tokens"]


def forward_tokens(
    model: backbones.TimmViT,
    prompts: Prompts,
    images: Tensor,
    masks: list[Masks],
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
    num_prefix = model.num_prefix_tokens
    config, depth = prompts.config, len(model.blocks)
    num_blocks = depth if num_blocks is None else num_blocks
    travelling = 0

    def run_blocks(blocks: nn.Module, tokens: Tensor) -> Tensor:
        nonlocal travelling
        for index in range(num_blocks):
            prefix, new_prompts, patches = tokens.tensor_split([num_prefix, num_prefix + travelling], dim=1)
            if index < len(prompts.blocks):
                new_prompts = prompts.compute(index, patches, masks[index]).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([prefix, new_prompts.to(tokens.dtype), patches], dim=1)
            travelling = new_prompts.shape[1]

            arguments = (model, index, tokens, positions.with_extra(travelling))
            if checkpointing:
                tokens = checkpoint(backbones.call_block, *arguments, use_reentrant=False)
            else:
                tokens = backbones.call_block(*arguments)
            if taps is not None and index in taps:
                taps[index] = backbones.remove_prompts(tokens, num_prefix, travelling)
        if config.kind != "shallow" and not (config.pool_prompts and num_blocks == depth):
            tokens, travelling = backbones.remove_prompts(tokens, num_prefix, travelling), 0
        return tokens

    return call_within(model.blocks, run_blocks, tokens), travelling
