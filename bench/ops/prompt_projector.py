"""The projector: from pooled tokens to the prompts that a block's projections read."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness import Job, Op, Sizes, Work, kernels
from torch import Tensor

from vapt_fast.functional import prompt_projector

EPS, WIDTH = 1e-6, 8
RIVALS = (*kernels("prompt_projector"), "torch, compiled")
PROMPTS = True


def job(sizes: Sizes, num_prompts: int) -> Job:
    rows = sizes.batch * num_prompts
    learned = partial(sizes.randn, dtype=torch.float32)
    # Pooled tokens and their gradient are in float32.
    pooled, prompts = 4.0 * rows * sizes.dim, float(sizes.dtype.itemsize) * rows * sizes.dim
    products = 4.0 * rows * sizes.dim * WIDTH
    return Job(
        make=lambda: [
            learned(sizes.batch, num_prompts, sizes.dim),
            learned(num_prompts),
            learned(WIDTH, sizes.dim),
            learned(sizes.dim, WIDTH),
            learned(sizes.batch, 1, sizes.dim, grad=False).gt(0) * 2.0,
            learned(sizes.batch, num_prompts, WIDTH, grad=False).gt(0) * 2.0,
            sizes.randn(sizes.dim, grad=False),
            sizes.randn(sizes.dim, grad=False),
        ],
        definition=_definition,
        forward=Work(pooled + prompts, products),
        backward=Work(2 * pooled + prompts, 2 * products),
    )


def implementation(name: str, sizes: Sizes) -> Op:
    def op(*inputs: Tensor) -> Tensor:
        pooled, bias, down, up, channels, features, norm_weight, norm_bias = inputs
        return prompt_projector(
            pooled,
            bias,
            down,
            up,
            channel_mask=channels,
            feature_mask=features,
            eps=EPS,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            dtype=sizes.dtype,
            backend=name,
        )

    return op


def _definition(*inputs: Tensor) -> Tensor:
    pooled, bias, down, up, channels, features, norm_weight, norm_bias = inputs
    t = pooled * channels + bias[:, None]
    t = t + (features * (t @ down.t()).relu()) @ up.t()
    # Computed in the dtype of t, to which the affine is cast.
    return F.layer_norm(t, t.shape[-1:], norm_weight.to(t.dtype), norm_bias.to(t.dtype), EPS)
