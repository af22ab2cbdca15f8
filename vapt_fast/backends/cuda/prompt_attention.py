"""prompt_attention on CUDA: the launches, as ops that autograd, torch.compile and torch.export know.

The packed form takes q, k and v as slices of one tensor and writes their gradients as slices of one, where
autograd would concatenate three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from .._autograd import differentiable_once, no_zeros, refuse_forward_mode
from .._native import native
from .._packed import unpack
from ._launch import aligned, launch, rows

__all__ = ["prompt_attention", "prompt_attention_packed", "why_not_prompt_attention"]

LARGEST_HEAD = 128


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """See vapt_fast.functional.prompt_attention."""
    tensors = (q, k, v, prompt_k, prompt_v)
    refuse_forward_mode("prompt_attention", *tensors)
    return _forward(*(t.to(autocast_dtype(t.dtype, t.device)) for t in tensors), scale)[0]


def prompt_attention_packed(
    qkv: Tensor, prompt_kv: Tensor, num_heads: int, num_kv_heads: int, scale: float, bias: Tensor | None
) -> Tensor:
    """See vapt_fast.functional.prompt_attention_packed."""
    tensors = (qkv, prompt_kv)
    refuse_forward_mode("prompt_attention", *tensors)
    tensors = (t.to(autocast_dtype(t.dtype, t.device)) for t in tensors)
    return _packed_forward(*tensors, num_heads, num_kv_heads, scale)[0]


def why_not_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float, bias: Tensor | None
) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    tensors = (q, k, v, prompt_k, prompt_v)
    reasons = []
    dtypes = {autocast_dtype(t.dtype, t.device) for t in tensors}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16}:
        given = ", ".join(sorted(map(str, dtypes)))
        reasons.append(f"all tensors must be of one dtype, float16 or bfloat16, got {given}")
    dim = q.shape[-1]
    if not 8 <= dim <= LARGEST_HEAD or dim % 8:
        reasons.append(f"heads must have 8, 16, ... or {LARGEST_HEAD} channels, got {dim}")
    if bias is not None:
        reasons.append("its kernels add no bias to scores")
    if not reasons and not torch.compiler.is_compiling():  # there is no asking then: the launch raises
        reasons += _shared_memory_lacks(*tensors)
    return reasons


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _shared_memory_lacks(*tensors: Tensor) -> list[str]:
    """What the device lacks of shared memory, which in the forward holds all keys and values of a head."""
    q, k, _, prompt_k, _ = tensors
    sizes = _sizes(torch.float16, q, k, prompt_k)  # bfloat16 is as large
    needed = native().prompt_attention_forward_shared_memory(sizes)
    of_tokens, of_prompts = (any(t.requires_grad for t in group) for group in (tensors[:3], tensors[3:]))
    if torch.is_grad_enabled() and (of_tokens or of_prompts):
        backward = native().prompt_attention_backward_shared_memory(sizes, prompts_only=not of_tokens)
        needed = max(needed, backward)
    available = _shared_memory(q.device)
    if needed <= available:
        return []
    keys = f"{k.shape[1]} + {prompt_k.shape[1]} keys of {q.shape[3]} channels"
    return [f"{keys} need {needed} bytes of shared memory, {q.device} has {available}"]


# ---- launches


def _sizes(dtype: torch.dtype, q: Tensor, k: Tensor, prompt_k: Tensor) -> Any:
    """The op's sizes for vapt_fast._C."""
    batch, num_queries, heads, dim = q.shape
    return native().PromptAttentionSizes(
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        queries=num_queries,
        tokens=k.shape[1],
        prompts=prompt_k.shape[1],
        heads=heads,
        groups=k.shape[2],
        head_dim=dim,
    )


def _empty_like(tensor: Tensor) -> Tensor:
    """A contiguous one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _empty_lse(q: Tensor) -> Tensor:
    batch, num_queries, heads, _ = q.shape
    return torch.empty((batch, heads, num_queries), dtype=torch.float32, device=q.device)


def _empty_joint(k: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """(B, T, 2g, d) for the gradients of k and v as one."""
    _, num_keys, groups, dim = k.shape
    return torch.empty((batch, num_keys, 2 * groups, dim), dtype=dtype, device=k.device)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out (B, Tq, h, d) and lse (B, h, Tq), float32 and to the base of 2; see csrc/include."""
    batch = q.shape[0]
    out, lse = _empty_like(q), _empty_lse(q)
    q, k, v, prompt_k, prompt_v = (aligned(t) for t in (q, k, v, prompt_k, prompt_v))
    launch(
        "prompt_attention_forward",
        q,
        sizes=_sizes(q.dtype, q, k, prompt_k),
        scale=scale,
        q=rows(q),
        k=rows(k),
        v=rows(v),
        prompt_k=rows(prompt_k, batch),
        prompt_v=rows(prompt_v, batch),
        out=rows(out),
        lse=lse.data_ptr(),
    )
    return out, lse


def _write_gradients(
    of_tokens: tuple[Tensor, Tensor, Tensor] | None,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    scale: float,
) -> Tensor:
    """Write the gradients of q, k and v to ``of_tokens``; those of the prompts as one, (B or 1, P, 2g, d)."""
    batch = q.shape[0]
    # Those of prompts that all images share are summed over the images, in float32.
    shared = prompt_k.shape[0] != batch
    of_prompts = _empty_joint(prompt_k, batch, torch.float32 if shared else q.dtype)
    grad_prompt_k, grad_prompt_v = of_prompts.chunk(2, dim=2)
    grad_q, grad_k, grad_v = (None, None, None) if of_tokens is None else map(rows, of_tokens)
    sizes, available = _sizes(q.dtype, q, k, prompt_k), _shared_memory(q.device)
    needed = native().prompt_attention_backward_workspace(
        sizes, prompts_only=of_tokens is None, shared_memory=available
    )
    workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
    grad_out, out, q, k, v, prompt_k, prompt_v = (
        aligned(t) for t in (grad_out, out, q, k, v, prompt_k, prompt_v)
    )
    launch(
        "prompt_attention_backward",
        q,
        sizes=sizes,
        scale=scale,
        q=rows(q),
        k=rows(k),
        v=rows(v),
        prompt_k=rows(prompt_k, batch),
        prompt_v=rows(prompt_v, batch),
        out=rows(out),
        lse=lse.data_ptr(),
        grad_out=rows(grad_out),
        grad_q=grad_q,
        grad_k=grad_k,
        grad_v=grad_v,
        grad_prompt_k=rows(grad_prompt_k),
        grad_prompt_v=rows(grad_prompt_v),
        float32_prompt_grads=shared,
        shared_memory=available,
        workspace=workspace.data_ptr(),
    )
    return of_prompts.sum(dim=0, keepdim=True).to(prompt_k.dtype) if shared else of_prompts


# ---- forward


@torch.library.custom_op("vapt_fast::cuda_prompt_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend(q, k, v, prompt_k, prompt_v, scale)


@_forward.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(q), _empty_lse(q)


@torch.library.custom_op("vapt_fast::cuda_prompt_attention_packed", mutates_args=())
def _packed_forward(
    qkv: Tensor, prompt_kv: Tensor, num_heads: int, num_kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend(*unpack(qkv, prompt_kv, num_heads, num_kv_heads), scale)


@_packed_forward.register_fake
def _(
    qkv: Tensor, prompt_kv: Tensor, num_heads: int, num_kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    q = unpack(qkv, prompt_kv, num_heads, num_kv_heads)[0]
    return _empty_like(q), _empty_lse(q)


# ---- backward: an op for all gradients, and one for the prompts' alone, which is cheaper


@torch.library.custom_op("vapt_fast::cuda_prompt_attention_backward", mutates_args=())
def _gradients(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q (B, Tq, h, d), k and v as one (B, T, 2g, d), the prompts' (B or 1, P, 2g, d)."""
    grad_q, grad_kv = _empty_like(q), _empty_joint(k, q.shape[0], k.dtype)
    of_tokens = (grad_q, *grad_kv.chunk(2, dim=2))
    grad_prompt_kv = _write_gradients(of_tokens, grad_out, out, lse, q, k, v, prompt_k, prompt_v, scale)
    return grad_q, grad_kv, grad_prompt_kv


@_gradients.register_fake
def _(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    joint = (_empty_joint(keys, keys.shape[0], keys.dtype) for keys in (k, prompt_k))
    return _empty_like(q), *joint


@torch.library.custom_op("vapt_fast::cuda_prompt_attention_packed_backward", mutates_args=())
def _packed_gradients(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    prompt_kv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv (B, T, (h + 2g) * d) and of the prompts (B or 1, P, 2g, d)."""
    grad_qkv = _empty_like(qkv)
    of_tokens = unpack(grad_qkv, prompt_kv, num_heads, num_kv_heads)[:3]
    separate = unpack(qkv, prompt_kv, num_heads, num_kv_heads)
    return grad_qkv, _write_gradients(of_tokens, grad_out, out, lse, *separate, scale)


@_packed_gradients.register_fake
def _(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    prompt_kv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    prompt_k = unpack(qkv, prompt_kv, num_heads, num_kv_heads)[3]
    return _empty_like(qkv), _empty_joint(prompt_k, prompt_k.shape[0], prompt_k.dtype)


@torch.library.custom_op("vapt_fast::cuda_prompt_attention_backward_prompts", mutates_args=())
def _prompt_gradients(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    scale: float,
) -> Tensor:
    """The gradients of prompt_k and prompt_v as one, (B or 1, P, 2g, d)."""
    return _write_gradients(None, grad_out, out, lse, q, k, v, prompt_k, prompt_v, scale)


@_prompt_gradients.register_fake
def _(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    *args: Any,
) -> Tensor:
    return _empty_joint(prompt_k, prompt_k.shape[0], prompt_k.dtype)


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    out, lse = output
    no_zeros(ctx, lse)
    ctx.save_for_backward(out, lse, *tensors)


def _backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    grad_q = grad_k = grad_v = grad_prompt_k = grad_prompt_v = None
    if any(ctx.needs_input_grad[:3]):
        grad_q, grad_kv, grad_prompt_kv = _gradients(grad_out, *ctx.saved_tensors, ctx.scale)
        grad_k, grad_v = grad_kv.chunk(2, dim=2)
    else:
        grad_prompt_kv = _prompt_gradients(grad_out, *ctx.saved_tensors, ctx.scale)
    grad_prompt_k, grad_prompt_v = grad_prompt_kv.chunk(2, dim=2)
    grads = differentiable_once("prompt_attention", grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v)
    return *grads, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _packed_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, num_heads, num_kv_heads, ctx.scale = inputs
    ctx.heads = num_heads, num_kv_heads
    out, lse = output
    no_zeros(ctx, lse)
    ctx.save_for_backward(out, lse, *tensors)


def _packed_backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 5
    out, lse, qkv, prompt_kv = ctx.saved_tensors
    grad_qkv = None
    if ctx.needs_input_grad[0]:
        grad_qkv, grad_prompt_kv = _packed_gradients(
            grad_out, out, lse, qkv, prompt_kv, *ctx.heads, ctx.scale
        )
    else:
        separate = unpack(qkv, prompt_kv, *ctx.heads)
        grad_prompt_kv = _prompt_gradients(grad_out, out, lse, *separate, ctx.scale)
    grads = differentiable_once("prompt_attention", grad_qkv, grad_prompt_kv.flatten(2))
    return *grads, None, None, None


_packed_forward.register_autograd(_packed_backward, setup_context=_packed_setup_context)
