"""timm's VisionTransformer, with most of its architectures; its positions are added before block 0."""

from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vitamin import GeGluMlp

from .base import Family, register


@register
class VisionTransformerFamily(Family):
    """VisionTransformer is what the methods of Family are written for."""

    timm_class = VisionTransformer
    timm_modules = ("deit", "vision_transformer", "vision_transformer_hybrid", "vitamin")
    examples = "ViT, DeiT, CLIP, SigLIP, DINOv2, MAE, hybrids, ViTamin, ..."
    blocks = (Block,)
    attentions = (Attention,)
    layers = (GeGluMlp,)
