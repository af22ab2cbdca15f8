"""The demo's backbone: a small Vision Transformer, pre-trained on the digits 0 to 4 and known to timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

__all__ = ["WEIGHTS", "vit_digits_patch4_32"]

WEIGHTS = Path(__file__).with_name("vit_digits_patch4_32.safetensors")

default_cfgs = generate_default_cfgs(
    {
        "vit_digits_patch4_32": {
            "file": str(WEIGHTS),
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "num_classes": 20,  # five digits, each in four rotations
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
            "description": "Pre-trained on scikit-learn's digits 0 to 4; see vapt_fast.demo.pretrain.",
        }
    }
)


@register_model
def vit_digits_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Return a Vision Transformer for 32 x 32 images: patches of 4 x 4, 64 channels, 4 blocks, 2 heads.

    Args:
        pretrained: load the weights that come with this package. They were trained on the digits 0 to 4
            only, so the digits 5 to 9 are new to them.
        **kwargs: as for every model of ``timm.create_model``; they override the numbers above.
    """
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_digits_patch4_32",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # resamples the positions for images of another size
        **{**options, **kwargs},
    )
