"""prompt_projector in PyTorch operations."""

from __future__ import annotations

import torch.nn.functional as F

from ...activations import ACTIVATIONS
from .op import Arguments, Outputs

__all__ = ["compute"]


def compute(args: Arguments) -> Outputs:
    """prompts; see vapt_fast.ops.prompt_projector."""
    pooled = args.pooled if args.channel_mask is None else args.pooled * args.channel_mask
    prompts = t = pooled + args.bias.unsqueeze(-1)
    if args.down is not None:
        features = ACTIVATIONS[args.activation](F.linear(t, args.down))
        if args.feature_mask is not None:
            features = features * args.feature_mask
        scale = args.factor if args.scale is None else args.scale
        prompts = t + scale * F.linear(features, args.up)
    if args.eps is not None:
        affine = (args.norm_weight, args.norm_bias)
        affine = () if args.norm_weight is None else (weight.to(pooled.dtype) for weight in affine)
        prompts = F.layer_norm(prompts, prompts.shape[-1:], *affine, eps=args.eps)
    return Outputs(prompts.to(args.dtype))
