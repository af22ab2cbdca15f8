"""Small models, recipes and data for the tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vapt_fast import PromptConfig
from vapt_fast.training import Recipe, build_model
from vapt_fast.training.loader import LabelledImages, in_memory
from vapt_fast.training.methods import trained_state

BACKBONE = "vit_digits_patch4_32"
CLASSES = 3


class Stop(Exception):
    """What stops a run in a test."""


def stop(*_: Any) -> None:
    raise Stop


def make_model(method: str = "vapt") -> nn.Module:
    return build_model(method, BACKBONE, CLASSES, prompts=PromptConfig(num_prompts=2))


def recipes(*base_lrs: float, epochs: int = 3, **options: Any) -> list[Recipe]:
    return [Recipe(lr, epochs=epochs, warmup_epochs=1, batch_size=5, **options) for lr in base_lrs]


def rows(dataset: LabelledImages) -> set[bytes]:
    """The images of a data set as comparable values."""
    return {image.numpy().tobytes() for image, _ in in_memory(dataset)}


def noise(low: int = 0, high: int = 255, seed: int = 0) -> Image.Image:
    """An image of 60 x 50 pixels, none like another."""
    return Image.fromarray(np.random.default_rng(seed).integers(low, high, (50, 60, 3), dtype=np.uint8))


def assert_same_training(model: nn.Module, other: nn.Module) -> None:
    """What was trained is the same to the last bit."""
    ours, theirs = trained_state(model), trained_state(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
