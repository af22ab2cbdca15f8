"""The image towers of open_clip, as timm models with the same weights."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

__all__ = ["as_timm_model"]

# timm's entrypoints of CLIP's image tower, by activation; sizes are given as keywords.
_NAMES = {"GELU": "vit_base_patch16_clip_224", "QuickGELU": "vit_base_patch16_clip_quickgelu_224"}


def as_timm_model(visual: Any) -> nn.Module:
    """Return open_clip's own VisionTransformer as a timm model, whose head is CLIP's projection.

    Raises:
        NotImplementedError: a tower that timm's CLIP models can't be.
    """
    problems = _differences(visual)
    if not problems:
        blocks = visual.transformer.resblocks
        model: Any = timm.create_model(
            _NAMES[type(blocks[0].mlp.gelu).__name__],
            img_size=tuple(visual.image_size),
            patch_size=tuple(visual.patch_size),
            embed_dim=visual.conv1.out_channels,
            depth=len(blocks),
            num_heads=blocks[0].attn.num_heads,
            mlp_ratio=blocks[0].mlp.c_fc.out_features / visual.conv1.out_channels,
            num_classes=visual.output_dim,
        )
        state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
        state = checkpoint_filter_fn(state, model)
        problems = _misfits(state, model)
    if problems:
        raise NotImplementedError(
            f"open_clip's image tower can't be made in timm: {'; '.join(problems)}. Take a model whose tower "
            "is timm's, such as ViT-B-16-SigLIP2, or a plain CLIP, such as ViT-B-16"
        )
    weight = visual.conv1.weight
    model.to(weight.device, weight.dtype).load_state_dict(state)
    return model.eval()


def _differences(visual: Any) -> list[str]:
    """Return what is not as in CLIP, besides the weights' names and shapes."""
    if type(visual).__name__ != "VisionTransformer":
        return [f"it is a {type(visual).__name__}"]
    expected = {"attn_pool": None, "final_ln_after_pool": False, "pool_type": "tok"}
    problems = [
        f"{name} is {getattr(visual, name)}"
        for name, value in expected.items()
        if getattr(visual, name) != value
    ]
    if not isinstance(visual.patch_dropout, nn.Identity):
        problems.append("it drops patches")
    block = visual.transformer.resblocks[0]
    if not isinstance(getattr(block, "attn", None), nn.MultiheadAttention):
        problems.append("its attention is not standard")
    elif type(block.mlp.gelu).__name__ not in _NAMES:
        problems.append(f"its activation is {type(block.mlp.gelu).__name__}")
    if any(norm.eps != 1e-5 for norm in visual.modules() if isinstance(norm, nn.LayerNorm)):
        problems.append("its LayerNorms have another eps than 1e-5")
    return problems


def _misfits(state: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    own = model.state_dict()
    names = sorted(own.keys() ^ state.keys())
    names += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    return [f"the weights {names} have no counterpart"] if names else []
