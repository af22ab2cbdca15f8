"""Where the kernels load and store, watched by the shadow memory; and the shadow memory itself."""

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import KERNELS, laid_out, random_cases
from op_cases import assert_same_results, results
from shadow import no_overflow, shadow

COUNT = 40


@pytest.mark.parametrize(
    ("op", "sizes"), [(op, sizes) for op in KERNELS for sizes in random_cases(op, COUNT)], ids=str
)
def test_kernels_touch_what_they_may(op, sizes):
    """Forward and backward, with NaN between the rows of every tensor."""
    torch.manual_seed(0)
    function, formula, tensors, options = KERNELS[op].make(**sizes)
    expected = results(formula, tensors, options)
    tensors = [laid_out(tensor, "padded rows") for tensor in tensors]
    options = {name: laid_out(value, "padded rows") for name, value in options.items()}
    with shadow() as findings:
        actual = results(function, tensors, options)
    assert not findings, "\n".join(map(str, findings))
    assert_same_results(actual, expected, 1e-10)


# ---- what it finds


@triton.jit
def copy(source, to, size, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at * stride, at < size, 0.0), at < size)


@triton.jit
def copy_one_too_many(source, to, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at, at <= size, 0.0), at < size)


@triton.jit
def copy_to_one_before(source, to, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at - 1, tl.load(source + at, at < size, 0.0), at < size)


@triton.jit
def copy_without_mask(source, to, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at))


@triton.jit
def every_program_writes(to):
    tl.store(to, tl.program_id(0).to(tl.float32))


@triton.jit
def every_lane_writes(to, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(to + lanes * 0, lanes.to(tl.float32))


@triton.jit
def shift(data):
    """Each program reads what the next one writes."""
    program = tl.program_id(0)
    tl.store(data + program, tl.load(data + program + 1))


@triton.jit
def write_then_read(data, to):
    program = tl.program_id(0)
    tl.store(data + program, 1.0)
    tl.store(to + program, tl.load(data))


@triton.jit
def through_a_tuple(pair, to):
    tl.store(to, tl.load(pair[0] + pair[1]))


def found(launch):
    with shadow() as findings:
        launch()
    return [(f.kind, f.kernel, f.argument, f.index) for f in findings]


def test_nothing_is_found_where_nothing_is_wrong():
    to = []

    def launch():
        to.append(torch.empty(5))
        copy[(3,)](torch.arange(10.0)[::2], to[0], 5, 2, BLOCK=2)

    assert found(launch) == []
    assert to[0].tolist() == [0, 2, 4, 6, 8]


def test_out_of_bounds():
    a, b = torch.zeros(5), torch.zeros(5)
    assert found(lambda: copy_one_too_many[(3,)](a, b, 5, BLOCK=2)) == [
        ("out of bounds", "copy_one_too_many", "source", 5)
    ]
    assert found(lambda: copy_to_one_before[(3,)](a, b, 5, BLOCK=2)) == [
        ("out of bounds", "copy_to_one_before", "to", -1)
    ]
    assert found(lambda: copy_without_mask[(1,)](a, b, BLOCK=8)) == [
        ("out of bounds", "copy_without_mask", "source", 5),
        ("out of bounds", "copy_without_mask", "to", 5),
    ]


def test_out_of_bounds_is_what_is_not_in_the_view():
    memory, to = torch.zeros(2, 8), torch.zeros(5)
    rows = memory[:, :5]
    assert found(lambda: copy_one_too_many[(3,)](rows, to, 5, BLOCK=2))[0][3] == 5
    # Another argument's element is out of bounds as well.
    left, right = memory[0, :4], memory[0, 4:]
    assert found(lambda: copy_one_too_many[(2,)](left, right, 4, BLOCK=4)) == [
        ("out of bounds", "copy_one_too_many", "source", 4)
    ]


def test_lanes_out_of_bounds_change_nothing():
    memory = torch.arange(10.0)
    assert found(lambda: copy_to_one_before[(3,)](torch.zeros(5), memory[3:8], 5, BLOCK=2))
    assert memory.tolist() == [0, 1, 2, 0, 0, 0, 0, 7, 8, 9]


def test_an_argument_in_a_tuple_has_a_name():
    assert found(lambda: through_a_tuple[(1,)]((torch.zeros(2), 2), torch.zeros(1))) == [
        ("out of bounds", "through_a_tuple", "pair", 2)
    ]


def test_races():
    two = torch.zeros(2)
    assert found(lambda: every_program_writes[(2,)](two)) == [("race", "every_program_writes", "to", (0,))]
    assert found(lambda: every_program_writes[(1,)](two)) == []
    assert found(lambda: every_lane_writes[(1,)](two, BLOCK=2)) == [("race", "every_lane_writes", "to", (0,))]
    assert found(lambda: shift[(2,)](torch.zeros(3))) == [("race", "shift", "data", (1,))]
    assert found(lambda: shift[(1,)](torch.zeros(3))) == []
    assert found(lambda: write_then_read[(2,)](two, torch.zeros(2))) == [
        ("race", "write_then_read", "data", (0,))
    ]


def test_two_launches_are_no_race():
    def launch():
        for _ in range(2):
            every_program_writes[(1,)](two)

    two = torch.zeros(2)
    assert found(launch) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_uninitialised_memory(dtype):
    def launch(written):
        source = torch.empty(2, 4, dtype=dtype)
        source[0, :written] = float("nan")  # which is a value like any other
        copy[(2,)](source[0], torch.zeros(4, dtype=dtype), 4, 1, BLOCK=2)
        source.zero_()

    assert found(lambda: launch(3)) == [("uninitialised", "copy", "source", (3,))]
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
    assert found(lambda: launch(2)) == [("hole", "copy", "to", (4,))]
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
    source = torch.arange(4.0)
    to = torch.zeros(4)
    copy[(2,)](source, to, 4, 1, BLOCK=2)
    assert torch.equal(source, to)


# ---- 32-bit arithmetic


@triton.jit
def far_row(source, to, row, stride):
    tl.store(to, tl.load(source + row * stride))


@triton.jit
def far_row_in_64_bits(source, to, row, stride):
    tl.store(to, tl.load(source + row.to(tl.int64) * stride))


def test_overflow():
    memory = torch.empty(2**31 + 64, dtype=torch.float16)  # only the pages that are written take any
    memory[2**31] = 7
    to = torch.zeros(1, dtype=torch.float16)
    with mock.patch.object(torch.UntypedStorage, "copy_"), no_overflow():  # it would copy all of the memory
        far_row_in_64_bits[(1,)](memory, to, 2**11, 2**20)
        assert to == 7
        with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflow"):
            far_row[(1,)](memory, to, 2**11, 2**20)
