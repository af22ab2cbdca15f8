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
FEW_TOKENS = 32  # as many are there in compiled code, which does not ask


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
    if torch.compiler.is_dynamo_compiling():
        # What is exported may run elsewhere. How many tokens there are may differ from call to call.
        alone = not torch.compiler.is_exporting() and not _is_transformed()
        tokens = FEW_TOKENS
    else:
        alone, tokens = not is_watched(), x.numel() // max(weight.shape[-1], 1)
    if not alone or tokens * weight.numel() < SMALLEST or x.ndim < 2:
        return False
    if forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu") or not _has_fast_onednn():
        return False
    if bias is not None and not bias.is_contiguous():  # of which oneDNN would read other memory
        return False
    parameters = (weight,) if bias is None else (weight, bias)
    if not all(_is_ordinary(t) for t in (x, *parameters)):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in parameters))


# What torch.compile can't trace: it asks while it compiles.
@torch.compiler.assume_constant_result
def _is_transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


@torch.compiler.assume_constant_result
def _has_fast_onednn() -> bool:
    return onednn_is_faster() and torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags


def _is_ordinary(tensor: Tensor) -> bool:
    dense = tensor.is_cpu and tensor.layout == torch.strided
    return dense and tensor.dtype == torch.float32 and type(tensor) in TENSORS


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return _LIBRARY_OP(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight, bias)
    return _by_onednn(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
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


# ---- in compiled code, where PyTorch's own op takes only weights that are constants

NAME = "vapt_fast::onednn_linear"
torch.library.define(NAME, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl(NAME, "cpu", _by_onednn)
_LIBRARY_OP = torch.ops.vapt_fast.onednn_linear


@torch.library.register_fake(NAME)
def _allocate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _LIBRARY_OP(grad, ctx.saved_tensors[0].t(), None), None, None


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context)
