"""timm's Beit: a relative position bias of the attention scores, which is zero for prompts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import global_pool_nlc
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from ..modules import remember_forward
from .base import Family, TimmViT, register
from .positions import Positions, pad_bias


class BeitAttention(Attention):
    """timm's attention with a relative position bias, for sequences with prompts, whose bias is zero.

    It takes the biases as they are for a sequence without prompts, and knows the number of prompts from the
    sequence: they stand between the CLS token and the patch tokens.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """As timm's."""
        own, shared = self.relative_position_index, shared_rel_pos_bias
        if own is None and shared is None:
            return super().forward(x)
        count = x.shape[1] - (shared if own is None else own).shape[-1]
        if count == 0:
            return super().forward(x, shared_rel_pos_bias=shared)
        outer, _prompts_in_sequence.count = _prompts_in_sequence.count, count
        try:
            shared = None if shared is None else pad_bias(shared, count, num_prefix=1)
            return super().forward(x, shared_rel_pos_bias=shared)
        finally:
            _prompts_in_sequence.count = outer

    def score_bias(self) -> Tensor | None:
        """Return (1, h, T, T), added to the scores of a sequence without prompts, or None."""
        return self._get_rel_pos_bias() if self.window_size else None

    def _get_rel_pos_bias(self) -> Tensor:
        return pad_bias(super()._get_rel_pos_bias(), _prompts_in_sequence.count, num_prefix=1)


class _PromptsInSequence(threading.local):
    """How many prompts the sequence holds that a BeitAttention of this thread is called with."""

    count: int = 0


_prompts_in_sequence = _PromptsInSequence()


remember_forward(Attention)  # which BeitAttention calls


@register
class BeitFamily(Family):
    """Beit."""

    timm_class = Beit
    timm_modules = ("beit",)
    examples = "BEiT, BEiT v2"
    blocks = (Block,)
    attentions = (BeitAttention,)

    def prepare(self, model: TimmViT) -> None:
        """Make every attention a BeitAttention."""
        for module in model.modules():
            if type(module) is Attention:
                module.__class__ = BeitAttention

    def embed(
        self, model: Any, images: Tensor, embed_patches: Callable[[nn.Module, Tensor], Tensor]
    ) -> tuple[Tensor, Positions]:
        """Return tokens, and the bias that all blocks share if there is one."""
        patches = embed_patches(model.patch_embed, images)
        tokens = torch.cat([model.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        bias = None if model.rel_pos_bias is None else model.rel_pos_bias()
        return model.pos_drop(tokens), Positions(bias=bias)

    def call_block(self, block: nn.Module, index: int, tokens: Tensor, positions: Positions) -> Any:
        """Call the block with the shared bias, from which BeitAttention knows the number of prompts."""
        return block(tokens, shared_rel_pos_bias=positions.bias)

    def pool(self, model: TimmViT, tokens: Tensor, pool_type: str | None) -> Any:
        """Pool as ``forward_head`` does; timm's Beit has no method of its own for it."""
        kind = model.global_pool if pool_type is None else pool_type
        return global_pool_nlc(tokens, kind, num_prefix_tokens=model.num_prefix_tokens)
