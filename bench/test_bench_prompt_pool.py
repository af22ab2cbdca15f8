"""Residual, the block's LayerNorm and the pooling of tokens into prompts, against the literal method's."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from harness import MODES, Job, Op, Sizes, Work, kernels
from torch import Tensor

from vapt_fast.functional import prompt_matrices, prompt_pool

EPS, PROMPT_EPS, KERNEL = 1e-6, 1e-5, 2
RIVALS = [*kernels("prompt_pool"), "cuda, two passes", "torch, compiled", "literal", "literal, compiled"]


def job(sizes: Sizes, num_prompts: int) -> Job:
    height, width = (side - KERNEL + 1 for side in sizes.grid)
    element, tokens = sizes.dtype.itemsize, sizes.rows * sizes.dim
    pooled = 4.0 * (sizes.batch * num_prompts * sizes.dim + num_prompts * sizes.patches)
    products = 2.0 * sizes.batch * num_prompts * sizes.patches * sizes.dim
    learned = partial(sizes.randn, dtype=torch.float32)
    return Job(
        make=lambda: [
            sizes.randn(sizes.batch, sizes.tokens, sizes.dim),
            sizes.randn(sizes.batch, sizes.tokens, sizes.dim),
            learned(num_prompts, height * width),
            learned(KERNEL, KERNEL),
            learned(sizes.dim),
            learned(sizes.dim),
            sizes.randn(sizes.dim, grad=False),
            sizes.randn(sizes.dim, grad=False),
        ],
        definition=partial(_literal, sizes.grid),
        # x and branch in, their sum and its normalised rows out.
        forward=Work(4 * element * tokens + pooled, products),
        # The sum and the gradients of both in, one gradient out.
        backward=Work(4 * element * tokens + 2 * pooled, 2 * products),
    )


def implementation(rival: str, sizes: Sizes) -> Op:
    name, _, variant = rival.partition(", ")
    op = partial(_literal, sizes.grid) if name == "literal" else partial(_rewritten, sizes.grid, name)
    return sizes.compile(op) if variant == "compiled" else op


def _literal(
    grid: tuple[int, int],
    x: Tensor,
    branch: Tensor,
    projection: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two LayerNorms, a convolution and a projection; sum, normalised tokens (B, T, C), pooled (B, P, C)."""
    total = x + branch
    normed = F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, EPS)
    z = F.layer_norm(total[:, 1:].to(weight.dtype), weight.shape, weight, bias, PROMPT_EPS)
    planes = z.transpose(1, 2).unflatten(-1, grid)
    planes = F.conv2d(planes, kernel.expand(len(weight), 1, -1, -1), groups=len(weight))
    return total, normed, F.linear(planes.flatten(2), projection).transpose(1, 2)


def _rewritten(
    grid: tuple[int, int],
    backend: str,
    x: Tensor,
    branch: Tensor,
    projection: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """With the matrix made anew, for one block; in a model it is made for all blocks at once."""
    matrix = prompt_matrices(projection[None], kernel[None], grid)[0]
    return prompt_pool(
        x,
        matrix,
        weight,
        bias,
        num_prefix=1,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        branch=branch,
        eps=EPS,
        prompt_eps=PROMPT_EPS,
        backend=backend,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rival", RIVALS)
def test_prompt_pool(bench, sizes, num_prompts, rival, mode, monkeypatch):
    if rival == "cuda, two passes":
        monkeypatch.setattr(import_module("vapt_fast.ops.prompt_pool.cuda"), "ONE_PASS", False)
    group = f"prompt_pool, P = {num_prompts}"
    bench(group, job(sizes, num_prompts), rival, implementation(rival, sizes), mode)
