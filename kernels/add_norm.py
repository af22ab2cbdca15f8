"""A branch added to the tokens, and the LayerNorm of the sum; forward and backward.

For a row of C channels, with statistics over them:

    total  = x + layer_scale * branch   rounded to its dtype before anything is computed from it
    xhat   = (total - mean) * rstd      rstd of the variance + EPS
    normed = xhat * weight + bias

A row stays in registers, as CHUNKS blocks of BLOCK_C channels, so each tensor passes through memory once:
the forward kernel reads x and branch and writes total and normed; the backward kernel reads total and the
gradients of total and normed, and writes those of x and branch. What is absent (branch, layer_scale,
weight and bias, a gradient that nobody needs) is None and costs nothing.

Everything is computed in the dtype of ``mean``: float32, or float64. Tensors that users give are tuples of a
pointer and all strides; what the launcher allocates is contiguous. Offsets are 64-bit. Grids are
one-dimensional.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.common import block_of


@triton.jit
def elements_of(first_channel, num_channels, is_row, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a block's elements (BLOCK_T, BLOCK_C), and which of the elements exist.

    Every row has its own, so that what differs by channel alone is loaded as it is needed: cached loads are
    cheaper than an exchange between threads.
    """
    channel = first_channel + tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    channel = tl.broadcast_to(channel, (BLOCK_T, BLOCK_C))
    return channel, is_row[:, None] & (channel < num_channels)


@triton.jit
def rows_of(tokens, image, token):
    """Where rows (BLOCK_T,) of (B, T, C) begin, as a column, and the stride of their channels."""
    pointer, image_stride, token_stride, channel_stride = tokens
    return pointer + (image * image_stride + token * token_stride)[:, None], channel_stride


@triton.jit
def load_channels(vector, channel, mask):
    """The elements of a (C,) by which the channels are multiplied or shifted."""
    pointer, stride = vector
    return tl.load(pointer + channel * stride, mask, 0)


@triton.jit
def add_norm_fwd_kernel(
    x,
    branch,
    layer_scale,
    weight,
    bias,
    total,
    normed,
    mean,
    rstd,
    num_rows,
    num_tokens,
    num_channels,
    EPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """total (where branch is given) and normed (B, T, C), mean and rstd (B, T). One program: BLOCK_T rows."""
    dtype = mean.dtype.element_ty
    row, is_row = block_of(tl.program_id(0), num_rows, BLOCK_T)
    image, token = row // num_tokens, row % num_tokens
    start = (row * num_channels)[:, None]
    x, x_channel = rows_of(x, image, token)
    if branch is not None:
        branch, branch_channel = rows_of(branch, image, token)

    values = ()
    sums = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    for chunk in tl.static_range(CHUNKS):
        channel, mask = elements_of(chunk * BLOCK_C, num_channels, is_row, BLOCK_T, BLOCK_C)
        value = tl.load(x + channel * x_channel, mask, 0).to(dtype)
        if branch is not None:
            added = tl.load(branch + channel * branch_channel, mask, 0).to(dtype)
            if layer_scale is not None:
                added *= load_channels(layer_scale, channel, mask).to(dtype)
            rounded = (value + added).to(total.dtype.element_ty)
            tl.store(total + start + channel, rounded, mask)
            value = rounded.to(dtype)
        values += (value,)
        sums += value
    mu = tl.sum(sums, axis=1) / num_channels

    squares = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    for chunk in tl.static_range(CHUNKS):
        channel, mask = elements_of(chunk * BLOCK_C, num_channels, is_row, BLOCK_T, BLOCK_C)
        centred = tl.where(mask, values[chunk] - mu[:, None], 0)
        squares += centred * centred
    r = 1 / tl.sqrt(tl.sum(squares, axis=1) / num_channels + EPS)

    tl.store(mean + row, mu, is_row)
    tl.store(rstd + row, r, is_row)
    for chunk in tl.static_range(CHUNKS):
        channel, mask = elements_of(chunk * BLOCK_C, num_channels, is_row, BLOCK_T, BLOCK_C)
        result = (values[chunk] - mu[:, None]) * r[:, None]
        if weight is not None:
            result *= load_channels(weight, channel, mask).to(dtype)
            result += load_channels(bias, channel, mask).to(dtype)
        tl.store(normed + start + channel, result.to(normed.dtype.element_ty), mask)


@triton.jit
def store_gradients(
    grad,
    grad_total,
    grad_total_channel,
    layer_scale,
    grad_x,
    grad_branch,
    start,
    channel,
    mask,
):
    """Those of x and branch, from ``grad``: what a block of elements of total gets through its norm.

    grad_x = grad + grad_total, grad_branch = layer_scale * grad_x; ``start`` is where the rows begin in both.
    """
    if grad_total is not None:
        grad += tl.load(grad_total + channel * grad_total_channel, mask, 0).to(grad.dtype)
    if grad_x is not None:
        tl.store(grad_x + start + channel, grad.to(grad_x.dtype.element_ty), mask)
    if grad_branch is not None:
        if layer_scale is not None:
            grad *= load_channels(layer_scale, channel, mask).to(grad.dtype)
        tl.store(grad_branch + start + channel, grad.to(grad_branch.dtype.element_ty), mask)


@triton.jit
def add_norm_bwd_kernel(
    total,
    grad_total,
    grad_normed,
    layer_scale,
    weight,
    mean,
    rstd,
    grad_x,
    grad_branch,
    num_rows,
    num_tokens,
    num_channels,
    CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x and grad_branch (B, T, C), see ``store_gradients``. One program: BLOCK_T rows.

    With a = grad_normed * weight and means over the channels, total gets through its norm
    rstd * (a - mean(a) - xhat * mean(a * xhat)).
    """
    dtype = mean.dtype.element_ty
    row, is_row = block_of(tl.program_id(0), num_rows, BLOCK_T)
    image, token = row // num_tokens, row % num_tokens
    start = (row * num_channels)[:, None]
    total, total_channel = rows_of(total, image, token)
    grad_normed, grad_normed_channel = rows_of(grad_normed, image, token)
    grad_total_channel = 0
    if grad_total is not None:
        grad_total, grad_total_channel = rows_of(grad_total, image, token)
    mu = tl.load(mean + row, is_row, 0)[:, None]
    r = tl.load(rstd + row, is_row, 0)[:, None]

    xhats, grads = (), ()
    sums = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    products = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    for chunk in tl.static_range(CHUNKS):
        channel, mask = elements_of(chunk * BLOCK_C, num_channels, is_row, BLOCK_T, BLOCK_C)
        # Beyond the last channel xhat is not 0, but a is.
        xhat = (tl.load(total + channel * total_channel, mask, 0).to(dtype) - mu) * r
        a = tl.load(grad_normed + channel * grad_normed_channel, mask, 0).to(dtype)
        if weight is not None:
            a *= load_channels(weight, channel, mask).to(dtype)
        xhats += (xhat,)
        grads += (a,)
        sums += a
        products += a * xhat
    mean_a = tl.sum(sums, axis=1)[:, None] / num_channels
    mean_product = tl.sum(products, axis=1)[:, None] / num_channels

    for chunk in tl.static_range(CHUNKS):
        channel, mask = elements_of(chunk * BLOCK_C, num_channels, is_row, BLOCK_T, BLOCK_C)
        grad = r * (grads[chunk] - mean_a - xhats[chunk] * mean_product)
        store_gradients(
            grad, grad_total, grad_total_channel, layer_scale, grad_x, grad_branch, start, channel, mask
        )
