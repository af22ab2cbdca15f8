"""Rows in FP8 (e4m3), each with a scale of its own: what torch._scaled_mm multiplies.

For a row of K elements, with the largest number of e4m3, 448:

    scale  = max(|row|) / 448    at least the smallest normal float32
    values = row / scale         rounded to e4m3

With GELU, that of the row takes its place; it is computed twice, and never written.

A program reads its rows twice, the second time from the cache, so the length of a row costs no registers.
Everything is computed in float32. What users give is a tuple of a pointer and both strides, so a transposed
weight needs no copy; what is written is contiguous. Offsets are 64-bit. Grids are one-dimensional.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.common import block_of, normal_cdf

LARGEST = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def larger_of(a, b):
    """The larger one; NaN if one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_block(start, column, stride, mask, GELU: tl.constexpr):
    """A block of rows in float32, or the exact GELU of it."""
    value = tl.load(start + column * stride, mask, 0).to(tl.float32)
    return value * normal_cdf(value) if GELU else value


@triton.jit
def quantise_kernel(
    rows,
    values,
    scale,
    num_rows,
    num_columns,
    GELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """values (M, K) and scale (M,) of rows (M, K). One program: BLOCK_ROWS rows."""
    pointer, row_stride, column_stride = rows
    row, is_row = block_of(tl.program_id(0), num_rows, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    start = pointer + (row * row_stride)[:, None]

    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, num_columns, BLOCK_COLUMNS):
        mask = is_row[:, None] & (first + columns < num_columns)
        value = load_block(start, first + columns, column_stride, mask, GELU)
        largest = larger_of(largest, tl.abs(value))
    divisor = larger_of(tl.reduce(largest, 1, larger_of) / LARGEST, SMALLEST_SCALE)
    tl.store(scale + row, divisor, is_row)

    for first in range(0, num_columns, BLOCK_COLUMNS):
        mask = is_row[:, None] & (first + columns < num_columns)
        value = load_block(start, first + columns, column_stride, mask, GELU)
        quotient = (value / divisor[:, None]).to(values.dtype.element_ty)
        tl.store(values + (row * num_columns)[:, None] + first + columns, quotient, mask)
