"""prompt_attention by PyTorch's own attention, over concatenated keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Arguments

__all__ = ["compute"]


def compute(args: Arguments) -> tuple[Tensor]:
    """out; see vapt_fast.ops.prompt_attention."""
    q, k, v, prompt_k, prompt_v, bias, scale = args
    num_prompts = prompt_k.shape[1]
    if num_prompts:
        batch = k.shape[0]
        k = torch.cat([prompt_k.expand(batch, -1, -1, -1), k], dim=1)
        v = torch.cat([prompt_v.expand(batch, -1, -1, -1), v], dim=1)
        if bias is not None:
            bias = F.pad(bias, (num_prompts, 0))
    repeats = q.shape[2] // k.shape[2]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    if bias is not None:
        bias = bias.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=scale
    )
    return (out.transpose(1, 2),)
