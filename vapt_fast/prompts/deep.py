"""Learned tables of prompts for every block: VPT-deep (Jia et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PromptConfig
from .base import BlockPrompts, Geometry, Masks, draw_mask, register_kind, stored_shape
from .plain import PlainPrompts

__all__ = ["StaticPrompts", "table_bound"]

FIRST = "transformer.prompt_embeddings"
OTHERS = "transformer.deep_prompt_embeddings"


def table_bound(geometry: Geometry) -> float:
    """Return v = sqrt(6 / (3 * patch_h * patch_w + C)): tables start uniform in (-v, v) (VPT, section 3)."""
    # The 3 is the number of input channels, whatever the backbone has: so the papers' code defines it.
    return math.sqrt(6 / (3 * math.prod(geometry.patch_size) + geometry.dim))


@register_kind("deep", method="vpt-deep", title="VPT-deep")
class StaticPrompts(BlockPrompts):
    """A learned table of prompts, the same for every image: ``table`` of (P, C)."""

    token_table: ClassVar[str | None] = "table"

    def __init__(self, config: PromptConfig, num_prompts: int, geometry: Geometry) -> None:
        super().__init__(config, num_prompts, geometry)
        self.table = nn.Parameter(torch.empty(num_prompts, geometry.dim))
        self.bound = table_bound(geometry)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.uniform_(self.table, -self.bound, self.bound)

    def draw_masks(self, batch: int, **options: Any) -> Masks:
        """Return the mask of the table."""
        return Masks(table=draw_mask(self, self.config.prompt_dropout, batch, *self.table.shape, **options))

    def forward(self, patches: Tensor | None = None, masks: Masks | None = None, **shared: Any) -> Tensor:
        """Return the prompts (1, P, C), or (B, P, C) where dropout makes them differ by image."""
        prompts = self.table.unsqueeze(0).clone()  # FSDP frees what it gathered when this call ends
        return prompts if masks is None or masks.table is None else prompts * masks.table

    def plain(self) -> PlainPrompts | None:
        """Return the table."""
        return PlainPrompts(
            self.num_prompts, table=self()[0], rates=(self.rate(self.config.prompt_dropout), 0.0, 0.0)
        )

    def official_names(self, number: int) -> dict[str, str | tuple[str, int]]:
        """Return the name of the first table, or the row of the others."""
        return {"table": (FIRST, 0) if number == 0 else (OTHERS, number - 1)}

    @classmethod
    def official_count(cls, state: Mapping[str, Tensor]) -> int:
        """Return how many tables a state dict of the public implementation has."""
        others = stored_shape(state, OTHERS, 3)
        return (FIRST in state) + (others[0] if others else 0)

    @classmethod
    def official_options(cls, state: Mapping[str, Tensor]) -> dict[str, object]:
        """Return the options that the tensors tell."""
        table = stored_shape(state, FIRST, 3)
        return {"num_prompts": table[1]} if table else {}
