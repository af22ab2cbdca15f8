"""Attention with prompts, on the joint projections: the kernels, and PyTorch's on concatenated keys."""

from __future__ import annotations

from functools import partial

import torch
from harness import Job, Op, Sizes, Work, kernels
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vapt_fast import BackendUnavailableError
from vapt_fast.functional import prompt_attention_packed

LIBRARIES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
RIVALS = (*kernels("prompt_attention"), *LIBRARIES, "explicit")
PROMPTS = True


def job(sizes: Sizes, num_prompts: int) -> Job:
    keys, dim, element = sizes.tokens + num_prompts, sizes.dim, sizes.dtype.itemsize
    tokens, prompts = sizes.rows * dim, sizes.batch * num_prompts * dim
    products = 2.0 * sizes.rows * keys * dim
    return Job(
        make=lambda: [
            sizes.randn(sizes.batch, sizes.tokens, 3 * dim),
            sizes.randn(sizes.batch, num_prompts, 2 * dim),
        ],
        definition=partial(_explicit, sizes.heads),
        forward=Work(element * (4.0 * tokens + 2 * prompts), 2 * products),
        # q, k, v, the output and its gradient in, three gradients out; five products.
        backward=Work(element * (8.0 * tokens + 4 * prompts), 5 * products),
    )


def implementation(name: str, sizes: Sizes) -> Op:
    if name == "explicit":
        return partial(_explicit, sizes.heads)
    heads = {"num_heads": sizes.heads, "num_kv_heads": sizes.heads, "scale": _scale(sizes.heads, sizes.dim)}
    if name not in LIBRARIES:
        return partial(prompt_attention_packed, **heads, backend=name)
    if sizes.device.type != "cuda":
        raise BackendUnavailableError(f"PyTorch's {name} attention needs a CUDA GPU")

    def by_library(qkv: Tensor, prompt_kv: Tensor) -> Tensor:
        with sdpa_kernel(LIBRARIES[name]):
            return prompt_attention_packed(qkv, prompt_kv, **heads, backend="torch")

    return by_library


def _scale(heads: int, dim: int) -> float:
    return (dim // heads) ** -0.5


def _explicit(heads: int, qkv: Tensor, prompt_kv: Tensor) -> Tensor:
    """Compute two products and a softmax, as in the method's publication: (B, T, h, d)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    prompt_k, prompt_v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in prompt_kv.chunk(2, dim=-1))
    k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
    scores = (q * _scale(heads, qkv.shape[-1] // 3)) @ k.transpose(-2, -1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)
