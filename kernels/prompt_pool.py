"""Two LayerNorms of the same rows with one statistic, the second one pooled over positions.

For image b, token t, patch n = t - num_prefix, channel c and row r of the pooling matrix M (R, N):

    xhat[b, t, c]   = (x[b, t, c] - mean[b, t]) * rstd[b, t]              rstd of the variance + EPS
    s[b, t]         = rstd(variance + PROMPT_EPS) / rstd[b, t]
    raw[b, r, c]    = sum_n M[r, n] * s[b, t] * xhat[b, t, c]
    pooled[b, r, c] = weight[c] * raw[b, r, c] + bias[c] * sum_n M[r, n]
    normed[b, t, c] = norm_weight[c] * xhat[b, t, c] + norm_bias[c]

normed, mean and rstd come from add_norm's forward kernel; where a branch is added there, x is the total here.

What the products take besides x is prepared by kernels of its own: ``weights`` (B, R, T'), M * s * rstd by
tokens, 0 for the prefix and in T' - T columns that align the rows; and ``grads`` (B, R, C), grad_pooled *
weight. Where x is in bfloat16 (HALVES), it is a factor as it is, so the mean is subtracted from the product,
and weights (B, R, 2, T') and grads (B, R, 2, C) come in two halves: blocks go from memory to the tensor cores
untouched.

Everything else is computed in the dtype of ``mean``: float32, or float64. Tensors that users give are tuples
of a pointer and all strides, M, weight and bias with or without one of images; what the launcher allocates is
contiguous. Offsets are 64-bit. Grids are one-dimensional.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.add_norm import load_channels, rows_of, store_gradients
from vapt_fast.kernels.common import block_of, halves, matrix_of, vector_of


@triton.jit
def prompt_factor(rstd, EPS: tl.constexpr, PROMPT_EPS: tl.constexpr):
    """s, from rstd itself: a small number where the variance is large, so nothing cancels."""
    return 1 / tl.sqrt(1 + (PROMPT_EPS - EPS) * rstd * rstd)


@triton.jit
def store_factor(values, factor, row, column, num_columns, mask, HALVES: tl.constexpr):
    """Store ``values`` in ``factor`` (rows, columns), as halves in (rows, 2, columns); return what it has."""
    if HALVES:
        high, low = halves(values)
        at = factor + (row * 2 * num_columns)[:, None] + column[None, :]
        tl.store(at, high, mask)
        tl.store(at + num_columns, low, mask)
        values = high.to(values.dtype) + low.to(values.dtype)
    else:
        tl.store(factor + (row * num_columns)[:, None] + column[None, :], values, mask)
    return values


@triton.jit
def prompt_pool_weights_kernel(
    matrix,
    mean,
    rstd,
    weights,
    shift,
    row_sums,
    num_tokens,
    num_columns,
    num_rows,
    num_prefix,
    EPS: tl.constexpr,
    PROMPT_EPS: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """weights; shift (B, R), their sums with the means; row_sums (B, R) of M.

    weights and shift may be None. One program: BLOCK_R rows of one image.
    """
    dtype = mean.dtype.element_ty
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    image = (tl.program_id(0) // row_blocks).to(tl.int64)
    matrix, matrix_row, matrix_patch = matrix_of(matrix, image)
    row, is_row = block_of(tl.program_id(0) % row_blocks, num_rows, BLOCK_R)

    shifts = tl.zeros((BLOCK_R, BLOCK_T), dtype)
    totals = tl.zeros((BLOCK_R, BLOCK_T), dtype)
    for start in range(0, num_columns, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T).to(tl.int64)
        is_patch = (token >= num_prefix) & (token < num_tokens)
        m_at = matrix + (row * matrix_row)[:, None] + ((token - num_prefix) * matrix_patch)[None, :]
        m = tl.load(m_at, is_row[:, None] & is_patch[None, :], 0)
        totals += m
        if weights is not None:
            r = tl.load(rstd + image * num_tokens + token, is_patch, 0)
            m *= (r * prompt_factor(r, EPS, PROMPT_EPS))[None, :]
            mask = is_row[:, None] & (token < num_columns)[None, :]
            m = store_factor(m, weights, image * num_rows + row, token, num_columns, mask, HALVES)
        if shift is not None:
            shifts += m * tl.load(mean + image * num_tokens + token, is_patch, 0)[None, :]

    at = image * num_rows + row
    tl.store(row_sums + at, tl.sum(totals, axis=1), is_row)
    if shift is not None:
        tl.store(shift + at, tl.sum(shifts, axis=1), is_row)


@triton.jit
def prompt_pool_fwd_kernel(
    x,
    weights,
    shift,
    row_sums,
    weight,
    bias,
    mean,
    pooled,
    raw,
    num_tokens,
    num_columns,
    num_channels,
    num_rows,
    num_prefix,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """pooled and raw (B, R, C). One program: BLOCK_R rows and BLOCK_C channels of one image."""
    x, x_image, x_token, x_channel = x
    dtype = mean.dtype.element_ty
    channel_blocks, row_blocks = tl.cdiv(num_channels, BLOCK_C), tl.cdiv(num_rows, BLOCK_R)
    image = (tl.program_id(0) // (channel_blocks * row_blocks)).to(tl.int64)
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)
    row, is_row = block_of(tl.program_id(0) // channel_blocks % row_blocks, num_rows, BLOCK_R)
    at = image * num_rows + row
    weights += (at * (2 * num_columns if HALVES else num_columns))[:, None]
    x += image * x_image + (channel * x_channel)[None, :]

    sums = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    for start in range(0, num_tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T).to(tl.int64)
        is_patch = (token >= num_prefix) & (token < num_tokens)
        mask = is_row[:, None] & (token < num_columns)[None, :]
        m = tl.load(weights + token[None, :], mask, 0)
        values = tl.load(x + (token * x_token)[:, None], is_patch[:, None] & is_channel[None, :], 0)
        if HALVES:
            low = tl.load(weights + num_columns + token[None, :], mask, 0)
            sums = tl.dot(m, values, sums)
            sums = tl.dot(low, values, sums)
        else:
            mu = tl.load(mean + image * num_tokens + token, is_patch, 0)
            centred = values.to(dtype) - mu[:, None]
            sums = tl.dot(m, centred, sums, input_precision=PRECISION, out_dtype=dtype)
    if HALVES:
        sums -= tl.load(shift + at, is_row, 0)[:, None]

    w = load_channels(vector_of(weight, image), channel, is_channel)
    b = load_channels(vector_of(bias, image), channel, is_channel)
    total = tl.load(row_sums + at, is_row, 0)
    mask = is_row[:, None] & is_channel[None, :]
    at = (at * num_channels)[:, None] + channel[None, :]
    tl.store(raw + at, sums, mask)
    tl.store(pooled + at, sums * w[None, :] + total[:, None] * b[None, :], mask)


@triton.jit
def prompt_pool_bwd_grads_kernel(
    grad_pooled,
    raw,
    row_sums,
    weight,
    bias,
    grads,
    sums,
    partial,
    num_channels,
    num_rows,
    HALVES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grads; ``sums`` (B, blocks, 2, R) of them and of grad_pooled * bias over each block of channels.

    And ``partial`` (B, 2, C), the gradients of weight and bias by images, sum_r grad_pooled * raw and
    sum_r grad_pooled * sum_n M, which may be None. One program: BLOCK_C channels of one image.
    """
    grad_pooled, grad_pooled_image, grad_pooled_row, grad_pooled_channel = grad_pooled
    dtype = sums.dtype.element_ty
    channel_blocks = tl.cdiv(num_channels, BLOCK_C)
    image = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)
    w = load_channels(vector_of(weight, image), channel, is_channel)
    b = load_channels(vector_of(bias, image), channel, is_channel)
    grad_pooled += image * grad_pooled_image + (channel * grad_pooled_channel)[None, :]
    sums += tl.program_id(0).to(tl.int64) * 2 * num_rows

    grad_weight = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    grad_bias = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    for row_start in range(0, num_rows, BLOCK_R):
        row = row_start + tl.arange(0, BLOCK_R).to(tl.int64)
        is_row = row < num_rows
        mask = is_row[:, None] & is_channel[None, :]
        at = image * num_rows + row
        values = tl.load(grad_pooled + (row * grad_pooled_row)[:, None], mask, 0)
        g = store_factor(values * w[None, :], grads, at, channel, num_channels, mask, HALVES)
        tl.store(sums + row, tl.sum(g, axis=1), is_row)
        tl.store(sums + num_rows + row, tl.sum(values * b[None, :], axis=1), is_row)
        if partial is not None:
            grad_weight += values * tl.load(raw + (at * num_channels)[:, None] + channel[None, :], mask, 0)
            grad_bias += values * tl.load(row_sums + at, is_row, 0)[:, None]

    if partial is not None:
        partial += image * 2 * num_channels + channel
        tl.store(partial, tl.sum(grad_weight, axis=0), is_channel)
        tl.store(partial + num_channels, tl.sum(grad_bias, axis=0), is_channel)


@triton.jit
def prompt_pool_bwd_products_kernel(
    x,
    grad_normed,
    matrix,
    norm_weight,
    mean,
    rstd,
    grads,
    grad_sums,
    means,
    partial,
    num_images,
    num_tokens,
    num_channels,
    num_rows,
    num_prefix,
    num_blocks,
    EPS: tl.constexpr,
    PROMPT_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What needs sums over the channels: ``means`` (2, B, T), and the gradient of M by images.

    With g = grads, the gradients that xhat gets from the block and from the prompts are
    a[t, c] = grad_normed[t, c] * norm_weight[c] and b[t, c] = s[t] * sum_r M[r, n] * g[r, c]. All comes from
    one product, G[r, t] = sum_c g[r, c] * xhat[t, c]: ``means``, those of a + b and of a * xhat + s^2 * b *
    xhat over the channels, and ``partial`` (B, R, N), s * G + sum_c grad_pooled * bias.

    Either may be None; without ``means`` so is grad_normed. One program: BLOCK_T tokens of one image.
    """
    x, x_image, x_token, x_channel = x
    dtype = mean.dtype.element_ty
    token_blocks = tl.cdiv(num_tokens, BLOCK_T)
    image = (tl.program_id(0) // token_blocks).to(tl.int64)
    matrix, matrix_row, matrix_patch = matrix_of(matrix, image)
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
    block = tl.arange(0, BLOCKS)
    grad_sums += ((image * num_blocks + block) * 2 * num_rows)[None, :]

    # In the loop over those 8 channels that a thread has: more would wait for other threads.
    of_a = tl.zeros((BLOCK_T, BLOCK_C // 8), dtype)
    of_products = tl.zeros((BLOCK_T, BLOCK_C // 8), dtype)
    sums = tl.zeros((BLOCK_T,), dtype)
    products = tl.zeros((BLOCK_T,), dtype)
    # At least once, also without rows: a is there.
    for row_start in range(0, tl.maximum(num_rows, 1), BLOCK_R):
        row = row_start + tl.arange(0, BLOCK_R).to(tl.int64)
        is_row = row < num_rows
        g_row = grads + ((image * num_rows + row) * (2 * num_channels if HALVES else num_channels))[:, None]
        of_blocks = is_row[:, None] & (block < num_blocks)[None, :]
        row_sums = tl.sum(tl.load(grad_sums + row[:, None], of_blocks, 0), axis=1)
        of_bias = tl.sum(tl.load(grad_sums + num_rows + row[:, None], of_blocks, 0), axis=1)
        gram = tl.zeros((BLOCK_R, BLOCK_T), dtype)
        for start in range(0, num_channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
            is_channel = channel < num_channels
            mask = is_token[:, None] & is_channel[None, :]
            g_mask = is_row[:, None] & is_channel[None, :]
            g = tl.load(g_row + channel[None, :], g_mask, 0)
            values = tl.load(x + (channel * x_channel)[None, :], mask, 0)
            # Beyond the last channel it is not 0, but g and a are.
            centred = values.to(dtype) - mu[:, None]
            if HALVES:
                low = tl.load(g_row + num_channels + channel[None, :], g_mask, 0)
                gram = tl.dot(g, tl.trans(values), gram)
                gram = tl.dot(low, tl.trans(values), gram)
            else:
                gram = tl.dot(g, tl.trans(centred), gram, input_precision=PRECISION, out_dtype=dtype)
            if means is not None:
                # Once, with the first rows.
                a_at = grad_normed + (channel * grad_normed_channel)[None, :]
                a = tl.load(a_at, mask & (row_start == 0), 0).to(dtype)
                if norm_weight is not None:
                    a *= load_channels(norm_weight, channel, is_channel).to(dtype)[None, :]
                of_a += tl.sum(tl.reshape(a, (BLOCK_T, BLOCK_C // 8, 8)), axis=2)
                of_products += tl.sum(tl.reshape(a * centred, (BLOCK_T, BLOCK_C // 8, 8)), axis=2)
        if HALVES:
            gram -= row_sums[:, None] * mu[None, :]
        gram *= r[None, :]
        of_patches = is_row[:, None] & is_patch[None, :]
        if partial is not None:
            at = partial + ((image * num_rows + row) * (num_tokens - num_prefix))[:, None] + patch[None, :]
            tl.store(at, gram * s[None, :] + of_bias[:, None], of_patches)
        if means is not None:
            m_at = matrix + (row * matrix_row)[:, None] + (patch * matrix_patch)[None, :]
            m = tl.load(m_at, of_patches, 0)
            sums += s * tl.sum(m * row_sums[:, None], axis=0)
            products += s * s * s * tl.sum(m * gram, axis=0)

    if means is not None:
        at = means + image * num_tokens + token
        tl.store(at, (sums + tl.sum(of_a, axis=1)) / num_channels, is_token)
        products += r * tl.sum(of_products, axis=1)
        tl.store(at + tl.cast(num_images, tl.int64) * num_tokens, products / num_channels, is_token)


@triton.jit
def prompt_pool_bwd_tokens_kernel(
    x,
    grad_total,
    grad_normed,
    norm_weight,
    layer_scale,
    mean,
    rstd,
    weights,
    grads,
    means,
    grad_x,
    grad_branch,
    num_images,
    num_tokens,
    num_columns,
    num_channels,
    num_rows,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x and grad_branch (B, T, C), see ``store_gradients``.

    x gets through both of its norms rstd * (a + b - means[0] - xhat * means[1]), a and b as in the kernel
    above; rstd * b is the product of weights and grads. One program: BLOCK_T tokens and BLOCK_C channels of
    one image.
    """
    dtype = mean.dtype.element_ty
    channel_blocks, token_blocks = tl.cdiv(num_channels, BLOCK_C), tl.cdiv(num_tokens, BLOCK_T)
    image = (tl.program_id(0) // (channel_blocks * token_blocks)).to(tl.int64)
    token, is_token = block_of(tl.program_id(0) // channel_blocks % token_blocks, num_tokens, BLOCK_T)
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)

    of_prompts = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    for row_start in range(0, num_rows, BLOCK_R):
        row = row_start + tl.arange(0, BLOCK_R).to(tl.int64)
        is_row = (row < num_rows)[:, None]
        at = ((image * num_rows + row) * (2 if HALVES else 1))[:, None]
        m_at = weights + at * num_columns + token[None, :]
        g_at = grads + at * num_channels + channel[None, :]
        m_mask, g_mask = is_row & (token < num_columns)[None, :], is_row & is_channel[None, :]
        m = tl.load(m_at, m_mask, 0)
        g = tl.load(g_at, g_mask, 0)
        if HALVES:
            m_low = tl.load(m_at + num_columns, m_mask, 0)
            g_low = tl.load(g_at + num_channels, g_mask, 0)
            of_prompts = tl.dot(tl.trans(m), g, of_prompts)
            of_prompts = tl.dot(tl.trans(m), g_low, of_prompts)
            of_prompts = tl.dot(tl.trans(m_low), g, of_prompts)
        else:
            of_prompts = tl.dot(tl.trans(m), g, of_prompts, input_precision=PRECISION, out_dtype=dtype)

    at = image * num_tokens + token
    r = tl.load(rstd + at, is_token, 0)[:, None]
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
    xhat = (tl.load(x + channel * x_channel, mask, 0).to(dtype) - mu) * r
    grad = of_prompts + r * (a - mean_sum - xhat * mean_product)
    store_gradients(
        grad, grad_total, grad_total_channel, layer_scale, grad_x, grad_branch,
        (at * num_channels)[:, None], channel, mask,
    )  # fmt: skip
