"""Learned keys and values for the attention of every block: prefix tuning, the K and V prompts of E2VPT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.blocks import split_block
from ..config import PromptConfig
from .base import BlockPrompts, Geometry, Masks, draw_mask, register_kind
from .deep import table_bound
from .plain import KeysValues, PlainPrompts

__all__ = ["KeyValuePrompts"]


@register_kind("kv", title="prefix tuning")
class KeyValuePrompts(BlockPrompts):
    """Keys and values of one block, each (P, g * d): g heads of keys of d channels, g * d = C in most ViTs.

    They skip the block's norm1, its projections, the norm of the keys and all positions, and join the keys
    and values of the tokens head by head. Both start as tables do.

    Raises:
        NotImplementedError: the block's attention can't be taken apart.
    """

    def __init__(self, config: PromptConfig, num_prompts: int, geometry: Geometry, index: int) -> None:
        super().__init__(config, num_prompts, geometry)
        if geometry.blocks is None:
            raise ValueError("geometry.blocks must be the backbone's blocks for kind 'kv', got None")
        width = split_block(geometry.blocks[index]).kv_dim
        self.keys = nn.Parameter(torch.empty(num_prompts, width))
        self.values = nn.Parameter(torch.empty(num_prompts, width))
        self.bound = table_bound(geometry)
        self.reset_parameters()

    @classmethod
    def check_config(cls, config: PromptConfig) -> None:
        """Raise ValueError for options that need prompt tokens."""
        super().check_config(config)
        if config.pool_prompts:
            raise ValueError(
                "pool_prompts must be False for kind 'kv', whose prompts are no tokens, got True"
            )

    @classmethod
    def make(cls, config: PromptConfig, index: int, num_prompts: int, geometry: Geometry) -> BlockPrompts:
        """Return the keys and values of block ``index``."""
        return cls(config, num_prompts, geometry, index)

    def reset_parameters(self) -> None:
        """Draw keys and values anew."""
        for table in (self.keys, self.values):
            nn.init.uniform_(table, -self.bound, self.bound)

    def draw_masks(self, batch: int, **options: Any) -> Masks:
        """Return the masks of keys and values side by side, (B, P, 2 * g * d)."""
        num_prompts, width = self.keys.shape
        return Masks(draw_mask(self, self.config.prompt_dropout, batch, num_prompts, 2 * width, **options))

    def forward(self, patches: Tensor, masks: Masks | None = None, **shared: Any) -> KeysValues:
        """Return the keys and values, each (1, P, g * d), or (B, P, g * d) with dropout."""
        both = torch.cat([self.keys, self.values], dim=-1).unsqueeze(0)
        if masks is not None and masks.table is not None:
            both = both * masks.table
        return KeysValues(*both.chunk(2, dim=-1))

    def plain(self) -> PlainPrompts:
        """Return keys and values."""
        rates = (self.rate(self.config.prompt_dropout), 0.0, 0.0)
        return PlainPrompts(self.num_prompts, keys_values=KeysValues(self.keys, self.values), rates=rates)
