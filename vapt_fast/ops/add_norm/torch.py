"""add_norm in PyTorch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..residual import add_residual
from .op import Arguments, Outputs

__all__ = ["compute"]


def compute(args: Arguments) -> Outputs:
    """total and normed; see vapt_fast.ops.add_norm."""
    total, dtype = add_residual(args.x, args.branch, args.layer_scale), args.dtype
    # In the tokens' own dtype PyTorch rounds once. Where another one is in play, in float32.
    affine = [] if args.weight is None else [args.weight, args.bias]
    same = all(other == total.dtype for other in (dtype, *(t.dtype for t in affine)))
    within = total.dtype if same else torch.promote_types(total.dtype, torch.float32)
    normed = F.layer_norm(total.to(within), total.shape[-1:], *(t.to(within) for t in affine), eps=args.eps)
    return Outputs(total, normed.to(dtype))
