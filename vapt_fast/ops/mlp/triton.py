"""mlp on Triton: the launches of vapt_fast.kernels.mlp.

The products with GELU beside them are kernels of ours, the two others PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import mlp as kernels
from ..checks import unsupported_mixture
from ..triton_launch import STRIDE_LIMIT, launch, num_blocks
from . import tuning
from .op import Arguments, Gradients, Outputs, Saved

__all__ = ["backward", "forward", "unsupported_reasons"]


def unsupported_reasons(args: Arguments) -> list[str]:
    """Every reason why the kernels can't take ``args``."""
    return unsupported_mixture(*args[:5])


def forward(args: Arguments, out: Outputs) -> None:
    """Write y and, where they are kept, the hidden features."""
    (num_hidden, depth), num_rows = args.fc1_weight.shape, args.x.shape[0] * args.x.shape[1]
    config = tuning.config("fwd", args.x.dtype)
    activated = args.x.new_empty((num_rows, num_hidden))
    launch(
        kernels.mlp_fwd_kernel,
        config,
        num_blocks(config, BLOCK_ROWS=num_rows, BLOCK_COLUMNS=num_hidden),
        *(activated, out.hidden if args.keep else None),
        *(
            _rows(args.x),
            _strided(args.fc1_weight),
            None if args.fc1_bias is None else _strided(args.fc1_bias),
        ),
        *(num_rows, num_hidden, depth),
    )
    y = out.y.flatten(0, 1)
    if args.fc2_bias is None:
        torch.mm(activated, args.fc2_weight.t(), out=y)
    else:
        torch.addmm(args.fc2_bias, activated, args.fc2_weight.t(), out=y)


def backward(saved: Saved, grad_results: tuple[Tensor], grads: Gradients) -> None:
    """Write the gradient of x."""
    hidden = saved.hidden
    (depth, num_hidden), num_rows = saved.fc2_weight.shape, hidden.shape[0] * hidden.shape[1]
    config = tuning.config("bwd", hidden.dtype)
    grad_hidden = hidden.new_empty((num_rows, num_hidden))
    launch(
        kernels.mlp_bwd_kernel,
        config,
        num_blocks(config, BLOCK_ROWS=num_rows, BLOCK_COLUMNS=num_hidden),
        *(grad_hidden, hidden, _rows(grad_results[0]), _strided(saved.fc2_weight)),
        *(num_rows, num_hidden, depth),
    )
    torch.mm(grad_hidden, saved.fc1_weight, out=grads.x.flatten(0, 1))


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
