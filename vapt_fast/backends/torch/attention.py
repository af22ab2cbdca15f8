"""prompt_attention and cls_attention on PyTorch's own attention and batched products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cls_attention", "prompt_attention"]


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """See vapt_fast.functional.prompt_attention."""
    num_prompts = prompt_k.shape[1]
    if num_prompts:
        batch = k.shape[0]
        k = torch.cat([prompt_k.expand(batch, -1, -1, -1), k], dim=1)
        v = torch.cat([prompt_v.expand(batch, -1, -1, -1), v], dim=1)
        if bias is not None:
            bias = F.pad(bias, (num_prompts, 0))
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    if bias is not None:
        bias = bias.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=scale
    )
    return out.transpose(1, 2)


def cls_attention(
    q: Tensor,
    x: Tensor,
    prompts: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """See vapt_fast.functional.cls_attention."""
    batch, rows, heads, _ = q.shape
    num_prompts = prompts.shape[1]
    # The scores pass through one more product than usual, and there are few of them: at least float32.
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        x, prompts = x.to(dtype), prompts.to(dtype).expand(batch, -1, -1)
        # u_m = Wk_m^T q_m: the query in the space of the normalised tokens.
        u = torch.einsum("brhd,hdc->bhrc", q.to(dtype) * scale, key_weight.to(dtype)).flatten(1, 2)
        prompt_scores, scores = u @ prompts.transpose(1, 2), u @ x.transpose(1, 2)
        if bias is not None:
            scores = scores + bias.expand(1, heads, rows, -1).flatten(1, 2)
        p = torch.cat([prompt_scores, scores], dim=-1).softmax(dim=-1)
        y = p[..., :num_prompts] @ prompts + p[..., num_prompts:] @ x
        out = torch.einsum("bhrc,hdc->brhd", y.unflatten(1, (heads, rows)), value_weight.to(dtype))
    return out.to(q.dtype)
