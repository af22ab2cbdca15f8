"""A branch added to the tokens, and the LayerNorm of the sum; forward and backward.

For a row of C channels, with statistics over them:

    total  = x + layer_scale * branch             rounded to its dtype before anything is computed from it
    xhat   = (total - mean) * rstd        rstd of the variance + EPS
    normed = xhat * weight + bias

A row stays in registers, as CHUNKS blocks of BLOCK_C channels, so each tensor passes through memory once:
``forward`` reads x and branch and writes total and normed; ``backward`` reads total and the gradients of total
and normed, and writes those of x and branch. What there is none of (branch, layer_scale, weight and bias, a gradient
that nobody needs) is None and costs nothing.

Everything is computed in the dtype of ``mean``: float32, or float64. Tensors that users give come with all
their strides; what the launcher allocates is contiguous. Offsets are 64-bit. Grids are one-dimensional.
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
def forward(
    x,
    x_image,
    x_token,
    x_channel,
    branch,
    branch_image,
    branch_token,
    branch_channel,
    layer_scale,
    layer_scale_channel,
    weight,
    weight_channel,
    bias,
    bias_channel,
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
    x += (image * x_image + token * x_token)[:, None]
    if branch is not None:
        branch += (image * branch_image + token * branch_token)[:, None]

    values = ()
    sums = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    for chunk in tl.static_range(CHUNKS):
        channel, mask = elements_of(chunk * BLOCK_C, num_channels, is_row, BLOCK_T, BLOCK_C)
        value = tl.load(x + channel * x_channel, mask, 0).to(dtype)
        if branch is not None:
            added = tl.load(branch + channel * branch_channel, mask, 0).to(dtype)
            if layer_scale is not None:
                added *= tl.load(layer_scale + channel * layer_scale_channel, mask, 0).to(dtype)
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
            result *= tl.load(weight + channel * weight_channel, mask, 0).to(dtype)
            result += tl.load(bias + channel * bias_channel, mask, 0).to(dtype)
        tl.store(normed + start + channel, result.to(normed.dtype.element_ty), mask)


@triton.jit
def store_gradients(
    grad,
    grad_total,
    grad_total_channel,
    layer_scale,
    layer_scale_channel,
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
            grad *= tl.load(layer_scale + channel * layer_scale_channel, mask, 0).to(grad.dtype)
        tl.store(grad_branch + start + channel, grad.to(grad_branch.dtype.element_ty), mask)


@triton.jit
def backward(
    total,
    total_image,
    total_token,
    total_channel,
    grad_total,
    grad_total_image,
    grad_total_token,
    grad_total_channel,
    grad_normed,
    grad_normed_image,
    grad_normed_token,
    grad_normed_channel,
    layer_scale,
    layer_scale_channel,
    weight,
    weight_channel,
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
    total += (image * total_image + token * total_token)[:, None]
    grad_normed += (image * grad_normed_image + token * grad_normed_token)[:, None]
    if grad_total is not None:
        grad_total += (image * grad_total_image + token * grad_total_token)[:, None]
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
            a *= tl.load(weight + channel * weight_channel, mask, 0).to(dtype)
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
            grad, grad_total, grad_total_channel, layer_scale, layer_scale_channel, grad_x, grad_branch,
            start, channel, mask,
        )  # fmt: skip
