"""The two matrix products of an MLP that have GELU beside them, which they compute before they write.

Forward and backward of y = fc2(gelu(fc1(x))), exact GELU, over M rows x (M, C), D hidden features:

    forward    a = gelu(h), h = x W1^T + b1: a and, for the backward, h, (M, D)
    backward   dh = (dy W2) * gelu'(h), (M, D)

The two other products, a W2^T + b2 and dh W1, are plain and left to the vendor's library. D is 4 C as a rule,
so its rows are what memory traffic consists of: here each is written once and h read once, where a GELU apart
from the products reads h and writes a, and its backward reads da and h and writes dh.

What users give comes as (tensor, *strides), strides below 2^24, the rows of x and dy contiguous; what the
launcher allocates is contiguous. One program computes one tile, (BLOCK_ROWS, BLOCK_COLUMNS). Sums are
float32, or float64 for float64 tensors, each in a fixed order.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.common import normal_cdf

INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)

# Rows of tiles that are computed column by column: programs that run together then share what they read.
GROUP = tl.constexpr(8)


@triton.jit
def tile_of(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """First row and first column of this program's tile, 64 bits wide since strides multiply them."""
    program = tl.program_id(0)
    tiles_down, tiles_across = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_columns, BLOCK_COLUMNS)
    group, within = program // (GROUP * tiles_across), program % (GROUP * tiles_across)
    height = tl.minimum(tiles_down - group * GROUP, GROUP)
    down, across = group * GROUP + within % height, within // height
    return down.to(tl.int64) * BLOCK_ROWS, across.to(tl.int64) * BLOCK_COLUMNS


@triton.jit
def product_of(
    a,
    b,
    first_row,
    first_column,
    num_rows,
    num_columns,
    depth,
    dtype: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile of a b, summed in ``dtype``; a = (pointer, stride of rows), b = (pointer, *both strides)."""
    rows, columns = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :]
    steps = tl.arange(0, BLOCK_DEPTH)
    row_mask = rows < (num_rows - first_row).to(tl.int32)
    column_mask = columns < (num_columns - first_column).to(tl.int32)
    # Only the start is 64 bits wide: as many 64-bit offsets as elements would take too many registers.
    a_pointers = a[0] + first_row * a[1] + (rows * a[1] + steps[None, :])
    b_pointers = b[0] + first_column * b[2] + (steps[:, None] * b[1] + columns * b[2])
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype)
    for start in range(0, depth, BLOCK_DEPTH):
        inside = steps < depth - start
        a_block = tl.load(a_pointers, mask=row_mask & inside[None, :], other=0.0)
        b_block = tl.load(b_pointers, mask=inside[:, None] & column_mask, other=0.0)
        # float32 as it is, where the default would be tf32.
        total = tl.dot(a_block, b_block, total, input_precision="ieee", out_dtype=dtype)
        a_pointers += BLOCK_DEPTH
        b_pointers += BLOCK_DEPTH * b[1]
    return total


@triton.jit
def place_of(
    first_row,
    first_column,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Offsets of a tile in a contiguous (num_rows, num_columns), and which of them are inside."""
    rows, columns = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :]
    row_mask = rows < (num_rows - first_row).to(tl.int32)
    mask = row_mask & (columns < (num_columns - first_column).to(tl.int32))
    return first_row * num_columns + first_column + (rows * num_columns + columns), mask


@triton.jit
def mlp_fwd_kernel(
    activated,
    hidden,
    x,
    weight,
    bias,
    num_rows,
    num_columns,
    depth,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """activated (M, D) = gelu(h) and, unless it is None, hidden (M, D) = h, h = x weight^T + bias.

    x: (M, C) with its stride of M. weight: (D, C) with both strides. bias: (D,) with its stride, or None.
    """
    dtype: tl.constexpr = tl.float64 if activated.dtype.element_ty == tl.float64 else tl.float32
    first_row, first_column = tile_of(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    h = product_of(
        x, (weight[0], weight[2], weight[1]), first_row, first_column, num_rows, num_columns, depth,
        dtype, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
    )  # fmt: skip
    if bias is not None:
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        h += tl.load(bias[0] + columns * bias[1], mask=columns < num_columns, other=0.0).to(dtype)[None, :]
    offsets, mask = place_of(first_row, first_column, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    if hidden is not None:
        tl.store(hidden + offsets, h.to(hidden.dtype.element_ty), mask=mask)
    tl.store(activated + offsets, (h * normal_cdf(h)).to(activated.dtype.element_ty), mask=mask)


@triton.jit
def mlp_bwd_kernel(
    grad_h,
    hidden,
    grad_y,
    weight,
    num_rows,
    num_columns,
    depth,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """grad_h (M, D) = (grad_y weight) * gelu'(hidden).

    grad_y: (M, C) with its stride of M. weight: (C, D) with both strides.
    """
    dtype: tl.constexpr = tl.float64 if grad_h.dtype.element_ty == tl.float64 else tl.float32
    first_row, first_column = tile_of(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    total = product_of(
        grad_y, weight, first_row, first_column, num_rows, num_columns, depth,
        dtype, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
    )  # fmt: skip
    offsets, mask = place_of(first_row, first_column, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    h = tl.load(hidden + offsets, mask=mask, other=0.0).to(dtype)
    total *= normal_cdf(h) + h * (INVERSE_SQRT_2PI * tl.exp(-0.5 * h * h))
    tl.store(grad_h + offsets, total.to(grad_h.dtype.element_ty), mask=mask)
