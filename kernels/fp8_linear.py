"""Rows in FP8 (e4m3), each with a scale of its own: what torch._scaled_mm multiplies.

For a row of K elements, with the largest number of e4m3, 448:

    scale  = max(|row|) / 448    at least the smallest normal float32
    values = row * (1 / scale)   rounded to e4m3

With GELU, that of the row takes its place, and is never written.

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
def store_scale(scale, largest, row, is_row):
    """Store the scale of rows, given blocks of their largest values (rows, columns); return 1 / scale."""
    divisor = larger_of(tl.reduce(largest, 1, larger_of) / LARGEST, SMALLEST_SCALE)
    tl.store(scale + row, divisor, is_row)
    return (1 / divisor)[:, None]


@triton.jit
def store_block(values, start, column, mask, value, factor):
    """Store value * factor (rows, columns) in e4m3."""
    tl.store(values + start + column, (value * factor).to(values.dtype.element_ty), mask)


@triton.jit
def quantise_kernel(
    rows,
    values,
    scale,
    num_rows,
    num_columns,
    GELU: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """values (M, K) and scale (M,) of rows (M, K). One program: BLOCK_ROWS rows.

    They stay in registers, as CHUNKS blocks of BLOCK_COLUMNS, so each is read once.
    """
    pointer, row_stride, column_stride = rows
    row, is_row = block_of(tl.program_id(0), num_rows, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    start, written = pointer + (row * row_stride)[:, None], (row * num_columns)[:, None]

    kept = ()
    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK_COLUMNS + columns
        mask = is_row[:, None] & (column < num_columns)
        value = load_block(start, column, column_stride, mask, GELU)
        kept += (value,)
        largest = larger_of(largest, tl.abs(value))
    factor = store_scale(scale, largest, row, is_row)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK_COLUMNS + columns
        mask = is_row[:, None] & (column < num_columns)
        store_block(values, written, column, mask, kept[chunk], factor)


@triton.jit
def quantise_by_two_passes_kernel(
    rows,
    values,
    scale,
    num_rows,
    num_columns,
    GELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The same for rows of any length, which are read twice, the second time from the cache."""
    pointer, row_stride, column_stride = rows
    row, is_row = block_of(tl.program_id(0), num_rows, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    start, written = pointer + (row * row_stride)[:, None], (row * num_columns)[:, None]

    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, num_columns, BLOCK_COLUMNS):
        mask = is_row[:, None] & (first + columns < num_columns)
        value = load_block(start, first + columns, column_stride, mask, GELU)
        largest = larger_of(largest, tl.abs(value))
    factor = store_scale(scale, largest, row, is_row)
    for first in range(0, num_columns, BLOCK_COLUMNS):
        mask = is_row[:, None] & (first + columns < num_columns)
        value = load_block(start, first + columns, column_stride, mask, GELU)
        store_block(values, written, first + columns, mask, value, factor)
