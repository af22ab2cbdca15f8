"""mlp in PyTorch operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..linear import linear
from .op import Arguments

__all__ = ["compute"]


def compute(args: Arguments) -> tuple[Tensor]:
    """y; see vapt_fast.ops.mlp."""
    hidden = F.gelu(linear(args.x, args.fc1_weight, args.fc1_bias))
    return (linear(hidden, args.fc2_weight, args.fc2_bias),)
