"""bfloat16 in Triton's interpreter: the repaired arithmetic itself, and the kernels under the policy."""

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from interpreter import bfloat16
from kernel_cases import KERNELS, precision_cases
from op_cases import assert_policy
from triton.runtime.interpreter import InterpreterBuilder

# Every bfloat16, and every float32 that is one of them, halfway to the next one, or just beside these.
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CAST = InterpreterBuilder.cast_impl  # the interpreter's own
LOWER_BITS = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]


@pytest.fixture(autouse=True)
def repaired():
    with bfloat16():
        yield


@triton.jit
def cast(source, to, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at).to(to.dtype.element_ty))


@triton.jit
def arithmetic(a, b, to, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(to + at, tl.where(x < y, -x * y, x + y) - y)


@triton.jit
def product(a, b, to, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(to + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def assert_same_bits(actual, expected):
    """Equal bit by bit; any NaN is like any other."""
    same = actual.view(SIGNED[actual.itemsize]) == expected.view(SIGNED[expected.itemsize])
    assert (same | (actual.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_casts_of_every_bfloat16(dtype):
    actual = torch.zeros(EVERY.shape, dtype=dtype)
    cast[(1,)](EVERY, actual, BLOCK=2**16)
    assert_same_bits(actual, EVERY.to(dtype))


@pytest.mark.parametrize("lower", LOWER_BITS, ids=hex)
def test_casts_to_every_bfloat16(lower):
    source = ((EVERY.view(torch.int16).int() << 16) | lower).view(torch.float32)
    actual = torch.zeros_like(EVERY)
    cast[(1,)](source, actual, BLOCK=2**16)
    assert_same_bits(actual, source.bfloat16())


def test_without_the_repair_casts_are_wrong():
    source = torch.tensor([1.00390625 + 2**-12])  # nearer to the number above
    actual = torch.zeros(1, dtype=torch.bfloat16)
    with mock.patch.object(InterpreterBuilder, "cast_impl", CAST):
        cast[(1,)](source, actual, BLOCK=1)
    assert not torch.equal(actual, source.bfloat16())


def test_arithmetic_rounds_after_each_operation():
    torch.manual_seed(0)
    a, b = torch.randn(2, 2**12).bfloat16()
    actual = torch.zeros_like(a)
    arithmetic[(4,)](a, b, actual, BLOCK=2**10)
    assert_same_bits(actual, torch.where(a < b, -a * b, a + b) - b)


def test_products_are_summed_in_float32():
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 64).bfloat16()
    actual = torch.zeros(64, 64)
    product[(1,)](a, b, actual, SIZE=64)
    torch.testing.assert_close(actual, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("op", "scale"), [(op, scale) for op in KERNELS for scale in KERNELS[op].scales])
def test_error_is_at_most_that_of_eager_pytorch(op, scale):
    assert_policy(KERNELS[op].make, precision_cases(op, scale), torch.bfloat16)
