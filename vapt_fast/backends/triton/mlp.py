"""mlp on Triton: the launches, as ops that autograd, torch.compile and torch.export know.

The products with GELU beside them are kernels of ours, the two others PyTorch's. Kept for the backward: the
hidden features before GELU, and nothing else of their width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import mlp as kernels
from .._autocast import autocast_dtype
from .._autograd import differentiable_once, no_zeros, refuse_forward_mode
from .._why_not import why_not_frozen, why_not_one_dtype
from . import configs
from ._launch import STRIDE_LIMIT, launch, num_blocks

__all__ = ["mlp", "why_not_mlp"]


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> Tensor:
    """See vapt_fast.functional.mlp."""
    tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    refuse_forward_mode("mlp", *(t for t in tensors if t is not None))
    tensors = (t if t is None else t.to(autocast_dtype(t.dtype, t.device)) for t in tensors)
    return _forward(*tensors, torch.is_grad_enabled() and x.requires_grad)[0]


def why_not_mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> list[str]:
    """Every reason why the kernels can't take these arguments."""
    return why_not_one_dtype(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias) + why_not_frozen(
        fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias
    )


# ---- what the kernels take


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """(B, T, C) as (B * T, C) with its stride of rows, their elements contiguous."""
    rows = tensor.flatten(0, 1)
    if rows.stride(1) != 1 or rows.stride(0) >= STRIDE_LIMIT:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _strided(tensor: Tensor) -> tuple[Tensor | int, ...]:
    """A weight or bias with its strides."""
    if max(tensor.stride()) >= STRIDE_LIMIT:
        tensor = tensor.contiguous()
    return (tensor, *tensor.stride())


# ---- forward


@torch.library.custom_op("vapt_fast::mlp", mutates_args=())
def _forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, T, E), and the hidden features before GELU, (B, T, D) or, unless ``keep``, (0, T, D)."""
    (num_hidden, depth), num_rows = fc1_weight.shape, x.shape[0] * x.shape[1]
    config = configs.mlp(x.dtype)
    activated, hidden = _empty(x, num_hidden), _empty(x if keep else x[:0], num_hidden)
    launch(
        kernels.activate,
        config,
        num_blocks(config, BLOCK_ROWS=num_rows, BLOCK_COLUMNS=num_hidden),
        *(activated, hidden if keep else None),
        *(_rows(x), _strided(fc1_weight), None if fc1_bias is None else _strided(fc1_bias)),
        *(num_rows, num_hidden, depth),
    )
    return F.linear(activated, fc2_weight, fc2_bias), hidden


def _empty(x: Tensor, width: int) -> Tensor:
    return torch.empty((*x.shape[:2], width), dtype=x.dtype, device=x.device)


@_forward.register_fake
def _(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return _empty(x, fc2_weight.shape[0]), _empty(x if keep else x[:0], fc1_weight.shape[0])


# ---- backward


@torch.library.custom_op("vapt_fast::mlp_backward", mutates_args=())
def _grad_x(grad_y: Tensor, hidden: Tensor, fc1_weight: Tensor, fc2_weight: Tensor) -> Tensor:
    """The gradient of x, (B, T, C)."""
    (depth, num_hidden), num_rows = fc2_weight.shape, hidden.shape[0] * hidden.shape[1]
    config = configs.mlp(hidden.dtype)
    grad_h = _empty(hidden, num_hidden)
    launch(
        kernels.grad_hidden,
        config,
        num_blocks(config, BLOCK_ROWS=num_rows, BLOCK_COLUMNS=num_hidden),
        *(grad_h, hidden, _rows(grad_y), _strided(fc2_weight)),
        *(num_rows, num_hidden, depth),
    )
    with torch.autocast(grad_h.device.type, enabled=False):
        return grad_h @ fc1_weight


@_grad_x.register_fake
def _(grad_y: Tensor, hidden: Tensor, fc1_weight: Tensor, fc2_weight: Tensor) -> Tensor:
    return _empty(hidden, fc1_weight.shape[1])


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, fc1_weight, _, fc2_weight, _, _ = inputs
    _, hidden = output
    no_zeros(ctx, hidden)
    ctx.save_for_backward(hidden, fc1_weight, fc2_weight)


def _backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 6
    (grad_x,) = differentiable_once("mlp", _grad_x(grad_y, *ctx.saved_tensors))
    return grad_x, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
