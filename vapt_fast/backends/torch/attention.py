"""prompt_attention and absorbed_attention on PyTorch's own attention and batched products."""

from __future__ import annotations

from typing import Any

import torch
import torch.backends.cuda
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._autocast import autocast_dtype
from .._why_not import HALF, why_not_one_dtype

__all__ = [
    "absorbed_attention",
    "prompt_attention",
    "prompt_attention_cudnn",
    "prompt_attention_flash",
    "why_not_prompt_attention_cudnn",
    "why_not_prompt_attention_flash",
]


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


def prompt_attention_cudnn(*args: Any) -> Tensor:
    """prompt_attention by cuDNN and nothing else."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return prompt_attention(*args)


def prompt_attention_flash(*args: Any) -> Tensor:
    """prompt_attention by PyTorch's flash attention and nothing else."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return prompt_attention(*args)


def why_not_prompt_attention_cudnn(*args: Any) -> list[str]:
    """Every reason why cuDNN can't take these arguments of prompt_attention."""
    return _refusals("can_use_cudnn_attention", *args)


def why_not_prompt_attention_flash(*args: Any) -> list[str]:
    """Every reason why flash attention can't take these arguments of prompt_attention."""
    reasons = ["flash attention adds no bias to scores"] if args[-1] is not None else []
    return reasons + _refusals("can_use_flash_attention", *args[:-1], None)


def _refusals(
    can_use: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    scale: float,
    bias: Tensor | None,
) -> list[str]:
    """What ``can_use``, of torch.backends.cuda, has against the tensors once they are concatenated."""
    reasons = why_not_one_dtype(q, k, v, prompt_k, prompt_v, known=HALF)
    if (
        reasons or torch.compiler.is_compiling()
    ):  # there is no asking then: PyTorch raises when the graph runs
        return reasons
    batch, _, heads, dim = q.shape
    num_keys = prompt_k.shape[1] + k.shape[1]
    # Only their shapes, dtypes and strides count.
    query = q.to(autocast_dtype(q.dtype, q.device)).transpose(1, 2)
    keys = torch.empty((batch, num_keys, heads, dim), dtype=query.dtype, device=q.device).transpose(1, 2)
    mask = bias if bias is None else F.pad(bias, (prompt_k.shape[1], 0)).to(query.dtype)
    params = torch.backends.cuda.SDPAParams(query, keys, keys, mask, 0.0, False, False)
    if getattr(torch.backends.cuda, can_use)(params):
        return []
    shapes = f"{tuple(query.shape)} and keys {tuple(keys.shape)}"
    return [f"torch.backends.cuda.{can_use} refuses {query.dtype} queries {shapes}; its debug=True says why"]


def absorbed_attention(
    q: Tensor,
    x: Tensor,
    prompts: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """See vapt_fast.functional.absorbed_attention."""
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
            scores = scores + bias.to(dtype).expand(1, heads, rows, -1).flatten(1, 2)
        p = torch.cat([prompt_scores, scores], dim=-1).softmax(dim=-1)
        y = p[..., :num_prompts] @ prompts + p[..., num_prompts:] @ x
        out = torch.einsum("bhrc,hdc->brhd", y.unflatten(1, (heads, rows)), value_weight.to(dtype))
    return out.to(q.dtype)
