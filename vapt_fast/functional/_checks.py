"""Checks that the ops share: each names the argument, what was given and what is expected."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_affine", "check_float", "check_residual", "check_same_device", "check_shape"]


def check_shape(name: str, tensor: Tensor, layout: str, *sizes: int | None) -> None:
    """Raise unless ``tensor`` has ``sizes`` (None: any size); ``layout`` names them, as "(B, T, C)"."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}")
    fits = tensor.ndim == len(sizes) and all(
        size is None or size == given for size, given in zip(sizes, tensor.shape, strict=True)
    )
    if not fits:
        expected = tuple("any" if size is None else size for size in sizes)
        raise ValueError(f"{name} must be {layout} = {expected}, got {tuple(tensor.shape)}")


def check_residual(x: Tensor, delta: Tensor | None, gain: Tensor | None) -> None:
    """Raise unless ``gain * delta`` can be added to the tokens ``x`` (B, T, C); both may be None."""
    if delta is not None:
        check_shape("delta", delta, "(B, T, C)", *x.shape)
    if gain is not None:
        if delta is None:
            raise ValueError("gain must be None where delta is, got a tensor")
        check_shape("gain", gain, "(C,)", x.shape[-1])


def check_affine(dim: int, **affine: Tensor | None) -> None:
    """Raise unless ``affine``, the weight and the bias of a LayerNorm over ``dim``, are both (C,) or None."""
    given = [name for name, tensor in affine.items() if tensor is not None]
    if len(given) == 1:
        raise ValueError(f"{' and '.join(affine)} must be given both or not at all, got {given[0]} alone")
    for name in given:
        check_shape(name, affine[name], "(C,)", dim)


def check_float(**tensors: Tensor | None) -> None:
    """Raise unless every tensor is of a floating dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"all tensors must be on one device, got {devices}")
