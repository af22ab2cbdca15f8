"""The residual and the LayerNorm between two branches of a block."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from harness import MODES, Job, Op, Sizes, Work, kernels
from torch import Tensor

from vapt_fast.functional import add_norm

EPS = 1e-6
RIVALS = [*kernels("add_norm"), "eager", "eager, compiled"]


def job(sizes: Sizes) -> Job:
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


def implementation(rival: str, sizes: Sizes) -> Op:
    name, _, compiled = rival.partition(", ")
    if name == "eager":
        return sizes.compile(_eager) if compiled else _eager

    def op(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, branch, weight, bias, eps=EPS, backend=name)

    return op


def _eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias, EPS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rival", RIVALS)
def test_add_norm(bench, sizes, rival, mode):
    bench("add_norm", job(sizes), rival, implementation(rival, sizes), mode)
