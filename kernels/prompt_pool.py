"""Two LayerNorms of the same rows with one statistic, the second one pooled over positions.

For image b, token t, patch n = t - num_prefix, channel c and row r of the pooling matrix M (R, N):

    xhat[b, t, c]   = (x[b, t, c] - mean[b, t]) * rstd[b, t]              rstd of the variance + EPS
    s[b, t]         = rstd(variance + PROMPT_EPS) / rstd[b, t]
    raw[b, r, c]    = sum_n M[r, n] * s[b, t] * xhat[b, t, c]
    pooled[b, r, c] = weight[c] * raw[b, r, c] + bias[c] * sum_n M[r, n]
    normed[b, t, c] = norm_weight[c] * xhat[b, t, c] + norm_bias[c]

normed, mean and rstd come from add_norm's forward kernel; where a branch is added there, x is the total here.

Everything is computed in the dtype of ``mean``: float32, or float64. Where x is in bfloat16 (HALVES), it is a
factor of the products as it is, and what is not comes in two halves; the mean, which x still has, is
subtracted from the product. Tensors that users give are tuples of a
pointer and all strides; what the launcher allocates is contiguous. Offsets are 64-bit. Grids are
one-dimensional.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.add_norm import load_channels, rows_of, store_gradients
from vapt_fast.kernels.common import block_of, halves


@triton.jit
def prompt_factor(rstd, EPS: tl.constexpr, PROMPT_EPS: tl.constexpr):
    """s, from rstd itself: a small number where the variance is large, so nothing cancels."""
    return 1 / tl.sqrt(1 + (PROMPT_EPS - EPS) * rstd * rstd)


@triton.jit
def prompt_pool_fwd_kernel(
    x,
    matrix,
    weight,
    bias,
    mean,
    rstd,
    pooled,
    raw,
    num_tokens,
    num_channels,
    num_rows,
    num_prefix,
    EPS: tl.constexpr,
    PROMPT_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """pooled and raw (B, R, C). One program: BLOCK_R rows and BLOCK_C channels of one image."""
    x, x_image, x_token, x_channel = x
    matrix, matrix_row, matrix_patch = matrix
    dtype = mean.dtype.element_ty
    channel_blocks, row_blocks = tl.cdiv(num_channels, BLOCK_C), tl.cdiv(num_rows, BLOCK_R)
    image = (tl.program_id(0) // (channel_blocks * row_blocks)).to(tl.int64)
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)
    row, is_row = block_of(tl.program_id(0) // channel_blocks % row_blocks, num_rows, BLOCK_R)

    sums = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    # Added up over the patches of a block after the loop: in it they would wait for other threads.
    totals = tl.zeros((BLOCK_R, BLOCK_N), dtype)
    shifts = tl.zeros((BLOCK_R, BLOCK_N), dtype)
    for start in range(0, num_tokens - num_prefix, BLOCK_N):
        patch = start + tl.arange(0, BLOCK_N).to(tl.int64)
        token = num_prefix + patch
        is_token = token < num_tokens
        m_at = matrix + row[:, None] * matrix_row + patch[None, :] * matrix_patch
        m = tl.load(m_at, is_row[:, None] & is_token[None, :], 0)
        x_at = x + image * x_image + token[:, None] * x_token + channel[None, :] * x_channel
        # Where there is no token, mean and rstd are 0 and so is z.
        values = tl.load(x_at, is_token[:, None] & is_channel[None, :], 0)
        mu = tl.load(mean + image * num_tokens + token, is_token, 0)
        r = tl.load(rstd + image * num_tokens + token, is_token, 0)
        factor = r * prompt_factor(r, EPS, PROMPT_EPS)
        totals += m
        if HALVES:
            high, low = halves(m * factor[None, :])
            sums = tl.dot(high, values, sums)
            sums = tl.dot(low, values, sums)
            shifts += (high.to(dtype) + low.to(dtype)) * mu[None, :]
        else:
            z = (values.to(dtype) - mu[:, None]) * factor[:, None]
            sums = tl.dot(m, z, sums, input_precision=PRECISION, out_dtype=dtype)
    sums -= tl.sum(shifts, axis=1)[:, None]
    row_sums = tl.sum(totals, axis=1)

    w = load_channels(weight, channel, is_channel)
    b = load_channels(bias, channel, is_channel)
    at = (image * num_rows + row[:, None]) * num_channels + channel[None, :]
    mask = is_row[:, None] & is_channel[None, :]
    tl.store(raw + at, sums, mask)
    tl.store(pooled + at, sums * w[None, :] + row_sums[:, None] * b[None, :], mask)


@triton.jit
def prompt_pool_bwd_products_kernel(
    x,
    grad_normed,
    grad_pooled,
    matrix,
    weight,
    bias,
    norm_weight,
    mean,
    rstd,
    means,
    partial,
    num_images,
    num_tokens,
    num_channels,
    num_rows,
    num_prefix,
    EPS: tl.constexpr,
    PROMPT_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What needs sums over the channels: ``means`` (2, B, T), and the gradient of M by images.

    With g = grad_pooled * weight, the gradients that xhat gets from the block and from the prompts are
    a[t, c] = grad_normed[t, c] * norm_weight[c] and b[t, c] = s[t] * sum_r M[r, n] * g[r, c]. All comes from
    one product, G[r, t] = sum_c g[r, c] * xhat[t, c]: ``means``, those of a + b and of a * xhat + s^2 * b *
    xhat over the channels, and ``partial`` (B, R, N), s * G + sum_c grad_pooled * bias.

    Either may be None; without ``means`` so is grad_normed. One program: BLOCK_T tokens of one image.
    """
    x, x_image, x_token, x_channel = x
    grad_pooled, grad_pooled_image, grad_pooled_row, grad_pooled_channel = grad_pooled
    matrix, matrix_row, matrix_patch = matrix
    dtype = mean.dtype.element_ty
    token_blocks = tl.cdiv(num_tokens, BLOCK_T)
    image = (tl.program_id(0) // token_blocks).to(tl.int64)
    token, is_token = block_of(tl.program_id(0) % token_blocks, num_tokens, BLOCK_T)
    patch = token - num_prefix
    is_patch = is_token & (patch >= 0)

    mu = tl.load(mean + image * num_tokens + token, is_token, 0)
    r = tl.load(rstd + image * num_tokens + token, is_token, 0)
    s = prompt_factor(r, EPS, PROMPT_EPS)
    x += image * x_image + (token * x_token)[:, None]
    grad_normed_channel = 0
    if means is not None:
        grad_normed, grad_normed_channel = rows_of(grad_normed, image, token)

    # Added up over the channels of a block after the loop: in it they would wait for other threads.
    of_a = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    of_products = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    sums = tl.zeros((BLOCK_T,), dtype)
    products = tl.zeros((BLOCK_T,), dtype)
    # At least once, also without rows: a is there.
    for row_start in range(0, tl.maximum(num_rows, 1), BLOCK_R):
        row = row_start + tl.arange(0, BLOCK_R).to(tl.int64)
        is_row = row < num_rows
        g_row = grad_pooled + image * grad_pooled_image + (row * grad_pooled_row)[:, None]
        gram = tl.zeros((BLOCK_R, BLOCK_T), dtype)
        of_g = tl.zeros((BLOCK_R, BLOCK_C), dtype)
        of_bias = tl.zeros((BLOCK_R, BLOCK_C), dtype)
        for start in range(0, num_channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
            is_channel = channel < num_channels
            mask = is_token[:, None] & is_channel[None, :]
            g_at = g_row + (channel * grad_pooled_channel)[None, :]
            g = tl.load(g_at, is_row[:, None] & is_channel[None, :], 0)
            of_bias += g * load_channels(bias, channel, is_channel)[None, :]
            g *= load_channels(weight, channel, is_channel)[None, :]
            values = tl.load(x + (channel * x_channel)[None, :], mask, 0)
            # Beyond the last channel it is not 0, but g and a are.
            xhat = (values.to(dtype) - mu[:, None]) * r[:, None]
            if HALVES:
                high, low = halves(g)
                gram = tl.dot(high, tl.trans(values), gram)
                gram = tl.dot(low, tl.trans(values), gram)
                g = high.to(dtype) + low.to(dtype)
            else:
                gram = tl.dot(g, tl.trans(xhat), gram, input_precision=PRECISION, out_dtype=dtype)
            of_g += g
            if means is not None:
                # Once, with the first rows.
                a_at = grad_normed + (channel * grad_normed_channel)[None, :]
                a = tl.load(a_at, mask & (row_start == 0), 0).to(dtype)
                if norm_weight is not None:
                    a *= load_channels(norm_weight, channel, is_channel).to(dtype)[None, :]
                of_a += a
                of_products += a * xhat
        row_sums = tl.sum(of_g, axis=1)
        if HALVES:
            gram = (gram - row_sums[:, None] * mu[None, :]) * r[None, :]
        of_patches = is_row[:, None] & is_patch[None, :]
        if means is not None:
            m_at = matrix + (row * matrix_row)[:, None] + (patch * matrix_patch)[None, :]
            weighted = tl.load(m_at, of_patches, 0) * s[None, :]
            sums += tl.sum(weighted * row_sums[:, None], axis=0)
            products += s * s * tl.sum(weighted * gram, axis=0)
        if partial is not None:
            at = partial + ((image * num_rows + row) * (num_tokens - num_prefix))[:, None] + patch[None, :]
            tl.store(at, gram * s[None, :] + tl.sum(of_bias, axis=1)[:, None], of_patches)

    if means is not None:
        at = means + image * num_tokens + token
        tl.store(at, (sums + tl.sum(of_a, axis=1)) / num_channels, is_token)
        products += tl.sum(of_products, axis=1)
        tl.store(at + tl.cast(num_images, tl.int64) * num_tokens, products / num_channels, is_token)


@triton.jit
def prompt_pool_bwd_tokens_kernel(
    x,
    grad_total,
    grad_normed,
    grad_pooled,
    matrix,
    weight,
    norm_weight,
    layer_scale,
    mean,
    rstd,
    means,
    grad_x,
    grad_branch,
    num_images,
    num_tokens,
    num_channels,
    num_rows,
    num_prefix,
    EPS: tl.constexpr,
    PROMPT_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x and grad_branch (B, T, C), see ``store_gradients``.

    x gets through both of its norms rstd * (a + b - means[0] - xhat * means[1]), a and b as in the kernel
    above. One program: BLOCK_T tokens and BLOCK_C channels of one image.
    """
    grad_pooled, grad_pooled_image, grad_pooled_row, grad_pooled_channel = grad_pooled
    matrix, matrix_row, matrix_patch = matrix
    dtype = mean.dtype.element_ty
    channel_blocks, token_blocks = tl.cdiv(num_channels, BLOCK_C), tl.cdiv(num_tokens, BLOCK_T)
    image = (tl.program_id(0) // (channel_blocks * token_blocks)).to(tl.int64)
    token, is_token = block_of(tl.program_id(0) // channel_blocks % token_blocks, num_tokens, BLOCK_T)
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)
    patch = token - num_prefix
    is_patch = is_token & (patch >= 0)

    at = image * num_tokens + token
    r = tl.load(rstd + at, is_token, 0)
    s = prompt_factor(r, EPS, PROMPT_EPS)
    w = load_channels(weight, channel, is_channel)
    grad = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    for row_start in range(0, num_rows, BLOCK_R):
        row = row_start + tl.arange(0, BLOCK_R).to(tl.int64)
        is_row = row < num_rows
        m_at = matrix + (patch * matrix_patch)[:, None] + (row * matrix_row)[None, :]
        m = tl.load(m_at, is_patch[:, None] & is_row[None, :], 0) * s[:, None]
        g_at = grad_pooled + image * grad_pooled_image + (row * grad_pooled_row)[:, None]
        g_at += (channel * grad_pooled_channel)[None, :]
        g = tl.load(g_at, is_row[:, None] & is_channel[None, :], 0) * w[None, :]
        grad = tl.dot(m, g, grad, input_precision=PRECISION, out_dtype=dtype)

    mu = tl.load(mean + at, is_token, 0)[:, None]
    mean_sum = tl.load(means + at, is_token, 0)[:, None]
    mean_product = tl.load(means + tl.cast(num_images, tl.int64) * num_tokens + at, is_token, 0)[:, None]
    x, x_channel = rows_of(x, image, token)
    grad_normed, grad_normed_channel = rows_of(grad_normed, image, token)
    grad_total_channel = 0
    if grad_total is not None:
        grad_total, grad_total_channel = rows_of(grad_total, image, token)
    channel = tl.broadcast_to(channel[None, :], (BLOCK_T, BLOCK_C))
    mask = is_token[:, None] & is_channel[None, :]
    a = tl.load(grad_normed + channel * grad_normed_channel, mask, 0).to(dtype)
    if norm_weight is not None:
        a *= load_channels(norm_weight, channel, mask).to(dtype)
    xhat = (tl.load(x + channel * x_channel, mask, 0).to(dtype) - mu) * r[:, None]
    grad = r[:, None] * (grad + a - mean_sum - xhat * mean_product)
    store_gradients(
        grad, grad_total, grad_total_channel, layer_scale, grad_x, grad_branch,
        (at * num_channels)[:, None], channel, mask,
    )  # fmt: skip


@triton.jit
def prompt_pool_bwd_affine_kernel(
    grad_pooled,
    matrix,
    raw,
    partial,
    num_channels,
    num_rows,
    num_patches,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (B, 2, C): the gradients of weight and bias by images.

    sum_r grad_pooled * raw and sum_r grad_pooled * sum_n M. One program: BLOCK_C channels of one image.
    """
    grad_pooled, grad_pooled_image, grad_pooled_row, grad_pooled_channel = grad_pooled
    matrix, matrix_row, matrix_patch = matrix
    dtype = raw.dtype.element_ty
    channel_blocks = tl.cdiv(num_channels, BLOCK_C)
    image = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)

    grad_weight = tl.zeros((BLOCK_C,), dtype)
    grad_bias = tl.zeros((BLOCK_C,), dtype)
    for row_start in range(0, num_rows, BLOCK_R):
        row = row_start + tl.arange(0, BLOCK_R).to(tl.int64)
        is_row = row < num_rows
        row_sums = tl.zeros((BLOCK_R,), dtype)
        for start in range(0, num_patches, BLOCK_N):
            patch = start + tl.arange(0, BLOCK_N).to(tl.int64)
            m_at = matrix + row[:, None] * matrix_row + patch[None, :] * matrix_patch
            row_sums += tl.sum(tl.load(m_at, is_row[:, None] & (patch < num_patches)[None, :], 0), axis=1)
        mask = is_row[:, None] & is_channel[None, :]
        g_at = grad_pooled + image * grad_pooled_image
        g_at += row[:, None] * grad_pooled_row + channel[None, :] * grad_pooled_channel
        g = tl.load(g_at, mask, 0)
        raw_at = raw + (image * num_rows + row[:, None]) * num_channels + channel[None, :]
        grad_weight += tl.sum(g * tl.load(raw_at, mask, 0), axis=0)
        grad_bias += tl.sum(g * row_sums[:, None], axis=0)

    at = partial + image * 2 * num_channels + channel
    tl.store(at, grad_weight, is_channel)
    tl.store(at + num_channels, grad_bias, is_channel)
