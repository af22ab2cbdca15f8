"""The literal forward pass: the paper, word for word, in plain PyTorch. The oracle of every other backend.

Before block i the P prompt tokens are placed after the prefix tokens; after it they are thrown away
(VPT-shallow: they travel on). See vapt_fast.schedule for the same function, rewritten to be cheap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import backbone
from .activations import ACTIVATIONS
from .config import PromptConfig
from .dropout import BlockMasks
from .prompts import AdaptivePrompts, Projector, Prompts, StaticPrompts

__all__ = ["adaptive_prompts", "forward_tokens", "static_prompts"]


def forward_tokens(
    model: nn.Module,
    prompts: Prompts,
    images: Tensor,
    masks: list[BlockMasks],
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
        masks: one BlockMasks for each entry of ``prompts.blocks``.
        num_blocks: run only this many first blocks.
        taps: the tokens (B, T, C) after block i, without prompts, are stored under each key i that is there.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Returns:
        tokens (B, S + Q + N, C) and Q, the number of prompt tokens they hold after the S prefix tokens.
    """
    tokens, positions = backbone.embed(model, images)
    num_prefix = model.num_prefix_tokens
    grid = backbone.grid_size(model, images.shape[-2:])
    travelling = 0
    for index in range(len(model.blocks) if num_blocks is None else num_blocks):
        block = prompts.of_block(index)
        prefix, old_prompts, patches = tokens.tensor_split([num_prefix, num_prefix + travelling], dim=1)
        if isinstance(block, AdaptivePrompts):
            projector = block.projector or prompts.projector
            new_prompts = adaptive_prompts(patches, block, projector, grid, masks[index], prompts.config)
        elif block is not None:
            new_prompts = static_prompts(block, tokens.shape[0], masks[index])
        else:
            new_prompts = old_prompts
        tokens = torch.cat([prefix, new_prompts.to(tokens.dtype), patches], dim=1)
        travelling = new_prompts.shape[1]

        arguments = (model, index, tokens, positions.with_extra(travelling))
        if checkpointing:
            tokens = checkpoint(backbone.call_block, *arguments, use_reentrant=False)
        else:
            tokens = backbone.call_block(*arguments)
        if taps is not None and index in taps:
            taps[index] = backbone.remove_prompts(tokens, num_prefix, travelling)
    return tokens, travelling


def static_prompts(block: StaticPrompts, batch: int, masks: BlockMasks) -> Tensor:
    """The learned table (P, C) for each of ``batch`` images, with dropout: (B, P, C)."""
    prompts = block.table.expand(batch, -1, -1)
    return prompts if masks.table is None else prompts * masks.table


def adaptive_prompts(
    patches: Tensor,
    block: AdaptivePrompts,
    projector: Projector | None,
    grid: tuple[int, int],
    masks: BlockMasks,
    config: PromptConfig,
) -> Tensor:
    """Prompts computed from the patch tokens (VAPT, arXiv 2501.18936, section 4.1): (B, N, C) to (B, P, C).

    LayerNorm, convolution over the grid, channel dropout, Linear over the positions, feature projector; in
    float32 (float64 where anything is), also under autocast, because the first prompts are exactly 0 and the
    next LayerNorm multiplies their errors by 1000.
    """
    weight, bias = block.token_projection.weight, block.token_projection.bias
    dtype = torch.promote_types(torch.promote_types(patches.dtype, weight.dtype), torch.float32)
    with torch.autocast(patches.device.type, enabled=False):
        norm = block.norm
        z = F.layer_norm(
            patches.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps
        )
        batch, _, dim = z.shape
        z = z.transpose(1, 2).reshape(batch, dim, *grid)
        if block.kernel is not None:
            kernel = block.kernel.to(dtype)
            depthwise = kernel.expand(dim, -1, -1, -1)
            z = F.conv2d(z, depthwise, padding=config.conv_padding, groups=dim)
        z = z.flatten(2)
        if masks.channels is not None:
            z = z * masks.channels.transpose(1, 2)
        prompts = F.linear(z, weight.to(dtype), bias.to(dtype)).transpose(1, 2)
        if projector is not None:
            hidden = F.linear(prompts, projector.down.weight.to(dtype))
            hidden = ACTIVATIONS[config.projector_activation](hidden)
            if masks.features is not None:
                hidden = hidden * masks.features
            branch = F.linear(hidden, projector.up.weight.to(dtype))
            prompts = prompts + projector.scale * branch
        return prompts
