"""The residual and the LayerNorm between two branches of a block."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from harness import Job, Op, Sizes, Work, kernels
from torch import Tensor

from vapt_fast.functional import add_norm

RIVALS = (*kernels("add_norm"), "eager", "eager, compiled")
PROMPTS = False
EPS = 1e-6


def job(sizes: Sizes, num_prompts: int) -> Job:
    shape, tokens = (sizes.batch, sizes.tokens, sizes.dim), float(sizes.rows * sizes.dim)
    return Job(
        make=lambda: [
            sizes.randn(*shape),
            sizes.randn(*shape),
            sizes.randn(sizes.dim, grad=False),
            sizes.randn(sizes.dim, grad=False),
        ],
        definition=_eager,
        # Two tensors in and two out; backward three in and one out, which is the gradient of both.
        forward=Work(4 * sizes.dtype.itemsize * tokens, 0.0),
        backward=Work(4 * sizes.dtype.itemsize * tokens, 0.0),
    )


def implementation(name: str, sizes: Sizes) -> Op:
    return _eager if name == "eager" else partial(add_norm, eps=EPS, backend=name)


def _eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias, EPS)
