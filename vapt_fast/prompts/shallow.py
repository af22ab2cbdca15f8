"""One learned table, placed before block 0, whose tokens travel through all blocks: VPT-shallow."""

from __future__ import annotations

from ..config import PromptConfig
from .base import BlockPrompts, Geometry, NoPrompts, register_kind
from .deep import StaticPrompts

__all__ = ["ShallowPrompts"]


@register_kind("shallow", method="vpt-shallow", title="VPT-shallow")
class ShallowPrompts(StaticPrompts):
    """A learned table of prompts (P, C) for block 0 (Jia et al. 2022)."""

    travels = True
    official_names = StaticPrompts.official_names

    @classmethod
    def make(cls, config: PromptConfig, index: int, num_prompts: int, geometry: Geometry) -> BlockPrompts:
        """Return the table of block 0; the others have none.

        Raises:
            ValueError: ``num_prompts`` names prompts for another block.
        """
        if index == 0:
            return cls(config, num_prompts, geometry)
        if isinstance(config.num_prompts, int):
            return NoPrompts()
        raise ValueError(
            f"num_prompts must be an int, or 0 after block 0, for kind {config.kind!r}, "
            f"got {config.num_prompts}"
        )
