"""absorbed_attention in PyTorch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Arguments

__all__ = ["compute"]


def compute(args: Arguments) -> tuple[Tensor]:
    """y; see vapt_fast.ops.absorbed_attention."""
    u, num_prompts = args.u, args.prompts.shape[1]
    x, prompts = args.x.to(u.dtype), args.prompts.to(u.dtype).expand(u.shape[0], -1, -1)
    exists = None
    if args.prompt_lengths is not None:
        exists = torch.arange(num_prompts, device=u.device) < args.prompt_lengths[:, None]
        prompts = torch.where(
            exists[:, :, None], prompts, 0
        )  # a weight of 0 does not silence NaN or infinity
    prompt_scores, scores = u @ prompts.transpose(1, 2), u @ x.transpose(1, 2)
    if exists is not None:
        prompt_scores = torch.where(exists[:, None], prompt_scores, -torch.inf)
    if args.bias is not None:
        scores = scores + args.bias
    p = torch.cat([prompt_scores, scores], dim=-1).softmax(dim=-1)
    return (p[..., :num_prompts] @ prompts + p[..., num_prompts:] @ x,)
