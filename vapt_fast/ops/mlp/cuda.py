"""mlp on CUDA: the launches of csrc/mlp, by vapt_fast._C.

The products with GELU beside them are kernels of CUTLASS, the two others PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import HALF, unsupported_dtypes
from ..cuda_launch import address, aligned, launch, rows
from ..device import hopper_unsupported_reasons
from .op import Arguments, Gradients, Outputs, Saved

__all__ = ["backward", "forward", "unsupported_reasons"]


def unsupported_reasons(args: Arguments) -> list[str]:
    """Every reason why the kernels can't take ``args``."""
    reasons = hopper_unsupported_reasons("mlp_forward", args.x.device)
    reasons += unsupported_dtypes(HALF, x=args.x)  # all tensors are of one dtype
    (out, hidden), channels = args.fc2_weight.shape, args.x.shape[-1]
    for name, size in {"x": channels, "fc1's output": hidden, "fc2's output": out}.items():
        if size % 8 or not size:
            reasons.append(f"{name} must have 8, 16, 24, ... channels, got {size}")
    return reasons


def forward(args: Arguments, out: Outputs) -> None:
    """Write y and, where they are kept, the hidden features."""
    x, weight = _matrix(args.x), _matrix(args.fc1_weight)
    bias = None if args.fc1_bias is None else aligned(args.fc1_bias)
    activated = x.new_empty((x.shape[0], weight.shape[0]))
    launch(
        "mlp_forward",
        x,
        **_options(x, weight.shape[0]),
        x=rows(x),
        weight=rows(weight),
        bias=address(bias),
        activated=address(activated),
        hidden=address(out.hidden if args.keep else None),
    )
    y = out.y.flatten(0, 1)
    if args.fc2_bias is None:
        torch.mm(activated, args.fc2_weight.t(), out=y)
    else:
        torch.addmm(args.fc2_bias, activated, args.fc2_weight.t(), out=y)


def backward(saved: Saved, grad_results: tuple[Tensor], grads: Gradients) -> None:
    """Write the gradient of x."""
    grad_y, weight = _matrix(grad_results[0]), _matrix(saved.fc2_weight)
    grad_hidden = torch.empty_like(saved.hidden).flatten(0, 1)
    launch(
        "mlp_backward",
        grad_y,
        **_options(grad_y, weight.shape[1]),
        grad_y=rows(grad_y),
        weight=rows(weight),
        hidden=address(saved.hidden),
        grad_hidden=address(grad_hidden),
    )
    torch.mm(grad_hidden, saved.fc1_weight, out=grads.x.flatten(0, 1))


def _matrix(tensor: Tensor) -> Tensor:
    """(..., channels) as a matrix whose rows begin at multiples of 16 bytes and do not overlap."""
    matrix = aligned(tensor.flatten(0, -2))
    stride, size = matrix.stride(0), matrix.shape[1]
    if stride < size or stride % 8:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return matrix


def _options(matrix: Tensor, num_hidden: int) -> dict[str, Any]:
    """What both launches say of their product, of ``matrix`` and a weight."""
    return {
        "dtype": str(matrix.dtype).removeprefix("torch."),
        "num_rows": matrix.shape[0],
        "depth": matrix.shape[1],
        "num_hidden": num_hidden,
    }
