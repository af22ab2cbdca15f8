"""timm's NaFlexVit at a fixed grid; its blocks are those of VisionTransformer or Eva."""

from collections.abc import Callable
from typing import Any

from timm.models import get_model_traits
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from .base import Family, Size, TimmViT, patch_size, register
from .positions import Positions


@register
class NaFlexVitFamily(Family):
    """NaFlexVit."""

    timm_class = NaFlexVit
    timm_modules = ("naflexvit",)
    examples = "at a fixed grid"

    def patch_embed(self, model: TimmViT) -> Any:
        """Return ``embeds``, which adds the positions too."""
        return model.embeds

    def image_size(self, model: TimmViT) -> Size:
        """Return the size that timm was asked for, else that of the grid of positions, which is its own."""
        configured = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        size = get_model_traits(model).get("img_size") or (configured and configured[-2:])
        if size:
            height, width = size
            return height, width
        rows, columns = self.patch_embed(model).pos_embed_grid_size or (0, 0)
        patch_height, patch_width = patch_size(model)
        return rows * patch_height, columns * patch_width

    def takes_any_grid(self, model: TimmViT) -> bool:
        """Return True."""
        return True

    def resize(self, model: TimmViT, size: Size, patch: Size, old_size: Size, old_patch: Size) -> None:
        """Raise if the patches change. Another image size needs no change."""
        if patch != old_patch:
            raise ValueError("patch_size can't be changed on a NaFlexVit backbone; make a new one")

    def embed(
        self, model: Any, images: Tensor, embed_patches: Callable[[nn.Module, Tensor], Tensor]
    ) -> tuple[Tensor, Positions]:
        """Return tokens and positions, rotary ones if the model has them."""
        embedded = model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
        return embedded["patches"], Positions(embedded["rope_embeds"], model.rope_is_mixed)

    def pool(self, model: Any, tokens: Tensor, pool_type: str | None) -> Any:
        """Call ``_pool``."""
        return model._pool(tokens, pool_type)
