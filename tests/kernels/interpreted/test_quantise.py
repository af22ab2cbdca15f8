"""Rows in FP8 on Triton: what PyTorch's operations make of them, of all strides."""

from __future__ import annotations

import pytest
import torch
from interpreter import bfloat16
from shadow import no_overflow, shadow
from torch import Tensor

from vapt_fast.ops.fp8_linear.op import E4M3, Quantised, quantise_by_torch


def quantise(rows: Tensor, gelu: bool = False) -> Quantised:
    from vapt_fast.ops.fp8_linear import triton  # only now: kill_mutants.py replaces the kernels before

    values = torch.full(rows.shape, 7.0).to(E4M3)
    scale = torch.full((len(rows), 1), float("nan"))
    with bfloat16(), shadow() as findings:
        triton.quantise(rows, values, scale, gelu)
    assert not findings, "\n".join(map(str, findings))
    return Quantised(values, scale)


def assert_equal(found: Quantised, expected: Quantised) -> None:
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scale.nan_to_num(-1), expected.scale.nan_to_num(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 16), (5, 256), (9, 272), (0, 16), (33, 768), (3, 3072), (2, 8208)], ids=str
)
@pytest.mark.parametrize("layout", ["rows", "transposed", "every other"])
def test_the_same_as_torch(dtype: torch.dtype, shape: tuple[int, int], layout: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(shape).to(dtype) * torch.logspace(-3, 3, shape[0]).to(dtype)[:, None]
    if layout == "transposed":
        rows = rows.t().contiguous().t()
    elif layout == "every other":
        rows = rows.repeat_interleave(2, 1)[:, ::2]
    assert_equal(quantise(rows), quantise_by_torch(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_the_gelu(dtype: torch.dtype) -> None:
    """Computed in float32, and rounded once: but for ties, as PyTorch has it."""
    rows = (3 * torch.randn(9, 272, generator=torch.Generator().manual_seed(0))).to(dtype)
    found, expected = quantise(rows, gelu=True), quantise_by_torch(rows.float(), gelu=True)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0)
    assert (found.values.float() != expected.values.float()).float().mean() < 0.01
    torch.testing.assert_close(found.values.float(), expected.values.float(), rtol=2**-3, atol=2**-8)


def test_far_apart() -> None:
    """Offsets that leave 32 bits, in both directions."""
    memory = torch.empty(2**34 // 2, dtype=torch.bfloat16)  # only the pages that are written take any
    for num_rows, strides in ((3, (2**31, 1)), (3, (1, 2**28)), (2, (2**32, 2**28))):
        rows = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
        far = memory.as_strided(rows.shape, strides).copy_(rows)
        with no_overflow():
            assert_equal(quantise(far), quantise_by_torch(rows))


def test_odd_rows() -> None:
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    rows[0, 0] = 50
    rows[1] = 0
    rows[2, 290] = float("nan")
    rows[3, 5] = float("-inf")
    rows[4] = 1e-44
    for laid_out in (rows, rows.t().contiguous().t()):
        assert_equal(quantise(laid_out), quantise_by_torch(rows))
