"""Models with several adapters of every kind, and a batch in which each image has another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny import randomize, tiny_backbone, tiny_images
from torch import Tensor
from torch.nn.functional import pad

from vapt_fast import AdaptiveViT, PromptConfig

BASE = "__base__"
DROPOUT = {"prompt_dropout": 0.3, "projector_dropout": 0.5, "channel_dropout": 0.2}
SMALL = {"num_prompts": 3, "projector_dim": 4}

# By name: the prompts' options, and the number of classes.
STACKABLE: dict[str, tuple[dict[str, Any], int]] = {
    "default": (SMALL, 3),
    "more": ({"num_prompts": 5, "projector_dim": 2, "static_depth": 2, **DROPOUT}, 7),
    "depthwise": (SMALL | {"conv_shared": False, "conv_padding": 1, "static_depth": 0}, 2),
    "softmax": ({"num_prompts": 2, "projector_dim": 3, "projector_activation": "softmax", **DROPOUT}, 3),
    "sigmoid": (
        SMALL
        | {"projector_activation": "sigmoid", "projector_shared": False, "projector_scale_learnable": True},
        4,
    ),
    "plain": ({"num_prompts": (2, 0, 4), "conv_kernel": None, "projector_dim": None}, 3),
    "sum": (SMALL | {"add_table": True, **DROPOUT}, 3),
    "deep": ({"kind": "deep", "num_prompts": 4, "prompt_dropout": 0.4}, 1),
    "fourier": ({"kind": "fourier", "num_prompts": 4, "fourier_share": 0.5}, 3),
    "kv": ({"kind": "kv", "num_prompts": 3, "prompt_dropout": 0.3}, 5),
    "none": ({"num_prompts": 0}, 3),
}
# Those that rows of numbers can't tell.
OTHERS: dict[str, tuple[dict[str, Any], int]] = {"shallow": ({"kind": "shallow", "num_prompts": 2}, 4)}


def several(
    name: str = "vit_tiny_patch16_224",
    adapters: dict[str, tuple[dict[str, Any], int]] = STACKABLE,
    **options: Any,
) -> AdaptiveViT:
    """A tiny model in eval mode with these adapters, which have learned something."""
    first, *others = adapters.items()
    config, classes = first[1]
    backbone = tiny_backbone(name, num_classes=6, **options)
    model = AdaptiveViT(backbone, prompts=PromptConfig(**config), num_classes=classes).double().eval()
    for other, (config, classes) in others:
        model.add_adapter(other, PromptConfig(**config), num_classes=classes)
    if first[0] != "default":
        model.adapters[first[0]] = model.adapters["default"]
        model.set_adapter(first[0])
        model.delete_adapter("default")
    randomize(model.adapters, 1)
    return model


def mixed_batch(model: AdaptiveViT, size: int = 0) -> tuple[Tensor, list[str]]:
    """Images, and a name for each: every adapter twice and the bare backbone, or ``size`` of them."""
    names = [*model.adapters, BASE, *reversed(list(model.adapters))]
    names = names[: size or len(names)]
    return tiny_images(model, batch=len(names)), names


def one_by_one(model: AdaptiveViT, images: Tensor, names: Sequence[str]) -> Tensor:
    """The logits of each image by itself, filled up with -inf."""
    active, rows = model.active_adapter, []
    for image, name in zip(images, names, strict=True):
        if name == BASE:
            with model.disable_adapter():
                rows.append(model(image.unsqueeze(0)))
        else:
            model.set_adapter(name)
            rows.append(model(image.unsqueeze(0)))
    model.set_adapter(active)
    width = max(row.shape[1] for row in rows)
    return torch.cat([pad(row, (0, width - row.shape[1]), value=-torch.inf) for row in rows])


def places(model: AdaptiveViT, names: Sequence[str]) -> Tensor:
    """The names as integers."""
    known = list(model.adapters)
    return torch.tensor([-1 if name == BASE else known.index(name) for name in names])


def outcome(model: AdaptiveViT, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The logits of a call and all gradients; what stands for no logit is 0."""
    model.zero_grad()
    logits = call()
    known = logits.isfinite()
    assert not logits[~known].isnan().any()
    weights = (
        torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits).cos()
    )
    torch.where(known, logits * weights, 0).sum().backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {"logits": torch.where(known, logits, 0).detach(), "known": known.double()} | gradients
