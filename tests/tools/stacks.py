"""Adapters to serve, and the slow and obvious way to hold several of them on one backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from small_adapters import timm_model
from torch import Tensor, nn

from vapt_fast import AdapterError, AdaptiveViT, adapters

MOST_CLASSES = 5


class LoopStack(nn.Module):
    """What AdapterStack is, with a model for each adapter and a call for each group of a batch."""

    def __init__(self, capacity: int, max_classes: int = MOST_CLASSES) -> None:
        super().__init__()
        self.capacity, self.max_classes = capacity, max_classes
        self.models: dict[str, AdaptiveViT] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.models)

    def load_adapter(self, folder: Path, *, name: str) -> None:
        if adapters.read_config(folder)["prompts"]["num_prompts"] != 2:
            raise AdapterError("does not fit", ["num_prompts differs"])
        model = AdaptiveViT.from_adapter(folder, backbone=timm_model())
        if model.num_classes > self.max_classes:
            raise AdapterError("does not fit", [f"num_classes {model.num_classes} > {self.max_classes}"])
        if name not in self.models and len(self.models) == self.capacity:
            raise AdapterError("does not fit", ["the stack is full"])
        self.models[name] = model

    def delete_adapter(self, name: str) -> None:
        del self.models[name]

    def info(self, name: str) -> Any:
        model = self.models[name]
        return SimpleNamespace(num_classes=model.num_classes, class_names=model.class_names)

    def transform(self, name: str) -> Any:
        return self.models[name].transform()

    def forward(self, images: Tensor, adapter_names: Sequence[str]) -> Tensor:
        logits = torch.full((len(images), self.max_classes), -torch.inf)
        for name in set(adapter_names):
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            own = self.models[name](images[rows])
            logits[rows, : own.shape[1]] = own
        return logits


def save_adapter(folder: Path, seed: int, num_classes: int = 3, **options: Any) -> AdaptiveViT:
    """Write an adapter for ``timm_model()`` whose answers are its own, and return its model, in eval mode."""
    model = AdaptiveViT(timm_model(), num_prompts=2, projector_dim=2, num_classes=num_classes).eval()
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        for _, parameter in model.named_adapter_parameters():
            parameter.normal_()
    names = [f"{seed}-{index}" for index in range(num_classes)]
    model.save_adapter(folder, **{"class_names": names} | options)
    model.class_names = tuple(names)
    return model
