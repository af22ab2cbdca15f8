"""A block's MLP with frozen weights."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from harness import Job, Op, Sizes, Work, kernels
from torch import Tensor

from vapt_fast.functional import mlp

RIVALS = (*kernels("mlp"), "torch, compiled")
PROMPTS = False


def job(sizes: Sizes, num_prompts: int) -> Job:
    element, dim, hidden = sizes.dtype.itemsize, sizes.dim, sizes.hidden
    tokens, weights = float(sizes.rows * dim), 2.0 * dim * hidden
    products = 4.0 * sizes.rows * dim * hidden
    frozen = partial(sizes.randn, grad=False)
    return Job(
        make=lambda: [
            sizes.randn(sizes.batch, sizes.tokens, dim),
            frozen(hidden, dim) * dim**-0.5,
            frozen(hidden),
            frozen(dim, hidden) * hidden**-0.5,
            frozen(dim),
        ],
        definition=_definition,
        forward=Work(element * (2 * tokens + weights), products),
        # What the activation was computed from comes in, written by the forward pass for this alone.
        backward=Work(element * (2 * tokens + 2 * sizes.rows * hidden + weights), products),
    )


def implementation(name: str, sizes: Sizes) -> Op:
    return partial(mlp, backend=name)


def _definition(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
