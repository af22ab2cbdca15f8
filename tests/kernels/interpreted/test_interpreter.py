"""The tools of these tests: the shadow memory finds what is wrong, and bfloat16 is that of a GPU."""

from unittest import mock

import pytest
import torch
import triton.language as tl
from interpreter import bfloat16
from shadow import no_overflow, shadow
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction  # triton.jit would compile by now

# ---- the shadow memory


@InterpretedFunction
def copy(source, to, size, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at * stride, at < size, 0.0), at < size)


@InterpretedFunction
def copy_one_too_many(source, to, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at, at <= size, 0.0), at < size)


@InterpretedFunction
def copy_to_one_before(source, to, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at - 1, tl.load(source + at, at < size, 0.0), at < size)


@InterpretedFunction
def every_program_writes(to):
    tl.store(to, tl.program_id(0).to(tl.float32))


@InterpretedFunction
def every_lane_writes(to, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(to + lanes * 0, lanes.to(tl.float32))


@InterpretedFunction
def shift(data):
    """Each program reads what the next one writes."""
    program = tl.program_id(0)
    tl.store(data + program, tl.load(data + program + 1))


@InterpretedFunction
def write_then_read(data, to):
    program = tl.program_id(0)
    tl.store(data + program, 1.0)
    tl.store(to + program, tl.load(data))


@InterpretedFunction
def add(to):
    tl.atomic_add(to, 1.0)


@InterpretedFunction
def through_a_tuple(pair, to):
    tl.store(to, tl.load(pair[0] + pair[1]))


def found(launch):
    with shadow() as findings:
        launch()
    return [(f.kind, f.argument, f.index) for f in findings]


def test_nothing_is_found_where_nothing_is_wrong():
    to = []

    def launch():
        to.append(torch.empty(5))
        copy[(3,)](torch.arange(10.0)[::2], to[0], 5, 2, BLOCK=2)

    assert found(launch) == []
    assert to[0].tolist() == [0, 2, 4, 6, 8]


def test_out_of_bounds():
    a, b = torch.zeros(5), torch.zeros(5)
    assert found(lambda: copy_one_too_many[(3,)](a, b, 5, BLOCK=2)) == [("out of bounds", "source", 5)]
    assert found(lambda: copy_to_one_before[(3,)](a, b, 5, BLOCK=2)) == [("out of bounds", "to", -1)]
    assert found(lambda: through_a_tuple[(1,)]((torch.zeros(2), 2), b)) == [("out of bounds", "pair", 2)]


def test_out_of_bounds_is_what_is_not_in_the_view():
    memory, to = torch.zeros(2, 8), torch.zeros(5)
    rows = memory[:, :5]
    assert found(lambda: copy_one_too_many[(3,)](rows, to, 5, BLOCK=2))[0] == ("out of bounds", "source", 5)
    # Another argument's element is out of bounds as well.
    left, right = memory[0, :4], memory[0, 4:]
    assert found(lambda: copy_one_too_many[(2,)](left, right, 4, BLOCK=4)) == [("out of bounds", "source", 4)]


def test_lanes_out_of_bounds_change_nothing():
    memory = torch.arange(10.0)
    assert found(lambda: copy_to_one_before[(3,)](torch.zeros(5), memory[3:8], 5, BLOCK=2))
    assert memory.tolist() == [0, 1, 2, 0, 0, 0, 0, 7, 8, 9]


def test_races():
    two = torch.zeros(2)
    assert found(lambda: every_program_writes[(2,)](two)) == [("race", "to", (0,))]
    assert found(lambda: [every_program_writes[(1,)](two) for _ in range(2)]) == []
    assert found(lambda: every_lane_writes[(1,)](two, BLOCK=2)) == [("race", "to", (0,))]
    assert found(lambda: shift[(2,)](torch.zeros(3))) == [("race", "data", (1,))]
    assert found(lambda: shift[(1,)](torch.zeros(3))) == []
    assert found(lambda: write_then_read[(2,)](two, torch.zeros(2))) == [("race", "data", (0,))]


def test_atomics_are_refused():
    """They add up in another order every time."""
    with pytest.raises(InterpreterError, match="atomic"):
        found(lambda: add[(1,)](torch.zeros(1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_uninitialised_memory(dtype):
    def launch(written):
        source = torch.empty(2, 4, dtype=dtype)
        source[0, :written] = float("nan")  # which is a value like any other
        copy[(2,)](source[0], torch.zeros(4, dtype=dtype), 4, 1, BLOCK=2)
        source.zero_()

    assert found(lambda: launch(3)) == [("uninitialised", "source", (3,))]
    assert found(lambda: launch(4)) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(6),
        lambda: torch.empty_like(torch.zeros(6)),
        lambda: torch.empty_strided((6,), (1,)),
        lambda: torch.zeros(1).new_empty(6),
    ],
)
def test_holes(make):
    def launch(programs):
        copy[(programs,)](torch.zeros(6), make(), 6, 1, BLOCK=2)

    assert found(lambda: launch(3)) == []
    assert found(lambda: launch(2)) == [("hole", "to", (4,))]
    assert found(make) == []  # of no kernel's business


def test_a_finding_reads_well():
    with shadow() as findings:
        copy_one_too_many[(3,)](torch.zeros(5), torch.zeros(5), 5, BLOCK=2)
    assert str(findings[0]) == "out of bounds: copy_one_too_many, source[5] read by 2"


def test_nothing_stays_patched():
    empty = torch.empty
    with shadow():
        assert torch.empty is not empty
    assert torch.empty is empty
    source, to = torch.arange(4.0), torch.zeros(4)
    copy[(2,)](source, to, 4, 1, BLOCK=2)
    assert torch.equal(source, to)


# ---- 32-bit arithmetic


@InterpretedFunction
def far_row(source, to, row, stride):
    tl.store(to, tl.load(source + row * stride))


@InterpretedFunction
def far_row_in_64_bits(source, to, row, stride):
    tl.store(to, tl.load(source + row.to(tl.int64) * stride))


def test_overflow():
    memory = torch.empty(2**31 + 64, dtype=torch.float16)  # only the pages that are written take any
    memory[2**31] = 7
    to = torch.zeros(1, dtype=torch.float16)
    with mock.patch.object(torch.UntypedStorage, "copy_"), no_overflow():  # it would copy all of the memory
        far_row_in_64_bits[(1,)](memory, to, 2**11, 2**20)
        assert to == 7
        with pytest.raises(InterpreterError, match="int32 overflow"):
            far_row[(1,)](memory, to, 2**11, 2**20)


# ---- bfloat16


# Every bfloat16, and every float32 that is one of them, halfway to the next one, or just beside these.
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@InterpretedFunction
def cast(source, to, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at).to(to.dtype.element_ty))


@InterpretedFunction
def arithmetic(a, b, to, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(to + at, tl.where(x < y, -x * y, x + y) - y)


@InterpretedFunction
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
    with bfloat16():
        cast[(1,)](EVERY, actual, BLOCK=2**16)
    assert_same_bits(actual, EVERY.to(dtype))


@pytest.mark.parametrize("lower", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_casts_to_every_bfloat16(lower):
    source = ((EVERY.view(torch.int16).int() << 16) | lower).view(torch.float32)
    actual = torch.zeros_like(EVERY)
    with bfloat16():
        cast[(1,)](source, actual, BLOCK=2**16)
    assert_same_bits(actual, source.bfloat16())


def test_without_the_repair_casts_are_wrong():
    source = torch.tensor([1.00390625 + 2**-12])  # nearer to the number above
    actual = torch.zeros(1, dtype=torch.bfloat16)
    cast[(1,)](source, actual, BLOCK=1)
    assert not torch.equal(actual, source.bfloat16())


def test_arithmetic_rounds_after_each_operation():
    torch.manual_seed(0)
    a, b = torch.randn(2, 2**12).bfloat16()
    actual = torch.zeros_like(a)
    with bfloat16():
        arithmetic[(4,)](a, b, actual, BLOCK=2**10)
    assert_same_bits(actual, torch.where(a < b, -a * b, a + b) - b)


def test_products_are_summed_in_float32():
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 64).bfloat16()
    actual = torch.zeros(64, 64)
    with bfloat16():
        product[(1,)](a, b, actual, SIZE=64)
    torch.testing.assert_close(actual, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
