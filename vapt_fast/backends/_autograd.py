"""What every hand-written backward needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["differentiable_once", "no_zeros", "or_zeros", "refuse_forward_mode"]


def differentiable_once(op: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """``grads`` as a backward returns them, such that differentiating them again raises and names ``op``.

    A hand-written backward treats what it saved as constants; without this a second derivative would be
    silently wrong.
    """
    if not torch.is_grad_enabled():  # nobody asked for a graph of the backward
        return grads
    return tuple(None if grad is None else _Once.apply(op, grad) for grad in grads)


def no_zeros(ctx: Any, *not_differentiable: Tensor) -> None:
    """Mark those outputs, and have no zeros made for them: autograd would write as many in each backward.

    Then the gradient of an output that nobody used is None as well.
    """
    ctx.mark_non_differentiable(*not_differentiable)
    ctx.set_materialize_grads(False)


def or_zeros(grad: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad``, or zeros in the shape of ``like`` where there is none."""
    return torch.zeros(like.shape, dtype=dtype, device=like.device) if grad is None else grad


def refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Raise if any of ``tensors`` carries a tangent, which a custom op would drop without a word."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative: its backward is written by hand. "
            'Use vapt_fast.use_backend("reference") for forward-mode derivatives'
        )


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op, grad):
        return grad.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, _ = inputs

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            f"{ctx.op} can't be differentiated twice: its backward is written by hand. "
            'Use vapt_fast.use_backend("reference") for second derivatives'
        )
