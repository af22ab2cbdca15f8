"""The activations of the feature projector, by the names that PromptConfig takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS"]


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,  # exact (erf), as everywhere in timm's ViTs
    "sigmoid": torch.sigmoid,
    "softmax": partial(F.softmax, dim=-1),
    "identity": _identity,
}
