"""mlp in PyTorch operations."""

from __future__ import annotations

import torch.nn.functional as F

from .op import Arguments, Outputs

__all__ = ["compute"]


def compute(args: Arguments) -> Outputs:
    """y; see vapt_fast.ops.mlp."""
    hidden = F.gelu(F.linear(args.x, args.fc1_weight, args.fc1_bias))
    return Outputs(F.linear(hidden, args.fc2_weight, args.fc2_bias))
