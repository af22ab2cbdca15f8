"""prompt_attention on Triton: the launches, as ops that autograd, torch.compile and torch.export know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import prompt_attention as kernels
from .._autograd import differentiable_once, refuse_forward_mode
from . import configs
from ._launch import launch, num_blocks

__all__ = ["prompt_attention", "why_not_prompt_attention"]

# The kernels multiply strides by row numbers within a block in 32 bits.
STRIDE_LIMIT = 2**24


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """See vapt_fast.functional.prompt_attention."""
    tensors = (q, k, v, prompt_k, prompt_v)
    refuse_forward_mode("prompt_attention", *tensors)
    return _forward(*_autocast(tensors), bias, scale)[0]


def _autocast(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``tensors`` in the dtype that scaled_dot_product_attention gives them under autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def why_not_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float, bias: Tensor | None
) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    reasons = []
    dtypes = {t.dtype for t in _autocast((q, k, v, prompt_k, prompt_v))}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        given = ", ".join(sorted(map(str, dtypes)))
        reasons.append(
            f"all tensors must be of one dtype, float16, bfloat16, float32 or float64, got {given}"
        )
    if not 1 <= q.shape[-1] <= configs.LARGEST_HEAD:
        reasons.append(f"heads must have 1 to {configs.LARGEST_HEAD} channels, got {q.shape[-1]}")
    if bias is not None and bias.requires_grad:
        reasons.append("its kernels have no gradient of bias, which must not require one")
    return reasons


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
    """(B, h, Tq) for lse or delta."""
    batch, num_queries, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty((batch, heads, num_queries), dtype=dtype, device=q.device)


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
    """out (B, Tq, h, d) and lse (B, h, Tq); see kernels.prompt_attention."""
    batch, num_queries, heads, dim = q.shape
    num_tokens, num_prompts, groups = k.shape[1], prompt_k.shape[1], k.shape[2]
    config = configs.prompt_attention(
        "forward",
        q.dtype,
        dim,
        biased=bias is not None,
        BLOCK_QUERIES=num_queries,
        BLOCK_TOKENS=num_tokens,
        BLOCK_PROMPTS=num_prompts,
    )
    out, lse = _empty_like(q), _empty_statistic(q)
    launch(
        kernels.forward,
        config,
        batch * heads * num_blocks(config, BLOCK_QUERIES=num_queries),
        *(out, lse),
        *(_strided(t, batch) for t in (q, k, v, prompt_k, prompt_v)),
        _strided_bias(bias, batch, heads),
        *(num_queries, num_tokens, num_prompts, heads, heads // groups),
        SCALE=scale,
        HEAD_DIM=dim,
    )
    return out, lse


@_forward.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(q), _empty_statistic(q)


# ---- backward: an op for each part, since often only some of them are needed


@torch.library.custom_op("vapt_fast::prompt_attention_row_products", mutates_args=())
def _row_products(out: Tensor, grad_out: Tensor) -> Tensor:
    """delta (B, h, Tq)."""
    batch, num_queries, heads, dim = out.shape
    config = configs.prompt_attention("forward", out.dtype, dim, BLOCK_QUERIES=num_queries)
    delta = _empty_statistic(out)
    launch(
        kernels.row_products,
        config,
        batch * heads * num_blocks(config, BLOCK_QUERIES=num_queries),
        *(delta, _strided(out, batch), _strided(grad_out, batch), num_queries, heads),
        HEAD_DIM=dim,
    )
    return delta


@_row_products.register_fake
def _(out: Tensor, grad_out: Tensor) -> Tensor:
    return _empty_statistic(out)


@torch.library.custom_op("vapt_fast::prompt_attention_grad_queries", mutates_args=())
def _grad_queries(
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The gradient of q, (B, Tq, h, d)."""
    batch, num_queries, heads, dim = q.shape
    num_tokens, num_prompts, groups = k.shape[1], prompt_k.shape[1], k.shape[2]
    config = configs.prompt_attention(
        "grad_queries",
        q.dtype,
        dim,
        biased=bias is not None,
        BLOCK_QUERIES=num_queries,
        BLOCK_TOKENS=num_tokens,
        BLOCK_PROMPTS=num_prompts,
    )
    grad_q = _empty_like(q)
    launch(
        kernels.grad_queries,
        config,
        batch * heads * num_blocks(config, BLOCK_QUERIES=num_queries),
        *(grad_q, lse, delta),
        *(_strided(t, batch) for t in (q, k, v, prompt_k, prompt_v)),
        _strided_bias(bias, batch, heads),
        _strided(grad_out, batch),
        *(num_queries, num_tokens, num_prompts, heads, heads // groups),
        SCALE=scale,
        HEAD_DIM=dim,
    )
    return grad_q


@_grad_queries.register_fake
def _(grad_out: Tensor, lse: Tensor, delta: Tensor, q: Tensor, *args: Any) -> Tensor:
    return _empty_like(q)


@torch.library.custom_op("vapt_fast::prompt_attention_grad_keys", mutates_args=())
def _grad_keys(
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v (B or 1, T, g, d), which are the tokens' or the prompts'."""
    batch, num_queries, heads, dim = q.shape
    num_keys, groups = k.shape[1:3]
    config = configs.prompt_attention(
        "grad_keys", q.dtype, dim, biased=bias is not None, BLOCK_QUERIES=num_queries, BLOCK_KEYS=num_keys
    )
    # The gradients of keys that all images share are summed over the images, in the dtype of lse.
    shared = k.shape[0] != batch
    dtype = lse.dtype if shared else k.dtype
    grad_k, grad_v = (
        torch.empty((batch, num_keys, groups, dim), dtype=dtype, device=k.device) for _ in range(2)
    )
    launch(
        kernels.grad_keys,
        config,
        batch * groups * num_blocks(config, BLOCK_KEYS=num_keys),
        *(grad_k, grad_v, lse, delta),
        *(_strided(t, batch) for t in (q, k, v)),
        _strided_bias(bias, batch, heads),
        _strided(grad_out, batch),
        *(num_queries, num_keys, heads, heads // groups),
        SCALE=scale,
        HEAD_DIM=dim,
    )
    if shared:
        grad_k, grad_v = (grad.sum(dim=0, keepdim=True).to(k.dtype) for grad in (grad_k, grad_v))
    return grad_k, grad_v


@_grad_keys.register_fake
def _(
    grad_out: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return _empty_like(k), _empty_like(v)


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(out, lse, *tensors)


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    out, lse, q, k, v, prompt_k, prompt_v, bias = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grad_q = grad_k = grad_v = grad_prompt_k = grad_prompt_v = None
    common = grad_out, lse, _row_products(out, grad_out), q
    if needed[0]:
        grad_q = _grad_queries(*common, k, v, prompt_k, prompt_v, bias, ctx.scale)
    if needed[1] or needed[2]:
        grad_k, grad_v = _grad_keys(*common, k, v, bias, ctx.scale)
    if needed[3] or needed[4]:
        grad_prompt_k, grad_prompt_v = _grad_keys(*common, prompt_k, prompt_v, None, ctx.scale)
    grads = differentiable_once("prompt_attention", grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v)
    return *grads, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
