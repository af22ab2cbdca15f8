"""The kernels of prompt_projector for few features, whose rows stay in the registers of one warp.

The formula and the arguments are those of vapt_fast.kernels.prompt_projector, but ``up`` comes transposed,
as (r, C). A program reads all channels of its few rows at once, in blocks of BLOCK_C. A product with features
is as many sums over the channels, BLOCK_R of them at a time; a weight is read once for all rows. A program is
one warp, so that it waits for no other and nothing goes through shared memory.

All blocks have one dimension. Those of ROWS rows are a tuple, all rows of the first block before those of the
second; one number a row is a tuple as well.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.common import matrix_of
from vapt_fast.kernels.prompt_projector import activate, grad_activate, rows_of


@triton.jit
def channels_of(chunk: tl.constexpr, DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a block, and which of them there are."""
    channel = chunk * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    return channel, channel < DIM


@triton.jit
def load_vector(vector, channel, is_channel, like):
    """(channels,) of a vector with its stride, in the dtype of ``like``; 0 outside."""
    return tl.load(vector[0] + channel * vector[1], is_channel, 0).to(like.dtype)


@triton.jit
def rows_of_program(num_rows, num_prompts, BY_IMAGE: tl.constexpr, ROWS: tl.constexpr):
    """The rows of this program, each as ``rows_of`` has it."""
    rows = ()
    for index in tl.static_range(ROWS):
        if BY_IMAGE:
            blocks = tl.cdiv(num_prompts, ROWS)
            prompt = tl.program_id(0) % blocks * ROWS + index
            row = (tl.program_id(0) // blocks).to(tl.int64) * num_prompts + prompt
            is_row = prompt < num_prompts
        else:
            row = tl.program_id(0).to(tl.int64) * ROWS + index
            is_row = row < num_rows
        rows += (rows_of(row, is_row, num_prompts),)
    return rows


@triton.jit
def load_row(tensor, row, column, is_column):
    """(columns,) of a tensor (B, P, columns) with its three strides; 0 outside."""
    at = tensor[0] + (row[1] * tensor[1] + row[2] * tensor[2]) + tl.cast(column, tl.int64) * tensor[3]
    return tl.load(at, row[3] & is_column, 0)


@triton.jit
def load_t(
    pooled,
    bias,
    channel_mask,
    rows,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """t, in blocks; 0 past the last channel."""
    values = ()
    for chunk in tl.static_range(CHUNKS):
        channel, is_channel = channels_of(chunk, DIM, BLOCK_C)
        for index in tl.static_range(ROWS):
            row = rows[index]
            t = load_row(pooled, row, channel, is_channel)
            if channel_mask is not None:
                t *= load_row(channel_mask, row, channel, is_channel)
            if len(bias) == 3:
                b = tl.load(bias[0] + row[1] * bias[1] + row[2] * bias[2], row[3], 0)
            else:
                b = tl.load(bias[0] + row[2] * bias[1], row[3], 0)
            values += (tl.where(is_channel, t + b, 0),)
    return values


@triton.jit
def load_numbers(tensor, rows, step, ROWS: tl.constexpr):
    """A number of each row, ``step`` apart in the memory of a contiguous tensor; 0 outside."""
    numbers = ()
    for index in tl.static_range(ROWS):
        numbers += (tl.load(tensor + rows[index][0] * step, rows[index][3], 0),)
    return numbers


@triton.jit
def store_numbers(numbers, tensor, rows, step, ROWS: tl.constexpr):
    """The opposite of ``load_numbers``."""
    for index in tl.static_range(ROWS):
        tl.store(tensor + rows[index][0] * step, numbers[index], rows[index][3])


@triton.jit
def load_scales(scale, rows, like, ROWS: tl.constexpr):
    """The scale of each row, of the dtype of ``like``: that of all, or of its image, or 1."""
    scales = ()
    for index in tl.static_range(ROWS):
        if scale is None:
            one = tl.full((), 1, like.dtype)
        elif len(scale) == 2:
            one = tl.load(scale[0] + rows[index][1] * scale[1], rows[index][3], 0)
        else:
            one = tl.load(scale[0])
        scales += (one,)
    return scales


@triton.jit
def load_factors(feature_mask, rows, feature, like, SCALE: tl.constexpr, ROWS: tl.constexpr):
    """SCALE * feature_mask of one feature, of the dtype of ``like``."""
    factors = ()
    for index in tl.static_range(ROWS):
        factor = tl.full((), SCALE, like.dtype)
        if feature_mask is not None:
            factor *= load_row(feature_mask, rows[index], feature, True)
        factors += (factor,)
    return factors


@triton.jit
def activate_each(hidden, ACTIVATION: tl.constexpr, ROWS: tl.constexpr):
    """f of one feature; not of softmax, which sees several."""
    active = ()
    for index in tl.static_range(ROWS):
        active += (activate(hidden[index], None, ACTIVATION),)
    return active


@triton.jit
def load_weight(matrix, feature, chunk: tl.constexpr, DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    """(channels,) of a matrix (r, C) with its two strides; 0 past the last one."""
    channel, is_channel = channels_of(chunk, DIM, BLOCK_C)
    at = matrix[0] + tl.cast(feature, tl.int64) * matrix[1] + channel * matrix[2]
    return tl.load(at, is_channel, 0)


@triton.jit
def multiply(values, matrix, feature, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The product of each row of ``values`` with a row of the matrix (r, C)."""
    totals = (tl.zeros((BLOCK_C,), values[0].dtype),) * ROWS
    for chunk in tl.static_range(len(values) // ROWS):
        weight = load_weight(matrix, feature, chunk, DIM, BLOCK_C)
        sums = ()
        for index in tl.static_range(ROWS):
            sums += (tl.fma(values[chunk * ROWS + index], weight, totals[index]),)
        totals = sums
    return sum_of(totals, ROWS)


@triton.jit
def add_feature(
    values, numbers, matrix, feature, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """``values`` plus a number of each row times a row of the matrix (r, C)."""
    sums = ()
    for chunk in tl.static_range(len(values) // ROWS):
        weight = load_weight(matrix, feature, chunk, DIM, BLOCK_C)
        for index in tl.static_range(ROWS):
            sums += (tl.fma(numbers[index], weight, values[chunk * ROWS + index]),)
    return sums


@triton.jit
def zeros_like(values):
    """As many blocks of zeros."""
    return (tl.zeros(values[0].shape, values[0].dtype),) * len(values)


@triton.jit
def plus(left, right):
    """left + right, entry by entry."""
    sums = ()
    for index in tl.static_range(len(left)):
        sums += (left[index] + right[index],)
    return sums


@triton.jit
def sum_of(values, ROWS: tl.constexpr):
    """The sum of each row over its channels."""
    sums = ()
    for index in tl.static_range(ROWS):
        total = values[index]
        for entry in tl.static_range(ROWS, len(values), ROWS):
            total += values[entry + index]
        sums += (tl.sum(total, axis=0),)
    return sums


@triton.jit
def mean_of(values, DIM: tl.constexpr, ROWS: tl.constexpr):
    """The mean of each row over its channels, past which ``values`` are 0."""
    sums, means = sum_of(values, ROWS), ()
    for index in tl.static_range(ROWS):
        means += (sums[index] / DIM,)
    return means


@triton.jit
def product_of(left, right):
    """left * right, entry by entry; those of ``right`` may be fewer, and come again."""
    products = ()
    for index in tl.static_range(len(left)):
        products += (left[index] * right[index % len(right)],)
    return products


@triton.jit
def centre(values, means, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """``values`` minus a number of each row; 0 past the last channel."""
    centred = ()
    for chunk in tl.static_range(len(values) // ROWS):
        _, is_channel = channels_of(chunk, DIM, BLOCK_C)
        for index in tl.static_range(ROWS):
            centred += (tl.where(is_channel, values[chunk * ROWS + index] - means[index], 0),)
    return centred


@triton.jit
def store_rows(
    values,
    tensor,
    rows,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write rows of a contiguous tensor (B, P, C)."""
    for chunk in tl.static_range(len(values) // ROWS):
        channel, is_channel = channels_of(chunk, DIM, BLOCK_C)
        for index in tl.static_range(ROWS):
            at = tensor + rows[index][0] * DIM + channel
            value = values[chunk * ROWS + index].to(tensor.dtype.element_ty)
            tl.store(at, value, rows[index][3] & is_channel)


# ---- forward


@triton.jit
def prompt_projector_fwd_in_registers_kernel(
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
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EPS: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """prompts (B, P, C), hidden (B, P, r), mean and rstd (B, P). One program: BLOCK_ROWS rows."""
    rows = rows_of_program(num_rows, num_prompts, BY_IMAGE, BLOCK_ROWS)
    values = load_t(pooled, bias, channel_mask, rows, DIM, CHUNKS, BLOCK_ROWS, BLOCK_C)

    if down is not None:
        if BY_IMAGE:
            down, up = matrix_of(down, rows[0][1]), matrix_of(up, rows[0][1])
        scales = load_scales(scale, rows, values[0], BLOCK_ROWS)
        branch = zeros_like(values)
        for feature in tl.range(0, WIDTH, loop_unroll_factor=BLOCK_R):
            factors = load_factors(feature_mask, rows, feature, values[0], SCALE, BLOCK_ROWS)
            inner = multiply(values, down, feature, DIM, BLOCK_ROWS, BLOCK_C)
            store_numbers(inner, hidden + feature, rows, WIDTH, BLOCK_ROWS)
            active = activate_each(inner, ACTIVATION, BLOCK_ROWS)
            features = product_of(product_of(factors, scales), active)
            branch = add_feature(branch, features, up, feature, DIM, BLOCK_ROWS, BLOCK_C)
        values = plus(values, branch)

    if EPS is not None:
        mu = mean_of(values, DIM, BLOCK_ROWS)
        values = centre(values, mu, DIM, BLOCK_ROWS, BLOCK_C)
        variance = mean_of(product_of(values, values), DIM, BLOCK_ROWS)
        r = ()
        for index in tl.static_range(BLOCK_ROWS):
            r += (1 / tl.sqrt(variance[index] + EPS),)
        store_numbers(mu, mean, rows, 1, BLOCK_ROWS)
        store_numbers(r, rstd, rows, 1, BLOCK_ROWS)
        affine = ()
        for chunk in tl.static_range(len(values) // BLOCK_ROWS):
            channel, is_channel = channels_of(chunk, DIM, BLOCK_C)
            if norm_weight is not None:
                weight = load_vector(norm_weight, channel, is_channel, values[0])
                offset = load_vector(norm_bias, channel, is_channel, values[0])
            for index in tl.static_range(BLOCK_ROWS):
                value = values[chunk * BLOCK_ROWS + index] * r[index]
                if norm_weight is not None:
                    value = value * weight + offset
                affine += (value,)
        values = affine
    store_rows(values, prompts, rows, DIM, BLOCK_ROWS, BLOCK_C)


# ---- backward


@triton.jit
def load_grads(
    grad_prompts,
    norm_weight,
    rows,
    like,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g = grad_prompts * norm_weight, in blocks of the dtype of ``like``."""
    grads = ()
    for chunk in tl.static_range(CHUNKS):
        channel, is_channel = channels_of(chunk, DIM, BLOCK_C)
        for index in tl.static_range(ROWS):
            grad = load_row(grad_prompts, rows[index], channel, is_channel).to(like.dtype)
            if norm_weight is not None:
                grad *= load_vector(norm_weight, channel, is_channel, like)
            grads += (grad,)
    return grads


@triton.jit
def sum_and_grad(sums, grad, scales, hidden, active, ACTIVATION: tl.constexpr, ROWS: tl.constexpr):
    """``sums`` plus a feature's part of the gradient of scale, and the gradient of hidden.

    ``grad`` is that of scale * active, of each row.
    """
    totals = ()
    inner = ()
    for index in tl.static_range(ROWS):
        totals += (sums[index] + grad[index] * active[index],)
        grad_active = grad[index] * scales[index]
        inner += (grad_activate(grad_active, hidden[index], active[index], ACTIVATION),)
    return totals, inner


@triton.jit
def prompt_projector_bwd_rows_in_registers_kernel(
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
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What prompt_projector_bwd_rows_kernel writes. One program: BLOCK_ROWS rows."""
    rows = rows_of_program(num_rows, num_prompts, BY_IMAGE, BLOCK_ROWS)
    values = load_t(pooled, bias, channel_mask, rows, DIM, CHUNKS, BLOCK_ROWS, BLOCK_C)
    grads = load_grads(grad_prompts, norm_weight, rows, values[0], DIM, CHUNKS, BLOCK_ROWS, BLOCK_C)
    if up is not None:
        if BY_IMAGE:
            down, up = matrix_of(down, rows[0][1]), matrix_of(up, rows[0][1])
        scales = load_scales(scale, rows, values[0], BLOCK_ROWS)

    if means is not None:
        if up is not None:
            branch = zeros_like(values)
            for feature in tl.range(0, WIDTH, loop_unroll_factor=BLOCK_R):
                factors = load_factors(feature_mask, rows, feature, values[0], SCALE, BLOCK_ROWS)
                inner = load_numbers(hidden + feature, rows, WIDTH, BLOCK_ROWS)
                active = activate_each(inner, ACTIVATION, BLOCK_ROWS)
                features = product_of(product_of(factors, scales), active)
                branch = add_feature(branch, features, up, feature, DIM, BLOCK_ROWS, BLOCK_C)
            values = plus(values, branch)
        mu, r = load_numbers(mean, rows, 1, BLOCK_ROWS), load_numbers(rstd, rows, 1, BLOCK_ROWS)
        xhat = product_of(centre(values, mu, DIM, BLOCK_ROWS, BLOCK_C), r)
        mean_grad = mean_of(grads, DIM, BLOCK_ROWS)
        mean_product = mean_of(product_of(grads, xhat), DIM, BLOCK_ROWS)
        store_numbers(mean_grad, means, rows, 1, BLOCK_ROWS)
        store_numbers(mean_product, means + num_rows, rows, 1, BLOCK_ROWS)
        grads = centre(grads, mean_grad, DIM, BLOCK_ROWS, BLOCK_C)
        of_raw = ()
        for entry in tl.static_range(len(grads)):
            of_raw += (grads[entry] - xhat[entry] * mean_product[entry % BLOCK_ROWS],)
        grads = product_of(of_raw, r)

    if up is not None:
        branch, of_scale = zeros_like(grads), (tl.zeros((), grads[0].dtype),) * BLOCK_ROWS
        for feature in tl.range(0, WIDTH, loop_unroll_factor=BLOCK_R):
            factors = load_factors(feature_mask, rows, feature, grads[0], SCALE, BLOCK_ROWS)
            inner = load_numbers(hidden + feature, rows, WIDTH, BLOCK_ROWS)
            active = activate_each(inner, ACTIVATION, BLOCK_ROWS)
            grad = multiply(grads, up, feature, DIM, BLOCK_ROWS, BLOCK_C)
            grad = product_of(grad, factors)
            of_scale, grad_inner = sum_and_grad(of_scale, grad, scales, inner, active, ACTIVATION, BLOCK_ROWS)
            store_numbers(grad_inner, grad_hidden + feature, rows, WIDTH, BLOCK_ROWS)
            branch = add_feature(branch, grad_inner, down, feature, DIM, BLOCK_ROWS, BLOCK_C)
        grads = plus(grads, branch)
        if scale is not None:
            store_numbers(of_scale, products, rows, 1, BLOCK_ROWS)

    store_numbers(sum_of(grads, BLOCK_ROWS), sums, rows, 1, BLOCK_ROWS)
    if channel_mask is not None:
        masked = ()
        for chunk in tl.static_range(len(grads) // BLOCK_ROWS):
            channel, is_channel = channels_of(chunk, DIM, BLOCK_C)
            for index in tl.static_range(BLOCK_ROWS):
                mask = load_row(channel_mask, rows[index], channel, is_channel)
                masked += (grads[chunk * BLOCK_ROWS + index] * mask,)
        grads = masked
    store_rows(grads, grad_pooled, rows, DIM, BLOCK_ROWS, BLOCK_C)
