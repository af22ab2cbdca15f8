"""From pooled prompts to what a block reads: their bias, the feature projector, the block's LayerNorm.

For image b, prompt p, channel c and feature j of the projector, f being its activation:

    t[b, p, c]        = channel_mask[b, c] * pooled[b, p, c] + bias[p]
    hidden[b, p, j]   = sum_c down[j, c] * t[b, p, c]
    features[b, p, j] = SCALE * scale * feature_mask[b, p, j] * f(hidden[b, p])[j]
    raw[b, p, c]      = t[b, p, c] + sum_j up[c, j] * features[b, p, j]
    prompts[b, p, c]  = (raw[b, p, c] - mean[b, p]) * rstd[b, p] * norm_weight[c] + norm_bias[c]

What is absent is None and costs nothing: the masks, a ``scale`` beside the number SCALE, the projector
(down, up and hidden), the norm (EPS, mean and rstd), its affine (norm_weight and norm_bias).

A row is a prompt of an image. A program takes BLOCK_ROWS of them and goes through their channels several
times, of which the first reads memory and the others caches; raw is made anew each time, so that the backward
needs only a few numbers a row beside ``pooled``.

Everything is computed in ``pooled``'s dtype: float32, or float64. Tensors that users give come as (tensor,
*strides), bias, down and up, and scale, with or without a stride of images; what the launcher allocates is
contiguous. Where down and up are those of each image (BY_IMAGE), the rows of a program are of one image.
Offsets are 64-bit. Grids are one-dimensional.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.common import block_of, matrix_of, normal_cdf

NORMAL_PEAK = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
MINUS_INF = tl.constexpr(float("-inf"))


# ---- activations


@triton.jit
def activate(hidden, is_feature, ACTIVATION: tl.constexpr):
    """f(hidden), row by row."""
    if ACTIVATION == "relu":
        active = tl.where(hidden < 0, 0, hidden)  # a maximum would hide NaN
    elif ACTIVATION == "gelu":
        active = hidden * normal_cdf(hidden)
    elif ACTIVATION == "sigmoid":
        active = tl.sigmoid(hidden)
    elif ACTIVATION == "softmax":
        inside = tl.where(is_feature[None, :], hidden, MINUS_INF)
        powers = tl.exp(inside - tl.max(inside, axis=1)[:, None])
        active = powers / tl.sum(powers, axis=1)[:, None]
    else:
        active = hidden
    return active


@triton.jit
def grad_activate(grad, hidden, active, ACTIVATION: tl.constexpr):
    """The gradient of hidden, from that of active = f(hidden)."""
    if ACTIVATION == "relu":
        grad = tl.where(hidden <= 0, 0, grad)
    elif ACTIVATION == "gelu":
        grad *= normal_cdf(hidden) + hidden * NORMAL_PEAK * tl.exp(-0.5 * hidden * hidden)
    elif ACTIVATION == "sigmoid":
        grad *= active * (1 - active)
    elif ACTIVATION == "softmax":
        grad = active * (grad - tl.sum(active * grad, axis=1)[:, None])
    return grad


# ---- the formula for a block of rows, which are (row, image, prompt, whether there is one)


@triton.jit
def rows_of(row, is_row, num_prompts):
    """Rows, from their numbers in (B * P)."""
    return row, row // num_prompts, row % num_prompts, is_row


@triton.jit
def image_of_program(num_prompts, BLOCK_ROWS: tl.constexpr):
    """The image that the rows of this program are of, where BY_IMAGE."""
    return (tl.program_id(0) // tl.cdiv(num_prompts, BLOCK_ROWS)).to(tl.int64)


@triton.jit
def rows_of_program(num_rows, num_prompts, BY_IMAGE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The rows of this program."""
    if BY_IMAGE:
        index = tl.program_id(0) % tl.cdiv(num_prompts, BLOCK_ROWS)
        prompt, is_row = block_of(index, num_prompts, BLOCK_ROWS)
        row = image_of_program(num_prompts, BLOCK_ROWS) * num_prompts + prompt
    else:
        row, is_row = block_of(tl.program_id(0), num_rows, BLOCK_ROWS)
    return rows_of(row, is_row, num_prompts)


@triton.jit
def channels_from(start, num_channels, BLOCK_C: tl.constexpr):
    """The BLOCK_C channels from ``start`` on, and which of them there are."""
    channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
    return channel, channel < num_channels


@triton.jit
def load_rows(tensor, rows, column, is_column):
    """(rows, columns) of a tensor (B, P, columns) with its three strides; 0 outside."""
    at = tensor[0] + (rows[1] * tensor[1] + rows[2] * tensor[2])[:, None] + (column * tensor[3])[None, :]
    return tl.load(at, rows[3][:, None] & is_column[None, :], 0)


@triton.jit
def load_matrix(matrix, row, is_row, column, is_column):
    """(rows, columns) of a matrix with its two strides; 0 outside."""
    at = matrix[0] + (row * matrix[1])[:, None] + (column * matrix[2])[None, :]
    return tl.load(at, is_row[:, None] & is_column[None, :], 0)


@triton.jit
def load_vector(vector, position, is_position, like):
    """(positions,) of a vector with its stride, in the dtype of ``like``; 0 outside."""
    return tl.load(vector[0] + position * vector[1], is_position, 0).to(like.dtype)


@triton.jit
def load_number(tensor, rows):
    """(rows,) of a contiguous tensor (B, P); 0 outside."""
    return tl.load(tensor + rows[0], rows[3], 0)


@triton.jit
def load_hidden(hidden, rows, feature, is_feature, width):
    """(rows, features) of a contiguous tensor (B, P, r); 0 outside."""
    at = hidden + (rows[0] * width)[:, None] + feature[None, :]
    return tl.load(at, rows[3][:, None] & is_feature[None, :], 0)


@triton.jit
def store_hidden(values, hidden, rows, feature, is_feature, width):
    """The opposite of ``load_hidden``."""
    at = hidden + (rows[0] * width)[:, None] + feature[None, :]
    tl.store(at, values, rows[3][:, None] & is_feature[None, :])


@triton.jit
def load_t(pooled, bias, channel_mask, rows, channel, is_channel):
    """t (rows, channels); 0 past the last channel."""
    t = load_rows(pooled, rows, channel, is_channel)
    if channel_mask is not None:
        t *= load_rows(channel_mask, rows, channel, is_channel)
    if len(bias) == 3:
        bias_at = bias[0] + rows[1] * bias[1] + rows[2] * bias[2]
    else:
        bias_at = bias[0] + rows[2] * bias[1]
    b = tl.load(bias_at, rows[3], 0)
    return tl.where(is_channel[None, :], t + b[:, None], 0)


@triton.jit
def load_factor(feature_mask, rows, feature, is_feature, like, SCALE: tl.constexpr):
    """SCALE * feature_mask (rows, features), in the shape and dtype of ``like``."""
    factor = tl.full(like.shape, SCALE, like.dtype)
    if feature_mask is not None:
        factor *= load_rows(feature_mask, rows, feature, is_feature)
    return factor


@triton.jit
def times(values, scale, rows):
    """values (rows, features) * scale, a number or one for each image, or None for 1."""
    if scale is not None:
        if len(scale) == 2:
            values *= tl.load(scale[0] + rows[1] * scale[1], rows[3], 0)[:, None]
        else:
            values *= tl.load(scale[0])
    return values


@triton.jit
def raw_of(t, features, up, channel, is_channel, feature, is_feature, PRECISION: tl.constexpr):
    """raw (rows, channels); 0 past the last channel."""
    if up is not None:
        weight = load_matrix(up, channel, is_channel, feature, is_feature)
        t = tl.dot(features, tl.trans(weight), t, input_precision=PRECISION, out_dtype=t.dtype)
    return t


# ---- forward


@triton.jit
def prompt_projector_fwd_kernel(
    prompts,
    hidden,
    mean,
    rstd,
    pooled,
    bias,
    down,
    up,
    scale,
    channel_mask,
    feature_mask,
    norm_weight,
    norm_bias,
    num_rows,
    num_prompts,
    num_channels,
    width,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """prompts (B, P, C), hidden (B, P, r), mean and rstd (B, P). One program: BLOCK_ROWS rows."""
    dtype = pooled[0].dtype.element_ty
    rows = rows_of_program(num_rows, num_prompts, BY_IMAGE, BLOCK_ROWS)
    row, is_row = rows[0], rows[3]
    if BY_IMAGE:
        image = image_of_program(num_prompts, BLOCK_ROWS)
        down, up = matrix_of(down, image), matrix_of(up, image)
    feature = tl.arange(0, BLOCK_R).to(tl.int64)
    is_feature = feature < width

    features = None
    if down is not None:
        sums = tl.zeros((BLOCK_ROWS, BLOCK_R), dtype)
        for start in range(0, num_channels, BLOCK_C):
            channel, is_channel = channels_from(start, num_channels, BLOCK_C)
            t = load_t(pooled, bias, channel_mask, rows, channel, is_channel)
            weight = load_matrix(down, feature, is_feature, channel, is_channel)
            sums = tl.dot(t, tl.trans(weight), sums, input_precision=PRECISION, out_dtype=dtype)
        store_hidden(sums, hidden, rows, feature, is_feature, width)
        factor = load_factor(feature_mask, rows, feature, is_feature, sums, SCALE)
        features = times(factor * activate(sums, is_feature, ACTIVATION), scale, rows)

    mu = tl.zeros((BLOCK_ROWS,), dtype)
    r = tl.full((BLOCK_ROWS,), 1, dtype)
    if EPS is not None:
        total = tl.zeros((BLOCK_ROWS,), dtype)
        for start in range(0, num_channels, BLOCK_C):
            channel, is_channel = channels_from(start, num_channels, BLOCK_C)
            t = load_t(pooled, bias, channel_mask, rows, channel, is_channel)
            raw = raw_of(t, features, up, channel, is_channel, feature, is_feature, PRECISION)
            total += tl.sum(raw, axis=1)
        mu = total / num_channels
        total = tl.zeros((BLOCK_ROWS,), dtype)
        for start in range(0, num_channels, BLOCK_C):
            channel, is_channel = channels_from(start, num_channels, BLOCK_C)
            t = load_t(pooled, bias, channel_mask, rows, channel, is_channel)
            raw = raw_of(t, features, up, channel, is_channel, feature, is_feature, PRECISION)
            centred = tl.where(is_channel[None, :], raw - mu[:, None], 0)
            total += tl.sum(centred * centred, axis=1)
        r = 1 / tl.sqrt(total / num_channels + EPS)
        tl.store(mean + row, mu, is_row)
        tl.store(rstd + row, r, is_row)

    for start in range(0, num_channels, BLOCK_C):
        channel, is_channel = channels_from(start, num_channels, BLOCK_C)
        t = load_t(pooled, bias, channel_mask, rows, channel, is_channel)
        raw = raw_of(t, features, up, channel, is_channel, feature, is_feature, PRECISION)
        values = (raw - mu[:, None]) * r[:, None]
        if norm_weight is not None:
            values *= load_vector(norm_weight, channel, is_channel, values)[None, :]
            values += load_vector(norm_bias, channel, is_channel, values)[None, :]
        at = prompts + (row * num_channels)[:, None] + channel[None, :]
        tl.store(at, values.to(prompts.dtype.element_ty), is_row[:, None] & is_channel[None, :])


# ---- backward


@triton.jit
def load_grad(grad_prompts, norm_weight, rows, channel, is_channel, like):
    """g (rows, channels) = grad_prompts * norm_weight, in the dtype of ``like``; 0 outside."""
    grad = load_rows(grad_prompts, rows, channel, is_channel).to(like.dtype)
    if norm_weight is not None:
        grad *= load_vector(norm_weight, channel, is_channel, grad)[None, :]
    return grad


@triton.jit
def through_norm(grad, raw, norm, is_channel):
    """The gradient of raw (rows, channels), from g of ``load_grad``; 0 past the last channel.

    rstd * (g - mean(g) - xhat * mean(g * xhat)), means over the channels; ``norm`` is (mean, rstd, mean(g),
    mean(g * xhat)), of (rows,) each, or None.
    """
    if norm is not None:
        xhat = (raw - norm[0][:, None]) * norm[1][:, None]
        grad = norm[1][:, None] * (grad - norm[2][:, None] - xhat * norm[3][:, None])
    return tl.where(is_channel[None, :], grad, 0)


@triton.jit
def grad_of_raw(grad_prompts, norm_weight, raw, norm, rows, channel, is_channel):
    """The gradient of raw (rows, channels), from that of prompts."""
    grad = load_grad(grad_prompts, norm_weight, rows, channel, is_channel, raw)
    return through_norm(grad, raw, norm, is_channel)


@triton.jit
def prompt_projector_bwd_rows_kernel(
    grad_pooled,
    grad_hidden,
    means,
    sums,
    products,
    grad_prompts,
    pooled,
    bias,
    down,
    up,
    scale,
    channel_mask,
    feature_mask,
    norm_weight,
    hidden,
    mean,
    rstd,
    num_rows,
    num_prompts,
    num_channels,
    width,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_pooled (B, P, C), and what the other gradients need. One program: as in the forward kernel.

    grad_hidden (B, P, r); ``means`` (2, B, P), the last two of through_norm's ``norm``; ``sums`` (B, P), each
    row's part of the gradient of bias; ``products`` (B, P), that of the tensor scale.
    """
    dtype = pooled[0].dtype.element_ty
    rows = rows_of_program(num_rows, num_prompts, BY_IMAGE, BLOCK_ROWS)
    row, is_row = rows[0], rows[3]
    if BY_IMAGE:
        image = image_of_program(num_prompts, BLOCK_ROWS)
        down, up = matrix_of(down, image), matrix_of(up, image)
    feature = tl.arange(0, BLOCK_R).to(tl.int64)
    is_feature = feature < width

    features = None
    if up is not None:
        values = load_hidden(hidden, rows, feature, is_feature, width)
        factor = load_factor(feature_mask, rows, feature, is_feature, values, SCALE)
        features = times(factor * activate(values, is_feature, ACTIVATION), scale, rows)

    norm = None
    if means is not None:
        mu, r = load_number(mean, rows), load_number(rstd, rows)
        total = tl.zeros((BLOCK_ROWS,), dtype)
        total_product = tl.zeros((BLOCK_ROWS,), dtype)
        for start in range(0, num_channels, BLOCK_C):
            channel, is_channel = channels_from(start, num_channels, BLOCK_C)
            t = load_t(pooled, bias, channel_mask, rows, channel, is_channel)
            raw = raw_of(t, features, up, channel, is_channel, feature, is_feature, PRECISION)
            grad = load_grad(grad_prompts, norm_weight, rows, channel, is_channel, raw)
            total += tl.sum(grad, axis=1)
            total_product += tl.sum(grad * (raw - mu[:, None]), axis=1)
        norm = mu, r, total / num_channels, total_product * r / num_channels
        tl.store(means + row, norm[2], is_row)
        tl.store(means + num_rows + row, norm[3], is_row)

    grad_inner = None
    if up is not None:
        grad_features = tl.zeros((BLOCK_ROWS, BLOCK_R), dtype)
        for start in range(0, num_channels, BLOCK_C):
            channel, is_channel = channels_from(start, num_channels, BLOCK_C)
            t = load_t(pooled, bias, channel_mask, rows, channel, is_channel)
            raw = raw_of(t, features, up, channel, is_channel, feature, is_feature, PRECISION)
            grad = grad_of_raw(grad_prompts, norm_weight, raw, norm, rows, channel, is_channel)
            weight = load_matrix(up, channel, is_channel, feature, is_feature)
            grad_features = tl.dot(grad, weight, grad_features, input_precision=PRECISION, out_dtype=dtype)
        # Loaded again: kept since above they would take registers from both loops.
        values = load_hidden(hidden, rows, feature, is_feature, width)
        factor = load_factor(feature_mask, rows, feature, is_feature, values, SCALE)
        active = activate(values, is_feature, ACTIVATION)
        if scale is not None:
            tl.store(products + row, tl.sum(grad_features * factor * active, axis=1), is_row)
        grad_active = times(grad_features * factor, scale, rows)
        grad_inner = grad_activate(grad_active, values, active, ACTIVATION)
        store_hidden(grad_inner, grad_hidden, rows, feature, is_feature, width)

    total = tl.zeros((BLOCK_ROWS,), dtype)
    for start in range(0, num_channels, BLOCK_C):
        channel, is_channel = channels_from(start, num_channels, BLOCK_C)
        t = load_t(pooled, bias, channel_mask, rows, channel, is_channel)
        raw = raw_of(t, features, up, channel, is_channel, feature, is_feature, PRECISION)
        grad = grad_of_raw(grad_prompts, norm_weight, raw, norm, rows, channel, is_channel)
        if down is not None:
            weight = load_matrix(down, feature, is_feature, channel, is_channel)
            grad = tl.dot(grad_inner, weight, grad, input_precision=PRECISION, out_dtype=dtype)
        total += tl.sum(grad, axis=1)
        if channel_mask is not None:
            grad *= load_rows(channel_mask, rows, channel, is_channel)
        at = grad_pooled + (row * num_channels)[:, None] + channel[None, :]
        tl.store(at, grad, is_row[:, None] & is_channel[None, :])
    tl.store(sums + row, total, is_row)


@triton.jit
def prompt_projector_bwd_weights_kernel(
    partial,
    grad_prompts,
    pooled,
    bias,
    up,
    scale,
    channel_mask,
    feature_mask,
    norm_weight,
    hidden,
    grad_hidden,
    mean,
    rstd,
    means,
    num_rows,
    num_prompts,
    num_channels,
    width,
    rows_per_program,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (chunks, 2, r, C): the gradients of down and of up, transposed, from each chunk of images.

    The sums over the rows of grad_hidden * t and of features * (gradient of raw), to be added up by
    ``sum_chunks_kernel``. One program: BLOCK_C channels, over the ``rows_per_program`` rows of a chunk, which
    with a projector for each image is an image.
    """
    dtype = pooled[0].dtype.element_ty
    channel_blocks = tl.cdiv(num_channels, BLOCK_C)
    chunk = (tl.program_id(0) // channel_blocks).to(tl.int64)
    if BY_IMAGE:
        up = matrix_of(up, chunk)
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)
    feature = tl.arange(0, BLOCK_R).to(tl.int64)
    is_feature = feature < width

    grad_down = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    grad_up = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    first = chunk * rows_per_program
    end = tl.minimum(first + rows_per_program, num_rows)
    for start in range(first, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        rows = rows_of(row, row < end, num_prompts)
        t = load_t(pooled, bias, channel_mask, rows, channel, is_channel)
        inner = load_hidden(grad_hidden, rows, feature, is_feature, width)
        grad_down = tl.dot(tl.trans(inner), t, grad_down, input_precision=PRECISION, out_dtype=dtype)
        values = load_hidden(hidden, rows, feature, is_feature, width)
        factor = load_factor(feature_mask, rows, feature, is_feature, values, SCALE)
        features = times(factor * activate(values, is_feature, ACTIVATION), scale, rows)
        norm = None
        raw = t
        if means is not None:
            norm = (
                load_number(mean, rows),
                load_number(rstd, rows),
                load_number(means, rows),
                load_number(means + num_rows, rows),
            )
            raw = raw_of(t, features, up, channel, is_channel, feature, is_feature, PRECISION)
        grad = grad_of_raw(grad_prompts, norm_weight, raw, norm, rows, channel, is_channel)
        grad_up = tl.dot(tl.trans(features), grad, grad_up, input_precision=PRECISION, out_dtype=dtype)

    at = partial + chunk * 2 * width * num_channels + (feature * num_channels)[:, None] + channel[None, :]
    mask = is_feature[:, None] & is_channel[None, :]
    tl.store(at, grad_down, mask)
    tl.store(at + width * num_channels, grad_up, mask)
