"""prompt_projector: from pooled prompts to what a block reads.

That is the bias of the projection over positions, the feature projector and the block's LayerNorm.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...arguments import choice
from ..base import Op, Signature, empty_like
from ..checks import (
    check_affine,
    check_by_image,
    check_dtype,
    check_float,
    check_number,
    check_same_device,
    check_shape,
)
from ..measurement import Measurement, has_half_tokens

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
    """Compute prompts = t + scale * up (feature_mask * activation(down t)), t = channel_mask * pooled + bias.

    The feature projector of VAPT (arXiv 2501.18936, section 4.2), a bottleneck around which the prompts go
    unchanged, and what comes before and after it: the end of the projection over positions, and the norm of
    the block that reads the prompts.

    Args:
        pooled: (B, P, C), float32 or float64; see prompt_pool.
        bias: (P,), of the projection over positions; or (B, P), one for each image.
        down, up: (r, C) and (C, r), the projector, both or none; without it prompts = t. Or (B, r, C) and
            (B, C, r), one for each image.
        scale: a number, a tensor of (1,) or one of (B,), one for each image.
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
        gradients are on, these must not require one there. Gradients have the shapes of the arguments: of
        what is given for each image they are not summed over the images.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    learned_scale, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    tensors = (pooled, bias, down, up, learned_scale, channel_mask, feature_mask, norm_weight, norm_bias)
    options: tuple[Any, ...] = (factor, activation, eps, dtype)
    (prompts,) = _OP(backend, Arguments(*tensors, *options))
    return prompts


class Arguments(NamedTuple):
    """As in ``prompt_projector``; checked, what is not of the norm is in ``pooled``'s dtype.

    ``scale`` is a tensor or None, ``factor`` the number otherwise.
    """

    pooled: Tensor
    bias: Tensor
    down: Tensor | None
    up: Tensor | None
    scale: Tensor | None
    channel_mask: Tensor | None
    feature_mask: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    factor: float
    activation: str
    eps: float | None
    dtype: torch.dtype


def _check_tensors(args: Arguments) -> None:
    batch, num_prompts, dim = args.pooled.shape
    down, up = args.down, args.up
    check_by_image("bias", args.bias, "(P,)", batch, num_prompts)
    if (down is None) != (up is None):
        raise ValueError(f"down and up must be given together, got {'up' if down is None else 'down'} alone")
    if down is not None and up is not None:
        check_by_image("down", down, "(r, C)", batch, None, dim)
        check_by_image("up", up, "(C, r)", batch, dim, down.shape[-2], like=down)
    if args.scale is not None:
        check_shape("scale", args.scale, "(1,) or (B,)", None)
        if args.scale.shape[0] not in (1, batch):
            raise ValueError(f"scale must be (1,) or (B,) = ({batch},), got {tuple(args.scale.shape)}")
    affine = {"norm_weight": args.norm_weight, "norm_bias": args.norm_bias}
    given = [name for name, tensor in affine.items() if tensor is not None]
    if args.eps is None and given:
        raise ValueError(f"{given[0]} must be None where eps is, got a tensor: without eps there is no norm")
    check_affine(dim, **affine)
    if args.channel_mask is not None:
        check_shape("channel_mask", args.channel_mask, "(B, 1, C)", batch, 1, dim)
    if args.feature_mask is not None:
        if down is None:
            raise ValueError("feature_mask must be None without down and up, whose features it drops")
        check_shape("feature_mask", args.feature_mask, "(B, P, r)", batch, num_prompts, down.shape[-2])
    tensors: dict[str, Any] = {name: getattr(args, name) for name in _TENSORS}
    check_float(**tensors)
    check_same_device(**tensors)


# All but the norm's are computed with in the dtype of the first one.
_OWN = ("pooled", "bias", "down", "up", "scale", "channel_mask", "feature_mask")
_TENSORS = (*_OWN, "norm_weight", "norm_bias")


class Outputs(NamedTuple):
    """prompts (B, P, C), hidden features (B, P, r) before the activation, mean and rstd as (2, B, P).

    r is 0 without a projector, the 2 is 0 without a norm.
    """

    prompts: Tensor
    hidden: Tensor
    statistics: Tensor


class Saved(NamedTuple):
    """What the backward reads."""

    pooled: Tensor
    bias: Tensor
    down: Tensor | None
    up: Tensor | None
    scale: Tensor | None
    channel_mask: Tensor | None
    feature_mask: Tensor | None
    norm_weight: Tensor | None
    hidden: Tensor
    statistics: Tensor
    factor: float
    activation: str


class Gradients(NamedTuple):
    """``weights`` (2, r, C): the gradient of down and, transposed, that of up.

    (B, 2, r, C) for a projector of each image. The others have the shapes of the arguments.
    """

    pooled: Tensor
    bias: Tensor
    weights: Tensor | None
    scale: Tensor | None


def _is_shared(args: Arguments) -> bool:
    """Whether all images have one projector; those of each image were not measured."""
    return has_half_tokens(args) and args.bias.ndim == 1 and (args.down is None or args.down.ndim == 2)


class _PromptProjector(Op):
    name = "prompt_projector"
    # It computes in float32 at least; what counts is whether the prompts are rounded to 16 bits.
    measured = (
        Measurement(
            "triton",
            2.6,
            "forward 35 µs against 92, with the backward and absorbed_attention 1.6 ms of a step against 2.5",
            fits=_is_shared,
        ),
    )
    signature = Signature(Arguments, Outputs, Saved, Gradients)
    differentiable = ("pooled", "bias", "down", "up", "scale")

    def check(self, args: Arguments) -> Arguments:
        check_shape("pooled", args.pooled, "(B, P, C)", None, None, None)
        factor, eps = args.factor, args.eps
        dtype: torch.dtype | None = args.dtype
        if args.scale is None:
            factor = check_number("scale", factor, "a finite number or a tensor (1,) or (B,)")
        if eps is not None:
            eps = check_number("eps", eps, "a finite number of at least 0 or None", least=0)
        if dtype is None:
            dtype = args.pooled.dtype
        check_dtype("dtype", dtype)
        _check_tensors(args)
        choice("activation", args.activation, tuple(ACTIVATIONS))
        tensors: list[Any] = [getattr(args, name) for name in _OWN]
        own: list[Any] = [None if tensor is None else tensor.to(args.pooled.dtype) for tensor in tensors]
        options: tuple[Any, ...] = (args.norm_weight, args.norm_bias, factor, args.activation, eps, dtype)
        return Arguments(*own, *options)

    def allocate(self, args: Arguments) -> Outputs:
        pooled = args.pooled
        batch, num_prompts, _ = pooled.shape
        width = 0 if args.down is None else args.down.shape[-2]
        statistics = pooled.new_empty((0 if args.eps is None else 2, batch, num_prompts))
        return Outputs(
            empty_like(pooled, args.dtype), pooled.new_empty((batch, num_prompts, width)), statistics
        )

    def save(self, args: Arguments, out: Outputs) -> Saved:
        return Saved(*args[:8], out.hidden, out.statistics, args.factor, args.activation)

    def allocate_gradients(self, saved: Saved, needed: Collection[str]) -> Gradients:
        pooled, width = saved.pooled, saved.hidden.shape[-1]
        weights = scale = None
        if saved.down is not None and ("down" in needed or "up" in needed):
            weights = pooled.new_empty((*saved.down.shape[:-2], 2, width, pooled.shape[-1]))
        # Without a projector there is nothing to scale.
        if saved.down is not None and saved.scale is not None and "scale" in needed:
            scale = empty_like(saved.scale)
        return Gradients(empty_like(pooled), empty_like(saved.bias), weights, scale)

    def gradients_of_arguments(
        self, saved: Saved, grads: Gradients, needed: Collection[str]
    ) -> dict[str, Tensor | None]:
        down, up = (None, None) if grads.weights is None else grads.weights.unbind(dim=-3)
        up = None if up is None else up.mT
        return {"pooled": grads.pooled, "bias": grads.bias, "down": down, "up": up, "scale": grads.scale}


_OP = _PromptProjector()
