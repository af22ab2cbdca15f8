"""add_norm: a branch added to the tokens, and their LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autocast import autocast_dtype

__all__ = ["add_norm", "add_residual"]


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See vapt_fast.functional.add_norm."""
    total = add_residual(x, branch, layer_scale)
    normed_dtype = autocast_dtype(total.dtype, total.device)
    # In the tokens' own dtype PyTorch rounds once. Where another one is in play, in float32.
    affine = [] if weight is None else [weight, bias]
    same = all(dtype == total.dtype for dtype in (normed_dtype, *(t.dtype for t in affine)))
    dtype = total.dtype if same else torch.promote_types(total.dtype, torch.float32)
    with torch.autocast(total.device.type, enabled=False):
        normed = F.layer_norm(total.to(dtype), total.shape[-1:], *(t.to(dtype) for t in affine), eps=eps)
    return total, normed.to(normed_dtype)


def add_residual(x: Tensor, branch: Tensor | None, layer_scale: Tensor | None) -> Tensor:
    """x + layer_scale * branch, in the dtype of x + branch; x itself without branch."""
    if branch is None:
        return x
    added = branch if layer_scale is None else layer_scale * branch
    return (x + added).to(torch.promote_types(x.dtype, branch.dtype))
