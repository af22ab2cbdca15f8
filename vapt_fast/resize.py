"""Adaptive prompts for another grid of patches."""

from __future__ import annotations

import math

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from .prompts import AdaptivePrompts

__all__ = ["resize_adaptive_prompts"]


def resize_adaptive_prompts(block: AdaptivePrompts, grid: tuple[int, int]) -> None:
    """Resample the projection over positions, (P, H'W'), for another grid (H, W) of patches.

    Each prompt's weights are an image over the grid and are resampled like a position embedding (bicubic,
    with anti-aliasing), then scaled by the ratio of the areas, because a prompt is a sum over positions:
    uniform tokens keep giving the same prompt.

    Raises:
        ValueError: the convolution does not fit ``grid``.
    """
    config, projection = block.config, block.token_projection
    old, new = config.conv_output(block.grid), config.conv_output(grid)
    with torch.no_grad():
        maps = resample_abs_pos_embed(
            projection.weight.t().unsqueeze(0), new_size=list(new), old_size=list(old), num_prefix_tokens=0
        )
        weight = maps.squeeze(0).t() * (math.prod(old) / math.prod(new))
    resized = nn.Linear(
        math.prod(new), config.num_prompts, device=projection.weight.device, dtype=projection.weight.dtype
    )
    resized.weight = nn.Parameter(weight.contiguous(), requires_grad=projection.weight.requires_grad)
    resized.bias = projection.bias
    block.token_projection, block.grid = resized, grid
