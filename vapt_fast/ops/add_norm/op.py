"""add_norm: add a branch to the tokens and normalise the sum."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autocast import autocast_dtype
from ..base import Op, Signature, empty_like
from ..checks import check_affine, check_float, check_number, check_residual, check_same_device, check_shape
from ..measurement import Measurement
from ..residual import empty_residual_gradients, empty_total, residual_gradients, total_dtype

__all__ = ["add_norm"]


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute total = x + layer_scale * branch and normed = LayerNorm(total) * weight + bias.

    That is what lies between two branches of a block.

    Args:
        x: tokens (B, T, C), any floating dtype.
        branch: (B, T, C), what a branch of a block adds to them; None: nothing.
        weight, bias: (C,), the affine of the LayerNorm over C; both or neither.
        layer_scale: (C,), the branch's LayerScale; None for 1.
        eps: of the LayerNorm.
        backend: "auto", "torch" or "triton"; None for the current one, see use_backend.

    Returns:
        total (B, T, C), in the dtype of x + branch (``x`` itself without branch), and normed (B, T, C), in
        total's dtype, or in that of autocast where it is on: matrix products read it, which would cast it
        anyway. Statistics are those of total as it is returned. They and normed are computed in float32
        (float64 for float64), and normed is rounded once.
        Differentiable in all tensors; the Triton kernels, whose backward is written by hand, only once, and
        not in weight, bias and layer_scale: where gradients are on, these must not require one there.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    args: tuple[Any, ...] = (x, branch, weight, bias, layer_scale, eps, None)
    total, normed = _OP(backend, Arguments(*args))
    return x if branch is None else total, normed


class Arguments(NamedTuple):
    """As in ``add_norm``; ``dtype`` is normed's, which the check finds out."""

    x: Tensor
    branch: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    layer_scale: Tensor | None
    eps: float
    dtype: torch.dtype


class Outputs(NamedTuple):
    """total, (0,) without branch, and normed (B, T, C); mean and rstd (B, T) of total, float32 at least."""

    total: Tensor
    normed: Tensor
    mean: Tensor
    rstd: Tensor


class Saved(NamedTuple):
    """What the backward reads; total is x itself without branch."""

    total: Tensor
    weight: Tensor | None
    layer_scale: Tensor | None
    mean: Tensor
    rstd: Tensor
    x_dtype: torch.dtype
    branch_dtype: torch.dtype | None


class Gradients(NamedTuple):
    """(B, T, C) each; that of branch is None where it is the same as that of x."""

    x: Tensor | None
    branch: Tensor | None


class _AddNorm(Op):
    name = "add_norm"
    num_results = 2
    measured = (Measurement("triton", 1.9, "0.49 ms of a training step against 0.92"),)
    signature = Signature(Arguments, Outputs, Saved, Gradients)

    def check(self, args: Arguments) -> Arguments:
        x, branch, weight, bias, layer_scale, eps, _ = args
        check_shape("x", x, "(B, T, C)", None, None, None)
        check_residual(x, branch, layer_scale)
        check_affine(x.shape[-1], weight=weight, bias=bias)
        eps = check_number("eps", eps, "a finite number of at least 0", least=0)
        check_float(x=x, branch=branch, weight=weight, bias=bias, layer_scale=layer_scale)
        check_same_device(x=x, branch=branch, weight=weight, bias=bias, layer_scale=layer_scale)
        dtype = autocast_dtype(total_dtype(x, branch), x.device)
        return Arguments(x, branch, weight, bias, layer_scale, eps, dtype)

    def allocate(self, args: Arguments) -> Outputs:
        x = args.x
        statistic = torch.promote_types(total_dtype(x, args.branch), torch.float32)
        mean = x.new_empty(*x.shape[:2], dtype=statistic)
        return Outputs(empty_total(x, args.branch), empty_like(x, args.dtype), mean, empty_like(mean))

    def save(self, args: Arguments, out: Outputs) -> Saved:
        x, branch = args.x, args.branch
        total, branch_dtype = (x, None) if branch is None else (out.total, branch.dtype)
        return Saved(total, args.weight, args.layer_scale, out.mean, out.rstd, x.dtype, branch_dtype)

    def allocate_gradients(self, saved: Saved, needed: Collection[str]) -> Gradients:
        return Gradients(
            *empty_residual_gradients(
                saved.total, saved.layer_scale, saved.x_dtype, saved.branch_dtype, needed
            )
        )

    def gradients_of_arguments(
        self, saved: Saved, grads: Gradients, needed: Collection[str]
    ) -> dict[str, Tensor | None]:
        return residual_gradients(*grads)


_OP = _AddNorm()
