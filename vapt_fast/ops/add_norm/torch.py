"""add_norm in PyTorch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..residual import add_residual
from .op import Arguments

__all__ = ["compute"]


def compute(args: Arguments) -> tuple[Tensor, Tensor]:
    """total and normed; see vapt_fast.ops.add_norm."""
    total, dtype = add_residual(args.x, args.branch, args.layer_scale), args.dtype
    # In the tokens' own dtype PyTorch rounds once. Where another one is in play, in float32.
    affine = (args.weight, args.bias)
    same = all(other == total.dtype for other in (dtype, *(t.dtype for t in affine if t is not None)))
    within = total.dtype if same else torch.promote_types(total.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(within) for t in affine)
    normed = F.layer_norm(total.to(within), total.shape[-1:], weight, bias, args.eps)
    return total, normed.to(dtype)
