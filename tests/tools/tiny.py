"""timm's architectures shrunk to nothing, with weights that leave no part of them without effect."""

from __future__ import annotations

import copy
import fnmatch
from typing import Any

import timm
import torch
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

from vapt_fast import AdaptiveViT, PromptConfig, use_backend
from vapt_fast.backbones import head_names, patch_size

# Three blocks: the first, one in between, the last.
WIDTH = {"embed_dim": 32, "depth": 3, "num_heads": 2}
VITAMIN_STEM = VitCfg(
    embed_dim=(8, 16, 32),
    depths=(1, 1, 1),
    stem_width=8,
    conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    head_type="1d",
)

# What else an architecture needs to shrink, by its name. An image is 2 x 3 patches unless it says otherwise.
SHRINK: dict[str, dict[str, Any]] = {
    # one number of key heads for each block: all, then grouped
    "vit_*_sapiens2": {"num_kv_heads": (2, 1, 1)},
    # the width is that of the convolutional stem
    "vitamin_*": {"embed_cfg": VITAMIN_STEM},
    # the stem's width is fixed in the entrypoint
    "vit_base_mci_224": {"embed_dim": 768, "mlp_ratio": 0.25, "img_size": (32, 48)},
    # a whole ResNet, fixed in the entrypoint and slow to make, so it is made only once
    "vit_*_r*_s32_*": {"img_size": (64, 96)},
    "vit_*_resnet??d_224": {"img_size": (64, 96)},
    "vit_*_r50_s16_*": {"img_size": (32, 48)},
    "vit_*_resnet50d_s16_224": {"img_size": (32, 48)},
    # a table of 128 x 128 positions, resampled for the image
    "naflexvit_*_radio_*": {"pos_embed_grid_size": (4, 4)},
}


def tiny_backbone(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """timm's ``name``, shrunk: float64, eval mode, every part of it has an effect."""
    torch.manual_seed(seed)
    shrunk = WIDTH | {"num_classes": 3}
    for pattern, special in SHRINK.items():
        if fnmatch.fnmatchcase(name, pattern):
            shrunk |= special
    shrunk |= options
    if "img_size" not in shrunk:
        height, width = patch_size(timm.create_model(name, **shrunk))
        shrunk["img_size"] = (2 * height, 3 * width)
    backbone = timm.create_model(name, **shrunk)
    randomize(backbone, seed)
    return backbone.double().eval()


def tiny_model(name: str, seed: int = 0, prompts: PromptConfig | None = None, **options: Any) -> AdaptiveViT:
    """An AdaptiveViT on ``tiny_backbone``, in eval mode, that has learned something."""
    if prompts is None:
        prompts = PromptConfig(num_prompts=3, projector_dim=4)
    model = AdaptiveViT(tiny_backbone(name, seed, **options), prompts=prompts).double().eval()
    randomize(model.prompts, seed + 1)
    return model


def bare(model: AdaptiveViT) -> nn.Module:
    """timm's own model: a copy of the backbone with the model's head."""
    backbone = copy.deepcopy(model.backbone)
    backbone.num_classes = model.num_classes
    for name in head_names(backbone):
        setattr(backbone, name, copy.deepcopy(getattr(model.adapters["default"], name)))
    return backbone


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Add noise to every parameter: position tables, layer scales and the like may start at zero.

    But not to the convolutional stem of a hybrid, whose norms have no batch to hold the noise down.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if not name.startswith("patch_embed.backbone."):
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter))


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def tiny_images(model: AdaptiveViT, seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *model.pretrained_cfg["input_size"])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(next(model.parameters()))


def run(model: AdaptiveViT, images: Tensor, backend: str = "torch", seed: int = 0) -> dict[str, Tensor]:
    """The logits and the gradient of every trainable parameter; dropouts are drawn with ``seed``."""
    torch.manual_seed(seed)
    model.zero_grad()
    with use_backend(backend):
        logits = model(images)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights.cos()).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach()} | gradients


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Every tensor is within ``tolerance`` of the expected one, relative to its largest value or to 1."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name] is not None, f"{name} has no gradient"
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        error = (actual[name] - tensor).abs().max().item() / max(1.0, tensor.abs().max().item())
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def assert_alike(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """The same numbers; no gradient where the literal method gives none."""
    unused = {name for name, tensor in expected.items() if tensor is None}
    assert unused == {name for name, tensor in actual.items() if tensor is None}
    assert_same(*({n: t for n, t in results.items() if n not in unused} for results in (actual, expected)))
