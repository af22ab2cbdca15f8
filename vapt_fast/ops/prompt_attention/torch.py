"""prompt_attention by PyTorch's own attention, over concatenated keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Arguments

__all__ = ["compute"]


def compute(args: Arguments) -> tuple[Tensor]:
    """out; see vapt_fast.ops.prompt_attention."""
    q, k, v, prompt_k, prompt_v, bias, prompt_lengths, scale = args
    num_tokens, num_prompts = k.shape[1], prompt_k.shape[1]
    mask = None if bias is None else bias.to(q.dtype)
    if num_prompts:
        batch = k.shape[0]
        if mask is not None:
            mask = F.pad(mask, (num_prompts, 0))
        if prompt_lengths is not None:
            exists = torch.arange(num_prompts, device=q.device) < prompt_lengths[:, None]
            # A weight of 0 does not silence NaN or infinity.
            prompt_k, prompt_v = (torch.where(exists[:, :, None, None], t, 0) for t in (prompt_k, prompt_v))
            # (B, 1, 1, P + T): broadcast by the kernel, which on a CPU costs 3%; expanded it costs up to 20%.
            seen = F.pad(exists, (0, num_tokens), value=True)[:, None, None]
            # A sum with the bias takes a quarter of the time that masked_fill takes on a CPU.
            mask = seen if mask is None else mask + torch.where(seen, 0.0, -torch.inf).to(q.dtype)
        k = torch.cat([prompt_k.expand(batch, -1, -1, -1), k], dim=1)
        v = torch.cat([prompt_v.expand(batch, -1, -1, -1), v], dim=1)
    repeats = q.shape[2] // k.shape[2]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return (out.transpose(1, 2),)
