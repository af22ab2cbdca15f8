"""Tiny models with something learned, and what tests of their adapters need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vapt_fast import AdaptiveViT, PromptConfig, adapters

CONFIG, WEIGHTS = adapters.CONFIG_NAME, adapters.WEIGHTS_NAME
SMALL = PromptConfig(num_prompts=2, projector_dim=2)
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2}
TINY = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


def make_backbone(
    seed: int = 0, family: type = VisionTransformer, num_classes: int = 3, **options: Any
) -> nn.Module:
    """A backbone that timm's registry did not make; only its head depends on ``num_classes``."""
    torch.manual_seed(seed)
    backbone = family(**VIT | {"num_classes": 3} | options)
    if num_classes != 3:
        backbone.reset_classifier(num_classes)
    return backbone


def make_model(config: PromptConfig = SMALL, seed: int = 0, **options: Any) -> AdaptiveViT:
    """A tiny model: the seed is that of what it has learned, the backbone is always the same."""
    model = AdaptiveViT(make_backbone(**options), prompts=config)
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        for _, parameter in model.named_adapter_parameters():
            parameter.normal_()
    return model


def timm_model(seed: int = 0, name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """A backbone that timm's registry made."""
    torch.manual_seed(seed)
    return timm.create_model(name, **TINY | {"num_classes": 3} | options)


def learned(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.adapter_state().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit-equal, NaN included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].flatten().view(torch.uint8).equal(right[name].flatten().view(torch.uint8))
        for name in left
    )


def forge(config: dict[str, Any], tensors: dict[str, Tensor], *, checksum: bool = True) -> dict[str, bytes]:
    """The contents of both files with another config, whose checksum is made right."""
    if checksum:
        config["config_sha256"] = adapters.file.config_sha256(config)
    text = json.dumps(config)
    return {CONFIG: text.encode(), WEIGHTS: safetensors.torch.save(tensors, {"adapter_config": text})}


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any], *, checksum: bool = True) -> None:
    """Forge an adapter: change its config in both files."""
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    for name, content in forge(config, tensors, checksum=checksum).items():
        (folder / name).write_bytes(content)
