"""prompt_projector: the bottleneck MLP with its residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import ACTIVATIONS

__all__ = ["prompt_projector"]


def prompt_projector(
    t: Tensor, down: Tensor, up: Tensor, scale: Tensor | float, mask: Tensor | None, activation: str
) -> Tensor:
    """See vapt_fast.functional.prompt_projector."""
    with torch.autocast(t.device.type, enabled=False):
        hidden = ACTIVATIONS[activation](F.linear(t, down.to(t.dtype)))
        if mask is not None:
            hidden = hidden * mask
        return t + scale * F.linear(hidden, up.to(t.dtype))
