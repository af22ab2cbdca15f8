"""Adapters to serve, and a stack for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_adapters import timm_model

from vapt_fast import AdapterStack, AdaptiveViT

MOST_CLASSES = 5
PROMPTS = {"num_prompts": 2, "projector_dim": 2}


def make_stack(capacity: int) -> AdapterStack:
    """An empty stack on ``timm_model()``."""
    model = AdaptiveViT(timm_model(), **PROMPTS)
    return AdapterStack(model, capacity=capacity, max_classes=MOST_CLASSES)


def save_adapter(folder: Path, seed: int, num_classes: int = 3, **options: Any) -> AdaptiveViT:
    """Write an adapter for ``timm_model()`` whose answers are its own, and return its model, in eval mode."""
    model = AdaptiveViT(timm_model(), num_classes=num_classes, **PROMPTS).eval()
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        for _, parameter in model.named_adapter_parameters():
            parameter.normal_()
    names = [f"{seed}-{index}" for index in range(num_classes)]
    model.save_adapter(folder, **{"class_names": names} | options)
    model.class_names = tuple(names)
    return model
