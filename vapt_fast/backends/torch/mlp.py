"""mlp: two linear layers with GELU between them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["mlp"]


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> Tensor:
    """See vapt_fast.functional.mlp."""
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
