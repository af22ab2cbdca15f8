"""prompt_attention: the tokens' queries attend to the prompts and the tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import cast
from ..base import Op, Signature, empty_like
from ..checks import (
    check_float,
    check_integer,
    check_length_values,
    check_lengths,
    check_number,
    check_one_dtype,
    check_same_device,
    check_score_bias,
    check_shape,
)
from ..measurement import Measurement, has_half_tokens

__all__ = ["prompt_attention", "prompt_attention_packed"]


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute softmax(scale * q [prompt_k, k]^T + [0, bias]) [prompt_v, v], head by head.

    Prompts that are thrown away after the block need no query of their own.

    Args:
        q: (B, Tq, h, d).
        k, v: (B, T, g, d); g divides h, and each g serves h / g heads in a row (grouped queries).
        prompt_k, prompt_v: (B, P, g, d), or (1, P, g, d) where they are the same for every image.
            All these tensors are of one floating dtype, unless autocast casts them.
        scale: factor of the scores.
        bias: broadcastable to (B, h, Tq, T), added to the tokens' scores; the prompts' is zero.
        prompt_lengths: (B,), int32 or int64: for each image, how many of the first of its P prompts exist,
            0 to P; None: all. The others have no weight, whatever they hold, NaN too, and gradients of 0.
            Values out of range raise on a CPU. They are clamped on a GPU, since reading them would wait for
            it, and where the call is recorded, as by torch.compile.
        backend: "auto", "torch", "triton" or "cuda"; None for the current one, see vapt_fast.use_backend.

    Returns:
        (B, Tq, h, d) in ``q``'s dtype. Differentiable in all floating tensors; by kernels, whose backward is
        written by hand, only once, and not in ``bias``, which must not require a gradient there.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    args = Arguments(q, k, v, prompt_k, prompt_v, bias, prompt_lengths, scale)
    (out,) = _ATTENTION(backend, args)
    return out


def prompt_attention_packed(
    qkv: Tensor,
    prompt_kv: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    bias: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute ``prompt_attention`` of the queries, keys and values that one projection made, in one tensor.

    The same as splitting ``qkv`` and ``prompt_kv``, but their gradients are written in one piece: a split's
    backward concatenates, which reads and writes all of them once more.

    Args:
        qkv: (B, T, (h + 2g) * d), the queries of h = ``num_heads`` heads, then the keys and the values of
            g = ``num_kv_heads``; g divides h.
        prompt_kv: (B, P, 2g * d), keys and values of the prompts, or (1, P, 2g * d) where they are the same
            for every image.
        num_heads, num_kv_heads, scale, bias, prompt_lengths, backend: see prompt_attention.

    Returns:
        (B, T, h, d) in ``qkv``'s dtype. Differentiable as prompt_attention is.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    args = PackedArguments(qkv, prompt_kv, bias, prompt_lengths, num_heads, num_kv_heads, scale)
    (out,) = _PACKED(backend, args)
    return out


def unpack(qkv: Tensor, prompt_kv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, ...]:
    """Return q, k, v, prompt_k and prompt_v, as ``prompt_attention`` takes them: views."""
    num_parts = num_heads + 2 * num_kv_heads
    dim = qkv.shape[2] // num_parts
    heads = qkv.view(*qkv.shape[:2], num_parts, dim)
    prompt_heads = prompt_kv.view(*prompt_kv.shape[:2], 2 * num_kv_heads, dim)
    of_tokens = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 2)
    return *of_tokens, *prompt_heads.split_with_sizes((num_kv_heads, num_kv_heads), 2)


# ---- the op


class Arguments(NamedTuple):
    """As in ``prompt_attention``, q to prompt_v of one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompt_k: Tensor
    prompt_v: Tensor
    bias: Tensor | None
    prompt_lengths: Tensor | None
    scale: float


class Outputs(NamedTuple):
    """out (B, Tq, h, d), and lse (B, h, Tq): log2 of the sum of exp2 over the scores in base 2."""

    out: Tensor
    lse: Tensor


class Saved(NamedTuple):
    """What the backward reads."""

    out: Tensor
    lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    prompt_k: Tensor
    prompt_v: Tensor
    bias: Tensor | None
    prompt_lengths: Tensor | None
    scale: float


class Gradients(NamedTuple):
    """Those of k and v are needed both or not at all, and so are those of prompt_k and prompt_v."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    prompt_k: Tensor | None
    prompt_v: Tensor | None


def _empty_outputs(like: Tensor, batch: int, num_queries: int, heads: int, dim: int) -> Outputs:
    dtype = torch.promote_types(like.dtype, torch.float32)
    lse = like.new_empty((batch, heads, num_queries), dtype=dtype)
    return Outputs(like.new_empty((batch, num_queries, heads, dim)), lse)


def _few_keys(args: Arguments) -> bool:
    """Whether there are few keys, which cost the more to concatenate; 247 were measured, of every image."""
    plain = args.bias is None and args.prompt_lengths is None
    return has_half_tokens(args) and plain and args.k.shape[1] + args.prompt_k.shape[1] <= 400


def _few_keys_of_narrow_heads(args: Arguments) -> bool:
    """The same of heads with at most 64 channels; CUDA's kernels for wider ones were not measured."""
    return _few_keys(args) and args.q.shape[3] <= 64


class _PromptAttention(Op):
    name = "prompt_attention"
    measured = (
        Measurement(
            "cuda",
            1.7,
            "forward and backward 198 µs against Triton's 255, and Triton's with the products before and "
            "after 428 against 638",
            fits=_few_keys_of_narrow_heads,
            inheriting=(),
        ),
        Measurement(
            "triton",
            1.5,
            "forward and backward, with the products before and after, 428 µs against 638",
            fits=_few_keys,
        ),
    )
    signature = Signature(Arguments, Outputs, Saved, Gradients)

    def check(self, args: Arguments) -> Arguments:
        q, k, v, prompt_k, prompt_v, bias, prompt_lengths, scale = args
        check_shape("q", q, "(B, Tq, h, d)", None, None, None, None)
        batch, num_queries, heads, dim = q.shape
        check_shape("k", k, "(B, T, g, d)", batch, None, None, dim)
        num_tokens, num_kv_heads = k.shape[1:3]
        check_shape("v", v, "(B, T, g, d)", batch, num_tokens, num_kv_heads, dim)
        if heads % num_kv_heads:
            raise ValueError(f"k must have heads that divide q's {heads}, got {num_kv_heads}")
        check_shape("prompt_k", prompt_k, "(B or 1, P, g, d)", None, None, num_kv_heads, dim)
        check_shape("prompt_v", prompt_v, "(B or 1, P, g, d)", *prompt_k.shape)
        if prompt_k.shape[0] not in (1, batch):
            raise ValueError(f"prompt_k must have a batch of 1 or {batch}, got {prompt_k.shape[0]}")
        check_score_bias(bias, batch, heads, num_queries, num_tokens)
        check_lengths(prompt_lengths, batch)
        scale = check_number("scale", scale)
        tensors = {"q": q, "k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
        check_float(**tensors, bias=bias)
        check_same_device(**tensors, bias=bias, prompt_lengths=prompt_lengths)
        check_one_dtype(**tensors)
        q, k, v, prompt_k, prompt_v = map(cast, tensors.values())
        return Arguments(q, k, v, prompt_k, prompt_v, bias, prompt_lengths, scale)

    def check_values(self, args: Arguments) -> None:
        check_length_values(args.prompt_lengths, args.prompt_k.shape[1])

    def allocate(self, args: Arguments) -> Outputs:
        return _empty_outputs(args.q, *args.q.shape)

    def save(self, args: Arguments, out: Outputs) -> Saved:
        return Saved._make((*out, *args))

    def allocate_gradients(self, saved: Saved, needed: Collection[str]) -> Gradients:
        def empty(*names: str) -> list[Tensor | None]:
            wanted = any(name in needed for name in names)
            return [empty_like(getattr(saved, name)) if wanted else None for name in names]

        return Gradients(*empty("q"), *empty("k", "v"), *empty("prompt_k", "prompt_v"))


_ATTENTION = _PromptAttention()


# ---- the same op on joint tensors, whose implementations see views of them


class PackedArguments(NamedTuple):
    """As in ``prompt_attention_packed``, qkv and prompt_kv of one dtype."""

    qkv: Tensor
    prompt_kv: Tensor
    bias: Tensor | None
    prompt_lengths: Tensor | None
    num_heads: int
    num_kv_heads: int
    scale: float


class PackedSaved(NamedTuple):
    """What the backward reads."""

    out: Tensor
    lse: Tensor
    qkv: Tensor
    prompt_kv: Tensor
    bias: Tensor | None
    prompt_lengths: Tensor | None
    num_heads: int
    num_kv_heads: int
    scale: float


class PackedGradients(NamedTuple):
    """Each in one piece."""

    qkv: Tensor | None
    prompt_kv: Tensor | None


def _unpacked(args: PackedArguments) -> Arguments:
    qkv, prompt_kv, bias, prompt_lengths, num_heads, num_kv_heads, scale = args
    q, k, v, prompt_k, prompt_v = unpack(qkv, prompt_kv, num_heads, num_kv_heads)
    return Arguments(q, k, v, prompt_k, prompt_v, bias, prompt_lengths, scale)


def _of_packed(fits: Callable[[Arguments], bool]) -> Callable[[PackedArguments], bool]:
    return lambda args: fits(_unpacked(args))


class _PackedAttention(Op):
    name = "prompt_attention_packed"
    folder = "prompt_attention"
    measured = tuple(replace(entry, fits=_of_packed(entry.fits)) for entry in _PromptAttention.measured)
    signature = Signature(PackedArguments, Outputs, PackedSaved, PackedGradients)

    def check(self, args: PackedArguments) -> PackedArguments:
        qkv, prompt_kv, bias, prompt_lengths, num_heads, num_kv_heads, scale = args
        num_heads = check_integer("num_heads", num_heads, least=1)
        num_kv_heads = check_integer("num_kv_heads", num_kv_heads, least=1)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
        check_shape("qkv", qkv, "(B, T, (h + 2g) * d)", None, None, None)
        batch, num_tokens, width = qkv.shape
        num_parts = num_heads + 2 * num_kv_heads
        if width % num_parts or not width:
            raise ValueError(f"qkv must be (B, T, {num_parts} * d), got {tuple(qkv.shape)}")
        prompt_width = 2 * num_kv_heads * (width // num_parts)
        check_shape("prompt_kv", prompt_kv, "(B or 1, P, 2g * d)", None, None, prompt_width)
        if prompt_kv.shape[0] not in (1, batch):
            raise ValueError(f"prompt_kv must have a batch of 1 or {batch}, got {prompt_kv.shape[0]}")
        check_score_bias(bias, batch, num_heads, num_tokens, num_tokens)
        check_lengths(prompt_lengths, batch)
        scale = check_number("scale", scale)
        check_float(qkv=qkv, prompt_kv=prompt_kv, bias=bias)
        check_same_device(qkv=qkv, prompt_kv=prompt_kv, bias=bias, prompt_lengths=prompt_lengths)
        check_one_dtype(qkv=qkv, prompt_kv=prompt_kv)
        options = num_heads, num_kv_heads, scale
        return PackedArguments(cast(qkv), cast(prompt_kv), bias, prompt_lengths, *options)

    def check_values(self, args: PackedArguments) -> None:
        check_length_values(args.prompt_lengths, args.prompt_kv.shape[1])

    def allocate(self, args: PackedArguments) -> Outputs:
        batch, num_tokens, width = args.qkv.shape
        dim = width // (args.num_heads + 2 * args.num_kv_heads)
        return _empty_outputs(args.qkv, batch, num_tokens, args.num_heads, dim)

    def save(self, args: PackedArguments, out: Outputs) -> PackedSaved:
        return PackedSaved._make((*out, *args))

    def allocate_gradients(self, saved: PackedSaved, needed: Collection[str]) -> PackedGradients:
        joint = {"qkv": saved.qkv, "prompt_kv": saved.prompt_kv}
        return PackedGradients(*(empty_like(t) if name in needed else None for name, t in joint.items()))

    def compute(self, args: PackedArguments) -> tuple[Tensor, ...]:
        return _ATTENTION.compute(_unpacked(args))

    def implementation_reasons(self, implementation: str, args: PackedArguments) -> list[str]:
        return _ATTENTION.implementation_reasons(implementation, _unpacked(args))

    def write(self, implementation: str, args: PackedArguments, out: Outputs) -> None:
        _ATTENTION.write(implementation, _unpacked(args), out)

    def write_gradients(
        self, implementation: str, saved: PackedSaved, grad_results: tuple, grads: PackedGradients
    ) -> None:
        args = PackedArguments._make(saved[2:])
        qkv = args.qkv if grads.qkv is None else grads.qkv
        prompt_kv = args.prompt_kv if grads.prompt_kv is None else grads.prompt_kv
        q, k, v, prompt_k, prompt_v = unpack(qkv, prompt_kv, args.num_heads, args.num_kv_heads)
        of_tokens = (None, None, None) if grads.qkv is None else (q, k, v)
        of_prompts = (None, None) if grads.prompt_kv is None else (prompt_k, prompt_v)
        separate = Saved._make((saved.out, saved.lse, *_unpacked(args)))
        _ATTENTION.write_gradients(implementation, separate, grad_results, Gradients(*of_tokens, *of_prompts))


_PACKED = _PackedAttention()
