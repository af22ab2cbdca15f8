"""From pooled prompts to what a block reads: their bias, the feature projector, the block's LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ._checks import (
    check_affine,
    check_choice,
    check_dtype,
    check_float,
    check_number,
    check_same_device,
    check_shape,
)
from ._implementation import run

__all__ = ["prompt_projector"]


def prompt_projector(
    pooled: Tensor,
    bias: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    *,
    scale: Tensor | float = 1.0,
    channel_mask: Tensor | None = None,
    feature_mask: Tensor | None = None,
    activation: str = "relu",
    eps: float | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """prompts = t + scale * up (feature_mask * activation(down t)), t = channel_mask * pooled + bias.

    The feature projector of VAPT (arXiv 2501.18936, section 4.2), a bottleneck around which the prompts go
    unchanged, and what comes before and after it: the end of the projection over positions, and the norm of
    the block that reads the prompts.

    Args:
        pooled: (B, P, C), float32 or float64; see prompt_pool.
        bias: (P,), of the projection over positions.
        down, up: (r, C) and (C, r), the projector, both or none; without it prompts = t.
        scale: a number or a tensor of (1,).
        channel_mask: (B, 1, C), dropout factors 0 or 1 / (1 - rate) of whole channels; None drops nothing.
        feature_mask: (B, P, r), those of the projector's features.
        activation: "relu", "gelu" (exact), "sigmoid", "softmax" (over the r features) or "identity".
        eps: of a LayerNorm over C, which the prompts pass at last; None for no norm.
        norm_weight, norm_bias: (C,), the affine of that norm, any floating dtype; both or none.
        dtype: of the result; None for that of ``pooled``.
        backend: "auto", "torch" or "triton"; None for the current one, see use_backend.

    Returns:
        prompts (B, P, C). Everything is computed in ``pooled``'s dtype, also under autocast, and rounded to
        ``dtype`` once. Where ``dtype`` has 16 bits, the Triton kernels may round the factors of products to
        tf32, whose mantissa is that of float16. Differentiable in all tensors; the Triton kernels, whose
        backward is written by hand, only once, and not in the masks, norm_weight and norm_bias: where
        gradients are on, these must not require one there.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    check_shape("pooled", pooled, "(B, P, C)", None, None, None)
    batch, num_prompts, dim = pooled.shape
    check_shape("bias", bias, "(P,)", num_prompts)
    if (down is None) != (up is None):
        raise ValueError(f"down and up must be given together, got {'up' if down is None else 'down'} alone")
    if down is not None:
        check_shape("down", down, "(r, C)", None, dim)
        check_shape("up", up, "(C, r)", dim, down.shape[0])
    if isinstance(scale, Tensor):
        check_shape("scale", scale, "(1,)", 1)
    else:
        scale = check_number("scale", scale, "a finite number or a tensor (1,)")
    if eps is None and (norm_weight is not None or norm_bias is not None):
        given = "norm_bias" if norm_weight is None else "norm_weight"
        raise ValueError(f"{given} must be None where eps is, got a tensor: without eps there is no norm")
    if eps is not None:
        eps = check_number("eps", eps, "a finite number of at least 0 or None", least=0)
    check_affine(dim, norm_weight=norm_weight, norm_bias=norm_bias)
    if channel_mask is not None:
        check_shape("channel_mask", channel_mask, "(B, 1, C)", batch, 1, dim)
    if feature_mask is not None:
        if down is None:
            raise ValueError("feature_mask must be None without down and up, whose features it drops")
        check_shape("feature_mask", feature_mask, "(B, P, r)", batch, num_prompts, down.shape[0])
    check_choice("activation", activation, tuple(ACTIVATIONS))
    if dtype is not None:
        check_dtype("dtype", dtype)
    tensors = {
        "pooled": pooled,
        "bias": bias,
        "down": down,
        "up": up,
        "scale": scale if isinstance(scale, Tensor) else None,
        "channel_mask": channel_mask,
        "feature_mask": feature_mask,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    check_float(**tensors)
    check_same_device(**tensors)
    if dtype is None:
        dtype = pooled.dtype
    masks, affine = (channel_mask, feature_mask), (norm_weight, norm_bias)
    return run(
        "prompt_projector", backend, pooled, bias, down, up, scale, *masks, activation, eps, *affine, dtype
    )
