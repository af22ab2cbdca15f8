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
def vector_of(tensor, image):
    """(pointer, stride) of the vector of an image: of all images or, with two strides, of this one."""
    if len(tensor) == 3:
        tensor = tensor[0] + image * tensor[1], tensor[2]
    return tensor


@triton.jit
def matrix_of(tensor, image):
    """(pointer, *strides) of the matrix of an image: of all images or, with three strides, of this one."""
    if len(tensor) == 4:
        tensor = tensor[0] + image * tensor[1], tensor[2], tensor[3]
    return tensor


@triton.jit
def length_of(lengths, image, most):
    """How many of ``most`` rows exist for an image, the first ones.

    ``lengths`` is (pointer, stride) of one integer for each image, of any value, or None: all rows exist.
    """
    length = most
    if lengths is not None:
        given = tl.load(lengths[0] + tl.cast(image, tl.int64) * lengths[1])
        length = tl.minimum(tl.maximum(given, 0), most).to(tl.int32)
    return length


@triton.jit
def sum_chunks_kernel(partial, total, num_chunks, size, BLOCK_CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """total (size,) = partial (chunks, size) added up, in the same order every time."""
    position, mask = block_of(tl.program_id(0), size, BLOCK)
    sums = tl.zeros((BLOCK_CHUNKS, BLOCK), total.dtype.element_ty)
    for start in range(0, num_chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS).to(tl.int64)
        at = partial + (chunk * size)[:, None] + position[None, :]
        sums += tl.load(at, (chunk < num_chunks)[:, None] & mask[None, :], 0)
    tl.store(total + position, tl.sum(sums, axis=0), mask)


@triton.jit
def halves(values):
    """float32 values as sums of two numbers in bfloat16, to 16 bits: what is left is 2^-17 of them.

    A product with a factor that is in bfloat16 already is then as good as exact, by two fast products.
    """
    high = values.to(tl.bfloat16)
    low = (values - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def normal_cdf(x):
    """The standard normal distribution function."""
    return 0.5 * (1 + tl.erf(x * SQRT_HALF))
