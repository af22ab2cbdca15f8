"""The feature projector: a bottleneck MLP around which the prompts go unchanged."""

from __future__ import annotations

from torch import Tensor

from ..activations import ACTIVATIONS
from ._checks import check_float, check_same_device, check_shape
from ._implementation import run

__all__ = ["prompt_projector"]


def prompt_projector(
    t: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
    activation: str = "relu",
    backend: str | None = None,
) -> Tensor:
    """prompts = t + scale * up (mask * activation(down t)) (VAPT, arXiv 2501.18936, section 4.2).

    Args:
        t: (B, P, C), pooled prompts, float32 or float64.
        down: (r, C).
        up: (C, r).
        scale: a number or a tensor of (1,).
        mask: (B, P, r), dropout factors 0 or 1 / (1 - rate); None drops nothing.
        activation: "relu", "gelu" (exact), "sigmoid", "softmax" (over the r features) or "identity".
        backend: "auto", "torch" or "triton"; None for the current one, see vapt_fast.use_backend.

    Returns:
        prompts (B, P, C) in ``t``'s dtype, in which everything is computed, also under autocast.
        Differentiable in t, down, up and a tensor ``scale``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailable: the backend can't run here, or not with these arguments.
    """
    check_shape("t", t, "(B, P, C)", None, None, None)
    batch, num_prompts, dim = t.shape
    check_shape("down", down, "(r, C)", None, dim)
    width = down.shape[0]
    check_shape("up", up, "(C, r)", dim, width)
    if isinstance(scale, Tensor):
        check_shape("scale", scale, "(1,)", 1)
    if mask is not None:
        check_shape("mask", mask, "(B, P, r)", batch, num_prompts, width)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    check_float(t=t, down=down, up=up, mask=mask)
    check_same_device(t=t, down=down, up=up, mask=mask)
    return run("prompt_projector", backend, t, down, up, scale, mask, activation)
