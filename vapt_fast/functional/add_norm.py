"""Add a branch to the tokens and normalise the sum."""

from __future__ import annotations

from torch import Tensor

from ._checks import check_affine, check_float, check_number, check_residual, check_same_device, check_shape
from ._implementation import run

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
    """total = x + layer_scale * branch, normed = LayerNorm(total) * weight + bias: what lies between two branches.

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
    check_shape("x", x, "(B, T, C)", None, None, None)
    check_residual(x, branch, layer_scale)
    check_affine(x.shape[-1], weight=weight, bias=bias)
    eps = check_number("eps", eps, "a finite number of at least 0", least=0)
    check_float(x=x, branch=branch, weight=weight, bias=bias, layer_scale=layer_scale)
    check_same_device(x=x, branch=branch, weight=weight, bias=bias, layer_scale=layer_scale)
    return run("add_norm", backend, x, branch, weight, bias, layer_scale, eps)
