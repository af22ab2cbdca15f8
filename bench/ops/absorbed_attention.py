"""The last block's attention of one row, with and without computing its keys and values."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness import Job, Op, Sizes, Work, kernels
from torch import Tensor

from vapt_fast.functional import absorbed_attention

RIVALS = (*kernels("absorbed_attention"), "torch, compiled", "SDPA")
PROMPTS = True


def job(sizes: Sizes, num_prompts: int) -> Job:
    batch, dim, heads = sizes.batch, sizes.dim, sizes.heads
    rows = float(batch * (sizes.tokens + num_prompts))
    read = sizes.dtype.itemsize * (rows * dim + 2 * dim * dim)
    products = 4 * heads * rows * dim + 4.0 * batch * dim * dim
    weight = partial(sizes.randn, heads, dim // heads, dim, grad=False)
    return Job(
        make=lambda: [
            sizes.randn(batch, 1, heads, dim // heads),
            sizes.randn(batch, sizes.tokens, dim),
            sizes.randn(batch, num_prompts, dim),
            weight() * dim**-0.5,
            weight() * dim**-0.5,
        ],
        definition=_literal,
        forward=Work(read, products),
        # The rows once more, and their gradients out.
        backward=Work(read + sizes.dtype.itemsize * rows * dim, 2 * products),
    )


def implementation(name: str, sizes: Sizes) -> Op:
    if name == "SDPA":
        return _literal
    return partial(absorbed_attention, scale=(sizes.dim // sizes.heads) ** -0.5, backend=name)


def _literal(q: Tensor, x: Tensor, prompts: Tensor, key_weight: Tensor, value_weight: Tensor) -> Tensor:
    """Compute keys and values of all rows, then PyTorch's attention."""
    rows, heads = torch.cat([prompts, x], dim=1), q.shape[2]
    k, v = (
        F.linear(rows, weight.flatten(0, 1)).unflatten(-1, (heads, -1)).transpose(1, 2)
        for weight in (key_weight, value_weight)
    )
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
