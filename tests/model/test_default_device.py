"""PyTorch's default device has no say in what is computed from a model and images that are somewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import Tensor

from vapt_fast import AdaptiveViT, explain
from vapt_fast.accounting import account

VIT = "vit_tiny_patch16_224"


def training_step(model: AdaptiveViT, images: Tensor) -> Any:
    torch.manual_seed(0)
    model.zero_grad()
    model.train()(images).sum().backward()
    return [p.grad for p in model.trainable_parameters()]


def mixed_batch(model: AdaptiveViT, images: Tensor) -> Any:
    torch.manual_seed(0)
    with torch.device("cpu"):
        model.add_adapter("other", num_prompts=2)
    return [model.train()(images, adapter_names=["default", "other"])]


def tables_from_data(model: AdaptiveViT, images: Tensor) -> Any:
    model.init_from_data([images])
    return [p.detach() for p in model.prompts.parameters()]


def deletion(model: AdaptiveViT, images: Tensor) -> Any:
    maps = images.mean(1).unfold(1, 16, 16).unfold(2, 16, 16).mean((-1, -2))
    return list(explain.deletion(model, images, maps, steps=2))


def costs(model: AdaptiveViT, images: Tensor) -> Any:
    return [torch.tensor(astuple(account(model).rewritten), device="cpu")]


@pytest.mark.parametrize("compute", [training_step, mixed_batch, tables_from_data, deletion, costs])
def test_it_has_no_say(compute: Callable[[AdaptiveViT, Tensor], list[Tensor]]) -> None:
    """On one where nothing can be computed."""
    models = [tiny_model(VIT) for _ in range(2)]
    images = tiny_images(models[0])
    expected = compute(models[0], images)
    with torch.device("meta"):
        actual = compute(models[1], images)
    assert len(actual) == len(expected) > 0
    assert all(map(torch.equal, actual, expected))
