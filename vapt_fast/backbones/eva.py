"""timm's Eva: rotary position embeddings, which prompts are not given."""

from collections.abc import Callable
from typing import Any

from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from .base import Family, register
from .positions import Positions


@register
class EvaFamily(Family):
    """Eva."""

    timm_class = Eva
    timm_modules = ("eva",)
    examples = "EVA02, DINOv3, PE, RoPE ViTs"
    blocks = (EvaBlock,)
    attentions = (AttentionRope, EvaAttention)

    def embed(
        self, model: Any, images: Tensor, embed_patches: Callable[[nn.Module, Tensor], Tensor]
    ) -> tuple[Tensor, Positions]:
        """Return tokens and rotary positions; "mixed" ones differ by block."""
        tokens, rope = model._pos_embed(embed_patches(model.patch_embed, images))
        return model.norm_pre(tokens), Positions(rope, model.rope_mixed)
