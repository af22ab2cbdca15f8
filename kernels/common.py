"""What the kernels of several ops share."""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def block_of(index, size, BLOCK: tl.constexpr):
    """Positions (BLOCK,) of block ``index`` as 64-bit integers, and which of them are below ``size``."""
    positions = index.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return positions, positions < size


@triton.jit
def sum_chunks_kernel(partial, total, num_chunks, size, BLOCK: tl.constexpr):
    """total (size,) = partial (chunks, size) added up chunk after chunk: the same order every time."""
    position, mask = block_of(tl.program_id(0), size, BLOCK)
    sums = tl.zeros((BLOCK,), total.dtype.element_ty)
    for chunk in range(num_chunks):
        sums += tl.load(partial + tl.cast(chunk, tl.int64) * size + position, mask, 0)
    tl.store(total + position, sums, mask)


@triton.jit
def normal_cdf(x):
    """The standard normal distribution function."""
    return 0.5 * (1 + tl.erf(x * SQRT_HALF))
