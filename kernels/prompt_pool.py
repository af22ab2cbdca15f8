"""Two LayerNorms of the same rows with one statistic, the second one pooled over positions.

For image b, token t, patch n = t - num_prefix, channel c and row r of the pooling matrix M (R, N):

    xhat[b, t, c]   = (x[b, t, c] - mean[b, t]) * rstd[b, t]              rstd of the variance + EPS
    s[b, t]         = rstd(variance + PROMPT_EPS) / rstd[b, t]
    raw[b, r, c]    = sum_n M[r, n] * s[b, t] * xhat[b, t, c]
    pooled[b, r, c] = weight[c] * raw[b, r, c] + bias[c] * sum_n M[r, n]
    normed[b, t, c] = norm_weight[c] * xhat[b, t, c] + norm_bias[c]

normed, mean and rstd come from add_norm's forward kernel; where a branch is added there, x is the total here.

Everything is computed in the dtype of ``mean``: float32, or float64. Tensors that users give are tuples of a
pointer and all strides; what the launcher allocates is contiguous. Offsets are 64-bit. Grids are
one-dimensional.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.add_norm import elements_of, load_channels, rows_of, store_gradients
from vapt_fast.kernels.common import block_of


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
    row_sums = tl.zeros((BLOCK_R,), dtype)
    for start in range(0, num_tokens - num_prefix, BLOCK_N):
        patch = start + tl.arange(0, BLOCK_N).to(tl.int64)
        token = num_prefix + patch
        is_token = token < num_tokens
        m_at = matrix + row[:, None] * matrix_row + patch[None, :] * matrix_patch
        m = tl.load(m_at, is_row[:, None] & is_token[None, :], 0)
        x_at = x + image * x_image + token[:, None] * x_token + channel[None, :] * x_channel
        # Where there is no token, mean and rstd are 0 and so is z.
        values = tl.load(x_at, is_token[:, None] & is_channel[None, :], 0).to(dtype)
        mu = tl.load(mean + image * num_tokens + token, is_token, 0)
        r = tl.load(rstd + image * num_tokens + token, is_token, 0)
        z = (values - mu[:, None]) * (r * prompt_factor(r, EPS, PROMPT_EPS))[:, None]
        sums = tl.dot(m, z, sums, input_precision=PRECISION, out_dtype=dtype)
        row_sums += tl.sum(m, axis=1)

    w = load_channels(weight, channel, is_channel)
    b = load_channels(bias, channel, is_channel)
    at = (image * num_rows + row[:, None]) * num_channels + channel[None, :]
    mask = is_row[:, None] & is_channel[None, :]
    tl.store(raw + at, sums, mask)
    tl.store(pooled + at, sums * w[None, :] + row_sums[:, None] * b[None, :], mask)


@triton.jit
def branches(
    x,
    x_channel,
    grad_normed,
    grad_normed_channel,
    grad_pooled,
    grad_pooled_row,
    grad_pooled_channel,
    matrix,
    matrix_row,
    weight,
    norm_weight,
    mu,
    r,
    s,
    is_token,
    is_patch,
    start,
    num_channels,
    num_rows,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For a block of tokens and channels: xhat, the gradient a it gets from the block, b from the prompts.

    a[t, c] = grad_normed[t, c] * norm_weight[c] and
    b[t, c] = sum_r M[r, n] * s[t] * grad_pooled[r, c] * weight[c]. The pointers point to the tokens' rows.
    """
    dtype = mu.dtype
    channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
    is_channel = channel < num_channels
    mask = is_token[:, None] & is_channel[None, :]
    values = tl.load(x[:, None] + channel[None, :] * x_channel, mask, 0).to(dtype)
    xhat = tl.where(mask, (values - mu[:, None]) * r[:, None], 0)
    a = tl.load(grad_normed[:, None] + channel[None, :] * grad_normed_channel, mask, 0).to(dtype)
    if norm_weight is not None:
        a *= load_channels(norm_weight, channel, is_channel).to(dtype)[None, :]
    w = load_channels(weight, channel, is_channel)
    b = tl.zeros(a.shape, dtype)
    for row_start in range(0, num_rows, BLOCK_R):
        row = row_start + tl.arange(0, BLOCK_R).to(tl.int64)
        is_row = row < num_rows
        m_at = matrix[:, None] + row[None, :] * matrix_row
        m = tl.load(m_at, is_patch[:, None] & is_row[None, :], 0) * s[:, None]
        g_at = grad_pooled + row[:, None] * grad_pooled_row + channel[None, :] * grad_pooled_channel
        g = tl.load(g_at, is_row[:, None] & is_channel[None, :], 0) * w[None, :]
        b = tl.dot(m, g, b, input_precision=PRECISION, out_dtype=dtype)
    return xhat, a, b


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
    grad_x,
    grad_branch,
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
    """grad_x and grad_branch (B, T, C), see ``store_gradients``. One program: BLOCK_T tokens of one image.

    With a and b of ``branches`` and means over the channels, x gets through both of its norms
    rstd * (a + b - mean(a + b) - xhat * (mean(a * xhat) + s^2 * mean(b * xhat))).
    """
    x, x_image, x_token, x_channel = x
    grad_normed, grad_normed_image, grad_normed_token, grad_normed_channel = grad_normed
    grad_pooled, grad_pooled_image, grad_pooled_row, grad_pooled_channel = grad_pooled
    matrix, matrix_row, matrix_patch = matrix
    dtype = mean.dtype.element_ty
    token_blocks = tl.cdiv(num_tokens, BLOCK_T)
    image = (tl.program_id(0) // token_blocks).to(tl.int64)
    token, is_token = block_of(tl.program_id(0) % token_blocks, num_tokens, BLOCK_T)
    is_patch = is_token & (token >= num_prefix)

    mu = tl.load(mean + image * num_tokens + token, is_token, 0)
    r = tl.load(rstd + image * num_tokens + token, is_token, 0)
    s = prompt_factor(r, EPS, PROMPT_EPS)
    x += image * x_image + token * x_token
    grad_normed += image * grad_normed_image + token * grad_normed_token
    grad_pooled += image * grad_pooled_image
    matrix += (token - num_prefix) * matrix_patch
    grad_total_channel = 0
    if grad_total is not None:
        grad_total, grad_total_channel = rows_of(grad_total, image, token)

    sums = tl.zeros((BLOCK_T,), dtype)
    products = tl.zeros((BLOCK_T,), dtype)
    for start in range(0, num_channels, BLOCK_C):
        xhat, a, b = branches(
            x, x_channel, grad_normed, grad_normed_channel, grad_pooled, grad_pooled_row, grad_pooled_channel,
            matrix, matrix_row, weight, norm_weight, mu, r, s, is_token, is_patch, start,
            num_channels, num_rows, PRECISION, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        sums += tl.sum(a + b, axis=1)
        products += tl.sum((a + b * (s * s)[:, None]) * xhat, axis=1)
    sums /= num_channels
    products /= num_channels

    # The second pass computes a and b again: keeping them would take more registers than there are.
    for start in range(0, num_channels, BLOCK_C):
        xhat, a, b = branches(
            x, x_channel, grad_normed, grad_normed_channel, grad_pooled, grad_pooled_row, grad_pooled_channel,
            matrix, matrix_row, weight, norm_weight, mu, r, s, is_token, is_patch, start,
            num_channels, num_rows, PRECISION, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        grad = r[:, None] * (a + b - sums[:, None] - xhat * products[:, None])
        channel, mask = elements_of(start, num_channels, is_token, BLOCK_T, BLOCK_C)
        store_gradients(
            grad, grad_total, grad_total_channel, layer_scale, grad_x, grad_branch,
            ((image * num_tokens + token) * num_channels)[:, None], channel, mask,
        )  # fmt: skip


@triton.jit
def prompt_pool_bwd_matrix_kernel(
    x,
    grad_pooled,
    weight,
    bias,
    mean,
    rstd,
    partial,
    num_images,
    num_tokens,
    num_channels,
    num_rows,
    num_prefix,
    images_per_program,
    EPS: tl.constexpr,
    PROMPT_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (chunks, R, N): the gradient of M from each chunk of images; see ``sum_chunks_kernel``.

    sum_b sum_c grad_pooled[b, r, c] * z[b, n, c], z = weight * s * xhat + bias. One program: BLOCK_R rows and
    BLOCK_N patches, over ``images_per_program`` images.
    """
    x, x_image, x_token, x_channel = x
    grad_pooled, grad_pooled_image, grad_pooled_row, grad_pooled_channel = grad_pooled
    dtype = mean.dtype.element_ty
    num_patches = num_tokens - num_prefix
    patch_blocks, row_blocks = tl.cdiv(num_patches, BLOCK_N), tl.cdiv(num_rows, BLOCK_R)
    chunk = tl.program_id(0) // (patch_blocks * row_blocks)
    patch, is_patch = block_of(tl.program_id(0) % patch_blocks, num_patches, BLOCK_N)
    row, is_row = block_of(tl.program_id(0) // patch_blocks % row_blocks, num_rows, BLOCK_R)
    token = num_prefix + patch

    sums = tl.zeros((BLOCK_R, BLOCK_N), dtype)
    first = chunk * images_per_program
    for index in range(first, tl.minimum(first + images_per_program, num_images)):
        image = tl.cast(index, tl.int64)
        mu = tl.load(mean + image * num_tokens + token, is_patch, 0)
        r = tl.load(rstd + image * num_tokens + token, is_patch, 0)
        factor = r * prompt_factor(r, EPS, PROMPT_EPS)
        for start in range(0, num_channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
            is_channel = channel < num_channels
            g_at = grad_pooled + image * grad_pooled_image
            g_at += row[:, None] * grad_pooled_row + channel[None, :] * grad_pooled_channel
            g = tl.load(g_at, is_row[:, None] & is_channel[None, :], 0)
            x_at = x + image * x_image + token[:, None] * x_token + channel[None, :] * x_channel
            values = tl.load(x_at, is_patch[:, None] & is_channel[None, :], 0).to(dtype)
            w = load_channels(weight, channel, is_channel)
            b = load_channels(bias, channel, is_channel)
            # Beyond the last channel g is 0 and z is finite, beyond the last patch nothing is stored.
            z = (values - mu[:, None]) * factor[:, None] * w[None, :] + b[None, :]
            sums = tl.dot(g, tl.trans(z), sums, input_precision=PRECISION, out_dtype=dtype)

    at = (chunk.to(tl.int64) * num_rows + row[:, None]) * num_patches + patch[None, :]
    tl.store(partial + at, sums, is_row[:, None] & is_patch[None, :])


@triton.jit
def prompt_pool_bwd_affine_kernel(
    grad_pooled,
    matrix,
    raw,
    partial,
    num_images,
    num_channels,
    num_rows,
    num_patches,
    images_per_program,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (chunks, 2, C): the gradients of weight and bias from each chunk of images.

    sum_b sum_r grad_pooled * raw and sum_b sum_r grad_pooled * sum_n M. One program: BLOCK_C channels, over
    ``images_per_program`` images.
    """
    grad_pooled, grad_pooled_image, grad_pooled_row, grad_pooled_channel = grad_pooled
    matrix, matrix_row, matrix_patch = matrix
    dtype = raw.dtype.element_ty
    channel_blocks = tl.cdiv(num_channels, BLOCK_C)
    chunk = tl.program_id(0) // channel_blocks
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)

    grad_weight = tl.zeros((BLOCK_C,), dtype)
    grad_bias = tl.zeros((BLOCK_C,), dtype)
    first = chunk * images_per_program
    for row_start in range(0, num_rows, BLOCK_R):
        row = row_start + tl.arange(0, BLOCK_R).to(tl.int64)
        is_row = row < num_rows
        row_sums = tl.zeros((BLOCK_R,), dtype)
        for start in range(0, num_patches, BLOCK_N):
            patch = start + tl.arange(0, BLOCK_N).to(tl.int64)
            m_at = matrix + row[:, None] * matrix_row + patch[None, :] * matrix_patch
            row_sums += tl.sum(tl.load(m_at, is_row[:, None] & (patch < num_patches)[None, :], 0), axis=1)
        mask = is_row[:, None] & is_channel[None, :]
        for index in range(first, tl.minimum(first + images_per_program, num_images)):
            image = tl.cast(index, tl.int64)
            g_at = grad_pooled + image * grad_pooled_image
            g_at += row[:, None] * grad_pooled_row + channel[None, :] * grad_pooled_channel
            g = tl.load(g_at, mask, 0)
            raw_at = raw + (image * num_rows + row[:, None]) * num_channels + channel[None, :]
            grad_weight += tl.sum(g * tl.load(raw_at, mask, 0), axis=0)
            grad_bias += tl.sum(g * row_sums[:, None], axis=0)

    at = partial + chunk.to(tl.int64) * 2 * num_channels + channel
    tl.store(at, grad_weight, is_channel)
    tl.store(at + num_channels, grad_bias, is_channel)
