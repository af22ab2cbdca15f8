"""The product with the frozen weight of a Linear.

PyTorch gives products in float32 on a CPU to its BLAS, as a rule Intel's MKL, which uses half of the vector
width on processors of other makers. oneDNN, which PyTorch has too, uses all of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .device import onednn_is_faster
from .plan import TENSORS, is_watched

__all__ = ["linear"]

SMALLEST = 2**21  # multiplications, below which oneDNN's call takes longer than MKL's product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x @ weight.T + bias as F.linear does, on a CPU by the faster of PyTorch's two libraries.

    Args:
        x: (..., K).
        weight: (N, K), of any strides.
        bias: (N,), of any stride, or None.

    Returns:
        (..., N). Differentiable in all, any number of times.
    """
    if x.device.type == "cpu" and _is_for_onednn(x, weight, bias):
        y: Tensor = _product(x, weight, bias)
        return y
    return F.linear(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if is_watched() or forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    if not onednn_is_faster() or x.numel() * weight.shape[0] < SMALLEST or x.ndim < 2:
        return False
    if bias is not None and not bias.is_contiguous():  # of which oneDNN would read other memory
        return False
    parameters = (weight,) if bias is None else (weight, bias)
    if not all(_is_ordinary(t) for t in (x, *parameters)):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in parameters):
        return False
    return torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags


def _is_ordinary(tensor: Tensor) -> bool:
    dense = tensor.is_cpu and tensor.layout == torch.strided
    return dense and tensor.dtype == torch.float32 and type(tensor) in TENSORS


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, of which only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product."""
        ctx.save_for_backward(weight)
        y: Tensor = _product(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x."""
        (weight,) = ctx.saved_tensors
        return linear(grads[0], weight.t()), None, None
