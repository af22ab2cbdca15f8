"""The attention of a few query rows, whose keys and values are the rows of prompts and tokens themselves.

With rows n = [prompts, x] of image b, P + T of them, and queries m:

    p[b, m, n] = softmax over n of (queries[b, m] . rows[b, n] + bias[m, n])
    y[b, m]    = sum_n p[b, m, n] rows[b, n]

and backward from dy, with ds[b, m] = p[b, m] * (dp[b, m] - sum_n p[b, m, n] dp[b, m, n]):

    dp[b, m, n] = dy[b, m] . rows[b, n]                   dqueries[b, m] = sum_n ds[b, m, n] rows[b, n]
    drows[b, n] = sum_m ds[b, m, n] queries[b, m] + p[b, m, n] dy[b, m]

So there are three kernels: scores of rows, by which dp is computed too, weighted sums of rows, y and
dqueries, and the gradient of rows. The softmax between them is of small matrices, (B, M, P + T). Each kernel
reads x once; prompts and tokens are never concatenated in memory.

Lengths (B,), with their stride, say how many prompts exist for each image. The others are not read, and their
gradients are 0; their scores are -inf, so that p and ds are 0 too.

Everything is computed in the queries' dtype: float32, or float64. (B, *, C) comes as (tensor, *strides), and
a stride of 0 repeats; (B, M, P + T) is contiguous, as is what the launcher allocates. Offsets are 64-bit.
Grids are one-dimensional. Each result is written by one program and summed in a fixed order.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.common import block_of, length_of


@triton.jit
def load_block(tensor, image, row, is_row, channel, is_channel):
    """(rows, channels) of an image of (B, *, C) with its three strides; 0 outside."""
    at = tensor[0] + image * tensor[1] + (row * tensor[2])[:, None] + (channel * tensor[3])[None, :]
    return tl.load(at, is_row[:, None] & is_channel[None, :], 0)


@triton.jit
def load_keys(
    prompts, x, image, key, length, num_prompts, num_keys, channel, is_channel, dtype: tl.constexpr
):
    """(keys, channels) of [prompts, x], in ``dtype``; 0 outside, and for prompts from ``length`` on."""
    is_prompt = key < num_prompts
    is_token = (key >= num_prompts) & (key < num_keys)
    from_prompts = load_block(prompts, image, key, key < length, channel, is_channel).to(dtype)
    from_tokens = load_block(x, image, key - num_prompts, is_token, channel, is_channel).to(dtype)
    return tl.where(is_prompt[:, None], from_prompts, from_tokens)


@triton.jit
def load_weights(weights, image, query, is_query, key, is_key, num_queries, row_length):
    """(queries, keys) of an image of a contiguous (B, M, P + T); 0 outside."""
    at = weights + ((image * num_queries + query) * row_length)[:, None] + key[None, :]
    return tl.load(at, is_query[:, None] & is_key[None, :], 0)


@triton.jit
def absorbed_attention_scores_kernel(
    products,
    queries,
    prompts,
    x,
    prompt_lengths,
    num_queries,
    num_prompts,
    num_keys,
    num_channels,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """products (B, M, P + T) of queries (B, M, C) with rows; PADDING with prompts that do not exist.

    One program: BLOCK_M queries, BLOCK_K keys.
    """
    dtype: tl.constexpr = products.dtype.element_ty
    query_blocks, key_blocks = tl.cdiv(num_queries, BLOCK_M), tl.cdiv(num_keys, BLOCK_K)
    image = (tl.program_id(0) // (query_blocks * key_blocks)).to(tl.int64)
    key, is_key = block_of(tl.program_id(0) % key_blocks, num_keys, BLOCK_K)
    query, is_query = block_of(tl.program_id(0) // key_blocks % query_blocks, num_queries, BLOCK_M)
    length = length_of(prompt_lengths, image, num_prompts)

    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype)
    for start in range(0, num_channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
        is_channel = channel < num_channels
        a = load_block(queries, image, query, is_query, channel, is_channel).to(dtype)
        rows = load_keys(prompts, x, image, key, length, num_prompts, num_keys, channel, is_channel, dtype)
        sums = tl.dot(a, tl.trans(rows), sums, input_precision=PRECISION, out_dtype=dtype)
    if prompt_lengths is not None:
        sums = tl.where(((key >= length) & (key < num_prompts))[None, :], PADDING, sums)

    at = products + ((image * num_queries + query) * num_keys)[:, None] + key[None, :]
    tl.store(at, sums, is_query[:, None] & is_key[None, :])


@triton.jit
def absorbed_attention_sums_kernel(
    sums,
    weights,
    prompts,
    x,
    prompt_lengths,
    num_queries,
    num_prompts,
    num_keys,
    num_channels,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sums (B, M, C) of rows with weights (B, M, P + T). One program: BLOCK_M queries, BLOCK_C channels."""
    dtype: tl.constexpr = sums.dtype.element_ty
    query_blocks, channel_blocks = tl.cdiv(num_queries, BLOCK_M), tl.cdiv(num_channels, BLOCK_C)
    image = (tl.program_id(0) // (query_blocks * channel_blocks)).to(tl.int64)
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)
    query, is_query = block_of(tl.program_id(0) // channel_blocks % query_blocks, num_queries, BLOCK_M)
    length = length_of(prompt_lengths, image, num_prompts)

    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    for start in range(0, num_keys, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K).to(tl.int64)
        w = load_weights(weights, image, query, is_query, key, key < num_keys, num_queries, num_keys)
        rows = load_keys(prompts, x, image, key, length, num_prompts, num_keys, channel, is_channel, dtype)
        acc = tl.dot(w, rows, acc, input_precision=PRECISION, out_dtype=dtype)

    at = sums + ((image * num_queries + query) * num_channels)[:, None] + channel[None, :]
    tl.store(at, acc, is_query[:, None] & is_channel[None, :])


@triton.jit
def absorbed_attention_bwd_rows_kernel(
    grad,
    grad_scores,
    p,
    queries,
    grad_y,
    row_lengths,
    num_images,
    num_queries,
    num_rows,
    num_keys,
    num_channels,
    first_key,
    images_per_program,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad (chunks, num_rows, C): the gradient of the rows from ``first_key`` on, from each chunk of images.

    One program: BLOCK_K rows and BLOCK_C channels, over ``images_per_program`` images.
    """
    dtype: tl.constexpr = p.dtype.element_ty
    row_blocks, channel_blocks = tl.cdiv(num_rows, BLOCK_K), tl.cdiv(num_channels, BLOCK_C)
    chunk = (tl.program_id(0) // (row_blocks * channel_blocks)).to(tl.int64)
    channel, is_channel = block_of(tl.program_id(0) % channel_blocks, num_channels, BLOCK_C)
    row, is_row = block_of(tl.program_id(0) // channel_blocks % row_blocks, num_rows, BLOCK_K)
    key = first_key + row

    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype)
    first = chunk * images_per_program
    for image in range(first, tl.minimum(first + images_per_program, num_images)):
        before = acc
        for start in range(0, num_queries, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M).to(tl.int64)
            is_query = query < num_queries
            ds = load_weights(grad_scores, image, query, is_query, key, is_row, num_queries, num_keys)
            a = load_block(queries, image, query, is_query, channel, is_channel).to(dtype)
            acc = tl.dot(tl.trans(ds), a, acc, input_precision=PRECISION, out_dtype=dtype)
            w = load_weights(p, image, query, is_query, key, is_row, num_queries, num_keys)
            dy = load_block(grad_y, image, query, is_query, channel, is_channel).to(dtype)
            acc = tl.dot(tl.trans(w), dy, acc, input_precision=PRECISION, out_dtype=dtype)
        if row_lengths is not None:
            acc = tl.where((row < length_of(row_lengths, image, num_rows))[:, None], acc, before)

    at = grad + ((chunk * num_rows + row) * num_channels)[:, None] + channel[None, :]
    tl.store(at, acc.to(grad.dtype.element_ty), is_row[:, None] & is_channel[None, :])
