"""prompt_projector in PyTorch operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...activations import ACTIVATIONS
from .op import Arguments

__all__ = ["compute"]


def compute(args: Arguments) -> tuple[Tensor]:
    """prompts; see vapt_fast.ops.prompt_projector."""
    pooled = args.pooled if args.channel_mask is None else args.pooled * args.channel_mask
    prompts = t = pooled + args.bias.unsqueeze(-1)
    if args.down is not None and args.up is not None:
        features = ACTIVATIONS[args.activation](t @ args.down.mT)
        if args.feature_mask is not None:
            features = features * args.feature_mask
        scale: Tensor | float = args.factor if args.scale is None else args.scale.view(-1, 1, 1)
        prompts = t + (features @ args.up.mT) * scale
    if args.eps is not None:
        affine = (args.norm_weight, args.norm_bias)
        weight, bias = (None if t is None else t.to(pooled.dtype) for t in affine)
        prompts = F.layer_norm(prompts, prompts.shape[-1:], weight, bias, args.eps)
    return (prompts.to(args.dtype),)
