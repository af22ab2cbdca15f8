"""Products with frozen weights in FP8 (e4m3): a scale for each token, and one for each output channel.

A row is multiplied by the reciprocal of its scale, so that its largest value becomes the largest of e4m3, and
rounded to 3 bits of mantissa. Products of such numbers are exact in float32, in which they are added up,
unless the GPU's accumulators are shorter. A token's scale is its own: it does not depend on other tokens.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import cast, without_autocast
from ..backend import resolve
from ..base import is_recorded
from ..device import fp8_unsupported_reasons, unavailable_reasons

__all__ = ["MULTIPLE", "Quantised", "fp8_linear", "quantise"]

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros
MULTIPLE = 16  # of which both sizes of a weight must be multiples
FAST_ACCUMULATION = False  # whether tensor cores may add up with fewer bits, which some do faster


class Quantised(NamedTuple):
    """values (M, K) in e4m3 times scale (M, 1) in float32."""

    values: Tensor
    scale: Tensor


def quantise(rows: Tensor, *, gelu: bool = False) -> Quantised:
    """Return ``rows`` (M, K), or their GELU, in e4m3, contiguous, each with a scale of its own.

    No gradient goes through. Within the backends "auto" and "triton" a kernel computes it where it can.
    """
    rows = rows.detach()
    if rows.is_cuda and _is_for_kernel(rows):
        values, scale = (
            rows.new_empty(rows.shape, dtype=E4M3),
            rows.new_empty((len(rows), 1), dtype=torch.float32),
        )
        import_module(f"{__package__}.triton").quantise(rows, values, scale, gelu)
        return Quantised(values, scale)
    return quantise_by_torch(rows, gelu=gelu)


def _is_for_kernel(rows: Tensor) -> bool:
    if rows.dtype == torch.float64 or is_recorded(rows) or resolve() not in ("auto", "triton"):
        return False
    return not unavailable_reasons("triton")


def quantise_by_torch(rows: Tensor, *, gelu: bool = False) -> Quantised:
    """Return the same by PyTorch's operations."""
    rows = F.gelu(rows) if gelu else rows
    largest = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True).float()
    scale = (largest / LARGEST).clamp_min(SMALLEST_SCALE)
    return Quantised((rows * scale.reciprocal()).to(E4M3).contiguous(), scale)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantised: Quantised,
    *,
    gelu: bool = False,
    fp8_gradients: bool = False,
    whole: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Compute x @ weight.T + bias with both factors in e4m3.

    Args:
        x: (..., K), any floating dtype; quantised a row at a time.
        weight: (N, K), in x's dtype unless autocast casts them; K and N are multiples of 16.
        bias: (N,) or None.
        quantised: ``quantise(weight)``.
        gelu: take the exact GELU of x for x; it is rounded to e4m3 only.
        fp8_gradients: compute the gradient of x in e4m3 too, with a scale for each token and one for each of
            its channels.
        whole: (M, K), of which ``weight`` is the rows from ``first`` on; None: it is no part of another. With
            ``fp8_gradients`` the scales of its channels are taken, so that parts give what the whole would.
        first: see ``whole``.

    Returns:
        (..., N) in x's dtype, or in that of autocast, rounded to bfloat16 before. Differentiable in x, weight
        and bias, as the product of the unquantised x and weight is: with the weight itself, not as it was
        rounded, and in the dtype of the result unless ``fp8_gradients``.

    Raises:
        NotImplementedError: the device has no products in e4m3.
    """
    reasons = fp8_unsupported_reasons(x.device)
    if reasons:
        raise NotImplementedError(
            f"products in FP8 can't run here: {'; '.join(reasons)}; set model.backbone_precision = None"
        )
    x, weight, bias = cast(x), cast(weight), cast(bias)
    if not x.numel():
        return F.linear(F.gelu(x) if gelu else x, weight, bias)
    with without_autocast(x.device.type):
        part = None if whole is None or not fp8_gradients else (cast(whole.detach()), first)
        y: Tensor = _Fp8Linear.apply(x, weight, bias, *quantised, gelu, fp8_gradients, part)
        return y


class _Fp8Linear(torch.autograd.Function):
    """``fp8_linear`` without checks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        scale: Tensor,
        gelu: bool,
        fp8_gradients: bool,
        part: tuple[Tensor, int] | None,
    ) -> Tensor:
        """Return the product."""
        whole, ctx.first = (weight, 0) if part is None else part
        ctx.gelu, ctx.fp8_gradients = gelu, fp8_gradients
        ctx.save_for_backward(weight, whole, x if gelu or ctx.needs_input_grad[1] else None)
        y = _product(quantise(x.flatten(0, -2), gelu=gelu), Quantised(values, scale), bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        (grad,) = grads
        weight, whole, x = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        with without_autocast(grad.device.type):
            grad_x = None
            if of_x and ctx.fp8_gradients:
                values, scale = quantise(whole.t())
                values = values[:, ctx.first : ctx.first + len(weight)].contiguous()
                grad_x = fp8_linear(grad, weight.t(), None, Quantised(values, scale))
            elif of_x:
                grad_x = grad @ weight
            if of_x and ctx.gelu:
                grad_x = torch.ops.aten.gelu_backward(grad_x, x)
            grad_weight = None
            if of_weight:
                grad_weight = rows.t() @ (F.gelu(x) if ctx.gelu else x).flatten(0, -2)
        return grad_x, grad_weight, rows.sum(0) if of_bias else None, *[None] * 5


def _product(a: Quantised, b: Quantised, bias: Tensor | None) -> Tensor:
    """Return a @ b.T + bias in bfloat16, the one dtype that all GPUs and versions of PyTorch give."""
    bias = None if bias is None else bias.to(torch.bfloat16)
    if a.values.is_cuda:
        return _scaled_mm(a, b, bias)
    # Not torch._scaled_mm: that of PyTorch 2.8 has no scales by row on a CPU.
    y = (a.values.float() @ b.values.float().t()) * a.scale * b.scale.t()
    return (y if bias is None else y + bias).to(torch.bfloat16)


def _scaled_mm(a: Quantised, b: Quantised, bias: Tensor | None) -> Tensor:
    return torch._scaled_mm(
        a.values,
        b.values.t(),
        scale_a=a.scale,
        scale_b=b.scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
    )
