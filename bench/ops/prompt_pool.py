"""The residual, the block's LayerNorm and the pooling of tokens, against the literal method's."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness import Job, Op, Sizes, Work, kernels
from torch import Tensor

from vapt_fast.functional import prompt_matrices, prompt_pool

EPS, PROMPT_EPS, KERNEL = 1e-6, 1e-5, 2
RIVALS = (*kernels("prompt_pool"), "torch, compiled", "literal", "literal, compiled")
PROMPTS = True


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


def implementation(name: str, sizes: Sizes) -> Op:
    return partial(_literal, sizes.grid) if name == "literal" else partial(_rewritten, sizes.grid, name)


def _literal(grid: tuple[int, int], *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run two LayerNorms, a convolution and a projection; return sum and normalised tokens, pooled tokens."""
    x, branch, projection, kernel, weight, bias, norm_weight, norm_bias = inputs
    total = x + branch
    normed = F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, EPS)
    z = F.layer_norm(total[:, 1:].to(weight.dtype), weight.shape, weight, bias, PROMPT_EPS)
    planes = z.transpose(1, 2).unflatten(-1, grid)
    planes = F.conv2d(planes, kernel.expand(len(weight), 1, -1, -1), groups=len(weight))
    return total, normed, F.linear(planes.flatten(2), projection).transpose(1, 2)


def _rewritten(grid: tuple[int, int], backend: str, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pool with a matrix that is made anew, for one block; a model makes those of all blocks at once."""
    x, branch, projection, kernel, weight, bias, norm_weight, norm_bias = inputs
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
