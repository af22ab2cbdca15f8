"""prompt_projector: the bottleneck MLP with its residual, between the prompts' bias and the block's norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import ACTIVATIONS

__all__ = ["prompt_projector"]


def prompt_projector(
    pooled: Tensor,
    bias: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    scale: Tensor | float,
    channel_mask: Tensor | None,
    feature_mask: Tensor | None,
    activation: str,
    eps: float | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See vapt_fast.functional.prompt_projector."""
    own = pooled.dtype
    with torch.autocast(pooled.device.type, enabled=False):
        if channel_mask is not None:
            pooled = pooled * channel_mask.to(own)
        prompts = t = pooled + bias.to(own).unsqueeze(-1)
        if down is not None:
            features = ACTIVATIONS[activation](F.linear(t, down.to(own)))
            if feature_mask is not None:
                features = features * feature_mask.to(own)
            factor = scale.to(own) if isinstance(scale, Tensor) else scale
            prompts = t + factor * F.linear(features, up.to(own))
        if eps is not None:
            affine = () if norm_weight is None else (norm_weight.to(own), norm_bias.to(own))
            prompts = F.layer_norm(prompts, prompts.shape[-1:], *affine, eps=eps)
        return prompts.to(dtype)
