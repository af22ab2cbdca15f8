"""Attention whose keys and values are the prompts' and the tokens', read from two places.

Forward and backward of o = softmax(scale * q [prompt_k, k]^T + [0, bias]) [prompt_v, v], head by head:

    fwd           o (B, Tq, h, d) and lse (B, h, Tq); one program per image, head and block of queries
    row_dot       row_dot (B, h, Tq), the sum over d of o * do; likewise
    bwd_queries   dq = scale * ds [prompt_k, k], ds = p * (do [prompt_v, v]^T - row_dot); likewise
    bwd_keys      dk = scale * ds^T q and dv = p^T do of one source of keys, the tokens or the prompts;
                  one program per image, head of keys and block of keys

Scores are kept in base 2: s = log2(e) * (scale * q k^T + bias), p = exp2(s - lse), where lse is log2 of the
sum of exp2(s) over the keys. Statistics and sums are in lse's dtype: float32, or float64 for float64 tensors.

Every (B, T, h, d), given or written, comes as (tensor, *strides) with the strides of B, T and h: it may be a
slice of a joint tensor. The bias comes with all four of (B, h, Tq, T). A stride of 0 repeats, d is
contiguous, the strides of T and Tq are below 2^24. lse and row_dot are contiguous. Each result is written by
one program and summed in a fixed order: it is the same in every run.

Lengths (B,), with their stride, say how many prompts exist for each image. The others are not read, and their
gradients are 0.

SCALE is a constant since a number given at launch would be rounded to float32; a model has one or two values.
HEAD_DIM is d, BLOCK_DIM the power of two that holds it; the other blocks say how many queries and keys a
program holds at a time.
"""

import triton
import triton.language as tl
from vapt_fast.kernels.common import length_of

LOG2E = tl.constexpr(1.4426950408889634)
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def wide(index):
    """A number of rows, heads or images in 64 bits, since a stride is about to multiply it."""
    return tl.cast(index, tl.int64)


@triton.jit
def block_of(num_rows, num_heads, BLOCK: tl.constexpr):
    """Image, head and first row of this program.

    Programs are (image, head, block of rows), all on the grid's first axis: the others end at 65,535.
    """
    program = tl.program_id(0)
    num_blocks = tl.cdiv(num_rows, BLOCK)
    image_head = program // num_blocks
    return image_head // num_heads, image_head % num_heads, program % num_blocks * BLOCK


@triton.jit
def head_of(tensor, image, head):
    """One head of one image of (B, T, h, d), as (pointer, stride of T)."""
    return tensor[0] + wide(image) * tensor[1] + wide(head) * tensor[3], tensor[2]


@triton.jit
def bias_of(bias, image, head):
    """One head of one image of (B, h, Tq, T), as (pointer, stride of Tq, stride of T)."""
    return bias[0] + wide(image) * bias[1] + wide(head) * bias[2], bias[3], bias[4]


@triton.jit
def load_rows(head, first, num_rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """(BLOCK, BLOCK_DIM): the rows of a head from ``first`` on, zero past ``num_rows`` and HEAD_DIM."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_DIM)
    mask = rows[:, None] < num_rows - first
    if HEAD_DIM < BLOCK_DIM:
        mask &= columns[None, :] < HEAD_DIM
    # Only the start is 64 bits wide: as many 64-bit offsets as elements would take too many registers.
    start = head[0] + wide(first) * head[1]
    return tl.load(start + rows[:, None] * head[1] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(values, head, first, num_rows, HEAD_DIM: tl.constexpr):
    """``values`` (BLOCK, BLOCK_DIM) to the rows of a head from ``first`` on, none past ``num_rows``."""
    rows, columns = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    mask = (rows[:, None] < num_rows - first) & (columns[None, :] < HEAD_DIM)
    start = head[0] + wide(first) * head[1]
    pointers = start + rows[:, None] * head[1] + columns[None, :]
    tl.store(pointers, values.to(head[0].dtype.element_ty), mask=mask)


@triton.jit
def load_statistic(tensor, image, head, first, num_queries, num_heads, BLOCK: tl.constexpr):
    """(BLOCK,) of lse or row_dot (B, h, Tq) from query ``first`` on, zero past the last one."""
    rows = tl.arange(0, BLOCK)
    start = tensor + (wide(image) * num_heads + head) * num_queries + first
    return tl.load(start + rows, mask=rows < num_queries - first, other=0.0)


@triton.jit
def store_statistic(values, tensor, image, head, first, num_queries, num_heads):
    """``values`` (BLOCK,) to lse or row_dot (B, h, Tq) from query ``first`` on."""
    rows = tl.arange(0, values.shape[0])
    start = tensor + (wide(image) * num_heads + head) * num_queries + first
    tl.store(start + rows, values, mask=rows < num_queries - first)


@triton.jit
def product(a, b, dtype: tl.constexpr):
    """a b, accumulated in ``dtype``; float32 as it is, where the default would be tf32."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=dtype)


@triton.jit
def scores_of(a, b, bias, first_a, first_b, num_a, num_b, SCALE: tl.constexpr, dtype: tl.constexpr):
    """Scores in base 2 of the rows a and b, one of them queries, the other keys; -inf past the last b.

    ``bias`` is None or (pointer, stride of a's rows, stride of b's rows).
    """
    rows, columns = tl.arange(0, a.shape[0])[:, None], tl.arange(0, b.shape[0])[None, :]
    inside = columns < num_b - first_b
    scores = product(a, tl.trans(b), dtype) * (SCALE * LOG2E)
    if bias is not None:
        start = bias[0] + wide(first_a) * bias[1] + wide(first_b) * bias[2]
        mask = inside & (rows < num_a - first_a)
        added = tl.load(start + rows * bias[1] + columns * bias[2], mask=mask, other=0.0)
        scores += added.to(dtype) * LOG2E
    return tl.where(inside, scores, MINUS_INF)


# ---- forward


@triton.jit
def attend(
    acc,
    row_sum,
    row_max,
    q,
    k_head,
    v_head,
    bias_head,
    first_query,
    num_queries,
    num_keys,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Go on with an online softmax over one source of keys.

    row_max = max s, row_sum = sum of exp2(s - row_max) and acc = sum of exp2(s - row_max) v over the keys so
    far.
    """
    for block in range(tl.cdiv(num_keys, BLOCK)):
        first = block * BLOCK
        k = load_rows(k_head, first, num_keys, BLOCK, HEAD_DIM, q.shape[1])
        v = load_rows(v_head, first, num_keys, BLOCK, HEAD_DIM, q.shape[1])
        s = scores_of(q, k, bias_head, first_query, first, num_queries, num_keys, SCALE, acc.dtype)
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
        # A bias of -inf may have hidden every key so far, and -inf less -inf is NaN.
        shift = tl.where(new_max == MINUS_INF, 0.0, new_max)
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        acc = acc * rescale[:, None] + product(p.to(v.dtype), v, acc.dtype)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def prompt_attention_fwd_kernel(
    lse,
    out,
    q,
    k,
    v,
    prompt_k,
    prompt_v,
    bias,
    prompt_lengths,
    num_queries,
    num_tokens,
    num_prompts,
    num_heads,
    repeats,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PROMPTS: tl.constexpr,
):
    """out (B, Tq, h, d) and lse. One program: BLOCK_QUERIES queries of one head of one image."""
    dtype: tl.constexpr = lse.dtype.element_ty
    image, head, first = block_of(num_queries, num_heads, BLOCK_QUERIES)
    kv_head = head // repeats
    q_block = load_rows(head_of(q, image, head), first, num_queries, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], dtype)
    row_sum = tl.zeros([BLOCK_QUERIES], dtype)
    row_max = tl.full([BLOCK_QUERIES], MINUS_INF, dtype)
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max,
        q_block, head_of(prompt_k, image, kv_head), head_of(prompt_v, image, kv_head), None,
        first, num_queries, length_of(prompt_lengths, image, num_prompts), SCALE, HEAD_DIM, BLOCK_PROMPTS,
    )  # fmt: skip
    bias_head = bias
    if bias is not None:
        bias_head = bias_of(bias, image, head)
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max,
        q_block, head_of(k, image, kv_head), head_of(v, image, kv_head), bias_head,
        first, num_queries, num_tokens, SCALE, HEAD_DIM, BLOCK_TOKENS,
    )  # fmt: skip
    # A query from which every key is hidden gets 0, as in scaled_dot_product_attention, and an lse that makes
    # its p 0 again in the backward.
    hidden = row_max == MINUS_INF
    acc /= tl.where(hidden, 1.0, row_sum)[:, None]
    logsumexp = tl.where(hidden, 0.0, row_max + tl.log2(row_sum))
    store_rows(acc, head_of(out, image, head), first, num_queries, HEAD_DIM)
    store_statistic(logsumexp, lse, image, head, first, num_queries, num_heads)


# ---- backward


@triton.jit
def prompt_attention_row_dot_kernel(
    row_dot,
    out,
    grad_out,
    num_queries,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """row_dot (B, h, Tq) = sum over d of out * grad_out. One program: as in the forward kernel."""
    dtype: tl.constexpr = row_dot.dtype.element_ty
    image, head, first = block_of(num_queries, num_heads, BLOCK_QUERIES)
    o = load_rows(head_of(out, image, head), first, num_queries, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
    do = load_rows(head_of(grad_out, image, head), first, num_queries, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
    # The diagonal of a product, not a sum: where a query sees but one key, o is its v, and the same order of
    # summation as in do v^T makes the difference of both exactly 0.
    rows = tl.arange(0, BLOCK_QUERIES)
    diagonal = tl.where(rows[:, None] == rows[None, :], product(do, tl.trans(o), dtype), 0.0)
    store_statistic(tl.sum(diagonal, axis=1), row_dot, image, head, first, num_queries, num_heads)


@triton.jit
def add_grad_of_queries(
    acc,
    q,
    do,
    lse,
    row_dot,
    k_head,
    v_head,
    bias_head,
    first_query,
    num_queries,
    num_keys,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """acc + ds k over one source of keys."""
    for block in range(tl.cdiv(num_keys, BLOCK)):
        first = block * BLOCK
        k = load_rows(k_head, first, num_keys, BLOCK, HEAD_DIM, q.shape[1])
        v = load_rows(v_head, first, num_keys, BLOCK, HEAD_DIM, q.shape[1])
        s = scores_of(q, k, bias_head, first_query, first, num_queries, num_keys, SCALE, acc.dtype)
        p = tl.exp2(s - lse[:, None])
        ds = p * (product(do, tl.trans(v), acc.dtype) - row_dot[:, None])
        acc += product(ds.to(k.dtype), k, acc.dtype)
    return acc


@triton.jit
def prompt_attention_bwd_queries_kernel(
    lse,
    row_dot,
    grad_q,
    q,
    k,
    v,
    prompt_k,
    prompt_v,
    bias,
    prompt_lengths,
    grad_out,
    num_queries,
    num_tokens,
    num_prompts,
    num_heads,
    repeats,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PROMPTS: tl.constexpr,
):
    """grad_q (B, Tq, h, d). One program: as in the forward kernel."""
    image, head, first = block_of(num_queries, num_heads, BLOCK_QUERIES)
    kv_head = head // repeats
    q_block = load_rows(head_of(q, image, head), first, num_queries, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
    do = load_rows(head_of(grad_out, image, head), first, num_queries, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
    lse_rows = load_statistic(lse, image, head, first, num_queries, num_heads, BLOCK_QUERIES)
    row_dot_rows = load_statistic(row_dot, image, head, first, num_queries, num_heads, BLOCK_QUERIES)
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], lse.dtype.element_ty)
    acc = add_grad_of_queries(
        acc, q_block, do, lse_rows, row_dot_rows,
        head_of(prompt_k, image, kv_head), head_of(prompt_v, image, kv_head), None,
        first, num_queries, length_of(prompt_lengths, image, num_prompts), SCALE, HEAD_DIM, BLOCK_PROMPTS,
    )  # fmt: skip
    bias_head = bias
    if bias is not None:
        bias_head = bias_of(bias, image, head)
    acc = add_grad_of_queries(
        acc, q_block, do, lse_rows, row_dot_rows,
        head_of(k, image, kv_head), head_of(v, image, kv_head), bias_head,
        first, num_queries, num_tokens, SCALE, HEAD_DIM, BLOCK_TOKENS,
    )  # fmt: skip
    store_rows(acc * SCALE, head_of(grad_q, image, head), first, num_queries, HEAD_DIM)


@triton.jit
def prompt_attention_bwd_keys_kernel(
    lse,
    row_dot,
    grad_k,
    grad_v,
    q,
    k,
    v,
    bias,
    key_lengths,
    grad_out,
    num_queries,
    num_keys,
    num_heads,
    repeats,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """grad_k and grad_v (B, num_keys, g, d). One program: BLOCK_KEYS keys of one kv_head of one image."""
    dtype: tl.constexpr = lse.dtype.element_ty
    image, kv_head, first = block_of(num_keys, num_heads // repeats, BLOCK_KEYS)
    length = length_of(key_lengths, image, num_keys)
    k_block = load_rows(head_of(k, image, kv_head), first, length, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
    v_block = load_rows(head_of(v, image, kv_head), first, length, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
    dk = tl.zeros([BLOCK_KEYS, BLOCK_DIM], dtype)
    dv = tl.zeros([BLOCK_KEYS, BLOCK_DIM], dtype)
    for member in range(repeats):
        head = kv_head * repeats + member
        q_head, do_head = head_of(q, image, head), head_of(grad_out, image, head)
        bias_head = bias
        if bias is not None:
            pointer, query_stride, key_stride = bias_of(bias, image, head)
            bias_head = pointer, key_stride, query_stride
        for block in range(tl.cdiv(num_queries, BLOCK_QUERIES)):
            first_query = block * BLOCK_QUERIES
            q_block = load_rows(q_head, first_query, num_queries, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
            do = load_rows(do_head, first_query, num_queries, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
            lse_rows = load_statistic(lse, image, head, first_query, num_queries, num_heads, BLOCK_QUERIES)
            row_dot_rows = load_statistic(
                row_dot, image, head, first_query, num_queries, num_heads, BLOCK_QUERIES
            )
            # (keys, queries): p and ds transposed, as their products need them.
            s = scores_of(
                k_block, q_block, bias_head, first, first_query, num_keys, num_queries, SCALE, dtype
            )
            p = tl.exp2(s - lse_rows[None, :])
            dv += product(p.to(do.dtype), do, dtype)
            ds = p * (product(v_block, tl.trans(do), dtype) - row_dot_rows[None, :])
            dk += product(ds.to(q_block.dtype), q_block, dtype)
    if key_lengths is not None:
        exists = (tl.arange(0, BLOCK_KEYS) < length - first)[:, None]
        dk, dv = tl.where(exists, dk, 0.0), tl.where(exists, dv, 0.0)
    store_rows(dk * SCALE, head_of(grad_k, image, kv_head), first, num_keys, HEAD_DIM)
    store_rows(dv, head_of(grad_v, image, kv_head), first, num_keys, HEAD_DIM)
