"""Tiny models of the methods' public implementation: weights, input, and what it computed in float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vapt_fast import AdaptiveViT, PromptConfig, from_official, to_official

FOLDER = Path(__file__).parents[1] / "adapters" / "golden"
OPTIONS = {
    "official_vapt_default": PromptConfig(num_prompts=5),
    "official_vapt_variant": PromptConfig(
        num_prompts=4,
        static_depth=2,
        conv_kernel=3,
        conv_shared=False,
        projector_activation="gelu",
        projector_shared=False,
        projector_scale_learnable=True,
    ),
}


class Golden:
    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.config = json.loads(file.metadata()["config"])
        self.state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        self.grads = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
        self.image, self.target = tensors["image"].double(), tensors["target"]
        self.logits, self.loss = tensors["logits"], tensors["loss"]
        self.prompts = OPTIONS[name]

    def model(self) -> AdaptiveViT:
        return from_official(self.state, num_heads=self.config["num_heads"], prompts=self.prompts)


def official_grads(model: AdaptiveViT) -> dict[str, Tensor]:
    """The gradients of ``model`` under the public names: those of a copy that has them for weights."""
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for own, parameter in zip(shadow.parameters(), model.parameters(), strict=True):
            own.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return to_official(shadow)
