"""DeiT with a distillation token: two classifiers, each of which reads its own token."""

from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from .base import Family, TimmViT, register


@register
class DistilledFamily(Family):
    """VisionTransformerDistilled."""

    timm_class = VisionTransformerDistilled
    timm_modules = ("deit",)
    examples = "DeiT with two heads"
    head_names = ("head", "head_dist")

    def head_inputs(self, model: TimmViT, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the first two tokens."""
        return model.head_drop(tokens[:, 0]), model.head_drop(tokens[:, 1])

    def num_pooled_rows(self, model: TimmViT) -> int:
        """Return 2."""
        return 2
