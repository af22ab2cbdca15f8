"""prompt_attention on CUDA: the launches, as ops that autograd, torch.compile and torch.export know.

The packed form takes q, k and v as slices of one tensor and writes their gradients as slices of one, where
autograd would concatenate three.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from .._autograd import differentiable_once, no_zeros, refuse_forward_mode
from .._native import native
from .._packed import unpack
from ._launch import address, aligned, launch, rows, side_by_side

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
    # int: some tracers, which don't say that they compile, have sizes that can't be hashed. bfloat16 takes as
    # much.
    sizes = _sizes(native(), torch.float16, *map(int, (*q.shape, *k.shape[1:3], prompt_k.shape[1])))
    of_tokens, of_prompts = (any(t.requires_grad for t in group) for group in (tensors[:3], tensors[3:]))
    learns = torch.is_grad_enabled() and (of_tokens or of_prompts)
    needed = _needed(native(), sizes, learns, of_tokens)
    available = _shared_memory(q.device)
    if needed <= available:
        return []
    keys = f"{k.shape[1]} + {prompt_k.shape[1]} keys of {q.shape[3]} channels"
    return [f"{keys} need {needed} bytes of shared memory, {q.device} has {available}"]


@lru_cache(maxsize=256)  # it is asked for each block of each step
def _needed(module: ModuleType, sizes: Any, learns: bool, of_tokens: bool) -> int:
    """Bytes of shared memory for the forward, and for the backward if something ``learns``."""
    forward = module.prompt_attention_forward_shared_memory(sizes)
    if not learns:
        return forward
    return max(forward, module.prompt_attention_backward_shared_memory(sizes, prompts_only=not of_tokens))


# ---- what the kernels take


@lru_cache(maxsize=256)
def _sizes(
    module: ModuleType,
    dtype: torch.dtype,
    batch: int,
    queries: int,
    heads: int,
    dim: int,
    tokens: int,
    groups: int,
    prompts: int,
) -> Any:
    """The op's sizes for ``module``, vapt_fast._C."""
    return module.PromptAttentionSizes(
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        queries=queries,
        tokens=tokens,
        prompts=prompts,
        heads=heads,
        groups=groups,
        head_dim=dim,
    )


class _Inputs:
    """Sizes and addresses of q, k, v, prompt_k and prompt_v, with the tensors that must live until a launch.

    Args:
        tensors: the five, or two that hold them side by side, qkv (B, T, (h + 2g) * d) and prompt_kv
            (B or 1, P, 2g * d), with ``heads`` = (h, g). Those that are not ``aligned`` are copied.
    """

    def __init__(self, tensors: tuple[Tensor, ...], heads: tuple[int, int] | None = None) -> None:
        tensors = self.tensors = [aligned(tensor) for tensor in tensors]
        batch, of_prompts = tensors[0].shape[0], tensors[-1]
        self.shared = of_prompts.shape[0] != batch
        if heads is None:
            q, k = tensors[:2]
            self.shape, num_tokens, self.groups = q.shape, *k.shape[1:3]
            parts = [rows(tensor, batch) for tensor in tensors]
        else:
            (_, num_tokens, width), (num_heads, self.groups) = tensors[0].shape, heads
            dim = width // (num_heads + 2 * self.groups)
            self.shape = (batch, num_tokens, num_heads, dim)
            parts = [
                *side_by_side(tensors[0], dim, num_heads, self.groups, self.groups),
                *side_by_side(of_prompts, dim, self.groups, self.groups, batch=batch),
            ]
        self.sizes = _sizes(
            native(), tensors[0].dtype, *self.shape, num_tokens, self.groups, of_prompts.shape[1]
        )
        self.rows = dict(zip(("q", "k", "v", "prompt_k", "prompt_v"), parts, strict=True))


def _empty_outputs(like: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """out (B, Tq, h, d) and lse (B, h, Tq), float32."""
    batch, queries, heads, _ = shape
    out = torch.empty(shape, dtype=like.dtype, device=like.device)
    return out, torch.empty((batch, heads, queries), dtype=torch.float32, device=like.device)


def _empty_like(tensor: Tensor) -> Tensor:
    """A contiguous one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _empty_joint(keys: Tensor, groups: int, dim: int) -> Tensor:
    """(B or 1, T, 2g, d) for the gradients of keys and values as one, ``keys`` being (B or 1, T, ...)."""
    shape = (keys.shape[0], keys.shape[1], 2 * groups, dim)
    return torch.empty(shape, dtype=keys.dtype, device=keys.device)


# ---- launches


def _attend(inputs: _Inputs, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, Tq, h, d) and lse (B, h, Tq), float32 and to the base of 2; see csrc/include."""
    out, lse = _empty_outputs(inputs.tensors[0], inputs.shape)
    launch(
        "prompt_attention_forward",
        out,
        sizes=inputs.sizes,
        scale=scale,
        **inputs.rows,
        out=rows(out),
        lse=address(lse),
    )
    return out, lse


def _write_gradients(
    of_tokens: Sequence[tuple[int, ...] | None] | None,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: _Inputs,
    scale: float,
) -> Tensor:
    """Write the gradients of q, k and v to these rows; those of the prompts as one, (B or 1, P, 2g, d)."""
    prompts, batch, dim = inputs.tensors[-1], inputs.shape[0], inputs.shape[3]
    of_prompts = torch.empty(
        (batch, prompts.shape[1], 2 * inputs.groups, dim),
        dtype=torch.float32 if inputs.shared else prompts.dtype,  # before they are summed over the images
        device=out.device,
    )
    grad_prompt_k, grad_prompt_v = side_by_side(of_prompts.flatten(2), dim, inputs.groups, inputs.groups)
    grad_q, grad_k, grad_v = (None, None, None) if of_tokens is None else of_tokens
    available = _shared_memory(out.device)
    needed = native().prompt_attention_backward_workspace(
        inputs.sizes, prompts_only=of_tokens is None, shared_memory=available
    )
    workspace = torch.empty(needed, dtype=torch.float32, device=out.device) if needed else None
    grad_out, out = aligned(grad_out), aligned(out)
    launch(
        "prompt_attention_backward",
        out,
        sizes=inputs.sizes,
        scale=scale,
        **inputs.rows,
        out=rows(out),
        lse=address(lse),
        grad_out=rows(grad_out),
        grad_q=grad_q,
        grad_k=grad_k,
        grad_v=grad_v,
        grad_prompt_k=grad_prompt_k,
        grad_prompt_v=grad_prompt_v,
        float32_prompt_grads=inputs.shared,
        shared_memory=available,
        workspace=address(workspace),
    )
    return of_prompts.sum(dim=0, keepdim=True).to(prompts.dtype) if inputs.shared else of_prompts


# ---- forward


@torch.library.custom_op("vapt_fast::cuda_prompt_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend(_Inputs((q, k, v, prompt_k, prompt_v)), scale)


@_forward.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, q.shape)


@torch.library.custom_op("vapt_fast::cuda_prompt_attention_packed", mutates_args=())
def _packed_forward(
    qkv: Tensor, prompt_kv: Tensor, num_heads: int, num_kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend(_Inputs((qkv, prompt_kv), (num_heads, num_kv_heads)), scale)


@_packed_forward.register_fake
def _(
    qkv: Tensor, prompt_kv: Tensor, num_heads: int, num_kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, width = qkv.shape
    return _empty_outputs(qkv, (batch, num_tokens, num_heads, width // (num_heads + 2 * num_kv_heads)))


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
    inputs = _Inputs((q, k, v, prompt_k, prompt_v))
    groups, dim = k.shape[2:]
    grad_q, grad_kv = _empty_like(q), _empty_joint(k, groups, dim)
    of_tokens = (rows(grad_q), *side_by_side(grad_kv.flatten(2), dim, groups, groups))
    return grad_q, grad_kv, _write_gradients(of_tokens, grad_out, out, lse, inputs, scale)


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
    return _empty_like(q), *(_empty_joint(keys, *k.shape[2:]) for keys in (k, prompt_k))


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
    inputs = _Inputs((qkv, prompt_kv), (num_heads, num_kv_heads))
    grad_qkv = _empty_like(qkv)
    of_tokens = side_by_side(grad_qkv, inputs.shape[3], num_heads, num_kv_heads, num_kv_heads)
    return grad_qkv, _write_gradients(of_tokens, grad_out, out, lse, inputs, scale)


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
    return _empty_like(qkv), _empty_joint(prompt_kv, num_kv_heads, out.shape[3])


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
    return _write_gradients(None, grad_out, out, lse, _Inputs((q, k, v, prompt_k, prompt_v)), scale)


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
    return _empty_joint(prompt_k, *k.shape[2:])


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
