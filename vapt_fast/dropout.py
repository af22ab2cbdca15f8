"""The prompts' dropout masks, drawn in one place so that every backend sees the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompts import AdaptivePrompts, Prompts

__all__ = ["BlockMasks", "draw_masks"]


@dataclass(frozen=True)
class BlockMasks:
    """Factors 0 or 1 / (1 - rate) of one block's dropouts; None where nothing is dropped.

    Attributes:
        table: (B, P, C), on the learned table of a static block.
        channels: (B, 1, C), on whole (image, channel) planes after the convolution (Dropout2d).
        features: (B, P, r), on the projector's r features.
    """

    table: Tensor | None = None
    channels: Tensor | None = None
    features: Tensor | None = None


def draw_masks(prompts: Prompts, batch: int, dtype: torch.dtype, device: torch.device) -> list[BlockMasks]:
    """One BlockMasks for each entry of ``prompts.blocks``, drawn with torch's generator of ``device``.

    Nothing is drawn while ``prompts`` is in eval mode.
    """
    config = prompts.config

    def mask(rate: float, *shape: int) -> Tensor | None:
        if not prompts.training or rate == 0:
            return None
        return F.dropout(torch.ones(shape, dtype=dtype, device=device), rate)

    masks = []
    for block in prompts.blocks:
        if isinstance(block, AdaptivePrompts):
            dim = block.norm.normalized_shape[0]
            channels = mask(config.channel_dropout, batch, 1, dim)
            width = config.projector_dim
            features = None
            if width is not None:
                features = mask(config.projector_dropout, batch, config.num_prompts, width)
            masks.append(BlockMasks(channels=channels, features=features))
        else:
            masks.append(BlockMasks(table=mask(config.prompt_dropout, batch, *block.table.shape)))
    return masks
