"""prompt_attention on Triton: the launches, as ops that autograd, torch.compile and torch.export know.

The packed form takes q, k and v as slices of one tensor and writes their gradients as slices of one, where
autograd would concatenate three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import prompt_attention as kernels
from .._autocast import autocast_dtype
from .._autograd import differentiable_once, no_zeros, refuse_forward_mode
from .._packed import unpack
from .._why_not import why_not_frozen, why_not_one_dtype
from . import configs
from ._launch import STRIDE_LIMIT, launch, num_blocks

__all__ = ["prompt_attention", "prompt_attention_packed", "why_not_prompt_attention"]


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """See vapt_fast.functional.prompt_attention."""
    tensors = (q, k, v, prompt_k, prompt_v)
    refuse_forward_mode("prompt_attention", *tensors)
    return _forward(*(t.to(autocast_dtype(t.dtype, t.device)) for t in tensors), bias, scale)[0]


def prompt_attention_packed(
    qkv: Tensor, prompt_kv: Tensor, num_heads: int, num_kv_heads: int, scale: float, bias: Tensor | None
) -> Tensor:
    """See vapt_fast.functional.prompt_attention_packed."""
    tensors = (qkv, prompt_kv)
    refuse_forward_mode("prompt_attention", *tensors)
    tensors = (t.to(autocast_dtype(t.dtype, t.device)) for t in tensors)
    return _packed_forward(*tensors, bias, num_heads, num_kv_heads, scale)[0]


def why_not_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float, bias: Tensor | None
) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    reasons = why_not_one_dtype(q, k, v, prompt_k, prompt_v) + why_not_frozen(bias=bias)
    if not 1 <= q.shape[-1] <= configs.LARGEST_HEAD:
        reasons.append(f"heads must have 1 to {configs.LARGEST_HEAD} channels, got {q.shape[-1]}")
    return reasons


# ---- what the kernels take


def _strided(tensor: Tensor, batch: int) -> tuple[Tensor | int, ...]:
    """(B or 1, T, h, d) as the kernels take it: with the strides of B = ``batch``, T and h."""
    if tensor.stride(-1) != 1 or tensor.stride(1) >= STRIDE_LIMIT:
        tensor = tensor.contiguous()
    return (tensor, *tensor.expand(batch, -1, -1, -1).stride()[:3])


def _strided_bias(bias: Tensor | None, batch: int, heads: int) -> tuple[Tensor | int, ...] | None:
    """The bias as the kernels take it: with the strides of (B, h, Tq, T)."""
    if bias is None:
        return None
    if max(bias.stride()[-2:]) >= STRIDE_LIMIT:
        bias = bias.contiguous()
    return (bias, *bias.expand(batch, heads, -1, -1).stride())


def _empty_like(tensor: Tensor) -> Tensor:
    """A contiguous one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _empty_statistic(q: Tensor) -> Tensor:
    """(B, h, Tq) for lse or row_dot."""
    batch, num_queries, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty((batch, heads, num_queries), dtype=dtype, device=q.device)


# ---- launches


def _launch_by_queries(
    kernel: str,
    statistics: tuple[Tensor, ...],
    result: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    bias: Tensor | None,
    scale: float,
    *incoming: Tensor,
) -> None:
    """Run a kernel of kernels.prompt_attention that goes over the queries and writes a ``result`` like q."""
    batch, num_queries, heads, dim = q.shape
    num_tokens, num_prompts, groups = k.shape[1], prompt_k.shape[1], k.shape[2]
    config = configs.prompt_attention(
        kernel,
        q.dtype,
        dim,
        biased=bias is not None,
        BLOCK_QUERIES=num_queries,
        BLOCK_TOKENS=num_tokens,
        BLOCK_PROMPTS=num_prompts,
    )
    launch(
        getattr(kernels, kernel),
        config,
        batch * heads * num_blocks(config, BLOCK_QUERIES=num_queries),
        *statistics,
        *(_strided(t, batch) for t in (result, q, k, v, prompt_k, prompt_v)),
        _strided_bias(bias, batch, heads),
        *(_strided(t, batch) for t in incoming),
        *(num_queries, num_tokens, num_prompts, heads, heads // groups),
        SCALE=scale,
        HEAD_DIM=dim,
    )


def _attend(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """out (B, Tq, h, d) and lse (B, h, Tq); see kernels.prompt_attention."""
    out, lse = _empty_like(q), _empty_statistic(q)
    _launch_by_queries("forward", (lse,), out, q, *args)
    return out, lse


def _write_grad_of_keys(
    grad_k: Tensor,
    grad_v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    row_dot: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
) -> None:
    """k and v are the tokens' or the prompts', each image's gradient is written on its own."""
    batch, num_queries, heads, dim = q.shape
    num_keys, groups = k.shape[1:3]
    config = configs.prompt_attention(
        "grad_keys", q.dtype, dim, biased=bias is not None, BLOCK_QUERIES=num_queries, BLOCK_KEYS=num_keys
    )
    launch(
        kernels.grad_keys,
        config,
        batch * groups * num_blocks(config, BLOCK_KEYS=num_keys),
        *(lse, row_dot),
        *(_strided(t, batch) for t in (grad_k, grad_v, q, k, v)),
        _strided_bias(bias, batch, heads),
        _strided(grad_out, batch),
        *(num_queries, num_keys, heads, heads // groups),
        SCALE=scale,
        HEAD_DIM=dim,
    )


# ---- forward


@torch.library.custom_op("vapt_fast::prompt_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _attend(q, k, v, prompt_k, prompt_v, bias, scale)


@_forward.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(q), _empty_statistic(q)


@torch.library.custom_op("vapt_fast::prompt_attention_packed", mutates_args=())
def _packed_forward(
    qkv: Tensor, prompt_kv: Tensor, bias: Tensor | None, num_heads: int, num_kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend(*unpack(qkv, prompt_kv, num_heads, num_kv_heads), bias, scale)


@_packed_forward.register_fake
def _(qkv: Tensor, prompt_kv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _, *heads, _ = args
    q = unpack(qkv, prompt_kv, *heads)[0]
    return _empty_like(q), _empty_statistic(q)


# ---- backward: an op for each part, since often only some of them are needed


@torch.library.custom_op("vapt_fast::prompt_attention_row_products", mutates_args=())
def _row_products(out: Tensor, grad_out: Tensor) -> Tensor:
    """row_dot (B, h, Tq)."""
    batch, num_queries, heads, dim = out.shape
    config = configs.prompt_attention("forward", out.dtype, dim, BLOCK_QUERIES=num_queries)
    row_dot = _empty_statistic(out)
    launch(
        kernels.row_products,
        config,
        batch * heads * num_blocks(config, BLOCK_QUERIES=num_queries),
        *(row_dot, _strided(out, batch), _strided(grad_out, batch), num_queries, heads),
        HEAD_DIM=dim,
    )
    return row_dot


@_row_products.register_fake
def _(out: Tensor, grad_out: Tensor) -> Tensor:
    return _empty_statistic(out)


@torch.library.custom_op("vapt_fast::prompt_attention_grad_queries", mutates_args=())
def _grad_queries(
    grad_out: Tensor,
    lse: Tensor,
    row_dot: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The gradient of q, (B, Tq, h, d)."""
    grad_q = _empty_like(q)
    keys = (k, v, prompt_k, prompt_v)
    _launch_by_queries("grad_queries", (lse, row_dot), grad_q, q, *keys, bias, scale, grad_out)
    return grad_q


@_grad_queries.register_fake
def _(grad_out: Tensor, lse: Tensor, row_dot: Tensor, q: Tensor, *args: Any) -> Tensor:
    return _empty_like(q)


@torch.library.custom_op("vapt_fast::prompt_attention_grad_keys", mutates_args=())
def _grad_keys(
    grad_out: Tensor,
    lse: Tensor,
    row_dot: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The gradients of k and v, which are the tokens' or the prompts', as one: (B or 1, T, 2g, d)."""
    # Those of keys that all images share are summed over the images, in the dtype of lse.
    shared = k.shape[0] != q.shape[0]
    grad_kv = _empty_grad_of_keys(k, q.shape[0], lse.dtype if shared else k.dtype)
    _write_grad_of_keys(*grad_kv.chunk(2, dim=2), grad_out, lse, row_dot, q, k, v, bias, scale)
    return grad_kv.sum(dim=0, keepdim=True).to(k.dtype) if shared else grad_kv


def _empty_grad_of_keys(k: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    _, num_keys, groups, dim = k.shape
    return torch.empty((batch, num_keys, 2 * groups, dim), dtype=dtype, device=k.device)


@_grad_keys.register_fake
def _(grad_out: Tensor, lse: Tensor, row_dot: Tensor, q: Tensor, k: Tensor, *args: Any) -> Tensor:
    return _empty_grad_of_keys(k, k.shape[0], k.dtype)


@torch.library.custom_op("vapt_fast::prompt_attention_grad_packed", mutates_args=())
def _grad_packed(
    grad_out: Tensor,
    lse: Tensor,
    row_dot: Tensor,
    qkv: Tensor,
    prompt_kv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> Tensor:
    """The gradient of qkv, (B, T, (h + 2g) * d)."""
    grad_qkv = _empty_like(qkv)
    grad_q, grad_k, grad_v, _, _ = unpack(grad_qkv, prompt_kv, num_heads, num_kv_heads)
    q, k, v, *prompts = unpack(qkv, prompt_kv, num_heads, num_kv_heads)
    _launch_by_queries("grad_queries", (lse, row_dot), grad_q, q, k, v, *prompts, bias, scale, grad_out)
    _write_grad_of_keys(grad_k, grad_v, grad_out, lse, row_dot, q, k, v, bias, scale)
    return grad_qkv


@_grad_packed.register_fake
def _(grad_out: Tensor, lse: Tensor, row_dot: Tensor, qkv: Tensor, *args: Any) -> Tensor:
    return _empty_like(qkv)


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    out, lse = output
    no_zeros(ctx, lse)
    ctx.save_for_backward(out, lse, *tensors)


def _backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    out, lse, q, k, v, prompt_k, prompt_v, bias = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grad_q = grad_k = grad_v = grad_prompt_k = grad_prompt_v = None
    common = grad_out, lse, _row_products(out, grad_out), q
    if needed[0]:
        grad_q = _grad_queries(*common, k, v, prompt_k, prompt_v, bias, ctx.scale)
    if needed[1] or needed[2]:
        grad_k, grad_v = _grad_keys(*common, k, v, bias, ctx.scale).chunk(2, dim=2)
    if needed[3] or needed[4]:
        grad_prompt_kv = _grad_keys(*common, prompt_k, prompt_v, None, ctx.scale)
        grad_prompt_k, grad_prompt_v = grad_prompt_kv.chunk(2, dim=2)
    grads = differentiable_once("prompt_attention", grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v)
    return *grads, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _packed_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, num_heads, num_kv_heads, ctx.scale = inputs
    ctx.heads = num_heads, num_kv_heads
    out, lse = output
    no_zeros(ctx, lse)
    ctx.save_for_backward(out, lse, *tensors)


def _packed_backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    out, lse, qkv, prompt_kv, bias = ctx.saved_tensors
    grad_qkv = grad_prompt_kv = None
    common = grad_out, lse, _row_products(out, grad_out)
    if ctx.needs_input_grad[0]:
        grad_qkv = _grad_packed(*common, qkv, prompt_kv, bias, *ctx.heads, ctx.scale)
    if ctx.needs_input_grad[1]:
        q, _, _, prompt_k, prompt_v = unpack(qkv, prompt_kv, *ctx.heads)
        grad_prompt_kv = _grad_keys(*common, q, prompt_k, prompt_v, None, ctx.scale).flatten(2)
    grads = differentiable_once("prompt_attention", grad_qkv, grad_prompt_kv)
    return *grads, None, None, None, None


_packed_forward.register_autograd(_packed_backward, setup_context=_packed_setup_context)
