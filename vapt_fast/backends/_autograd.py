"""What every hand-written backward needs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["differentiable_once", "refuse_forward_mode"]


def differentiable_once(op: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """``grads`` as a backward returns them, such that differentiating them again raises and names ``op``.

    A hand-written backward treats what it saved as constants; without this a second derivative would be
    silently wrong.
    """
    if not torch.is_grad_enabled():  # nobody asked for a graph of the backward
        return grads
    return tuple(None if grad is None else _Once.apply(op, grad) for grad in grads)


def refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Raise if any of ``tensors`` carries a tangent, which a custom op would drop without a word."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative: its backward is written by hand. "
            'Use vapt_fast.use_backend("reference") for forward-mode derivatives'
        )


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, grad):
        ctx.op = op
        return grad.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            f"{ctx.op} can't be differentiated twice: its backward is written by hand. "
            'Use vapt_fast.use_backend("reference") for second derivatives'
        )
