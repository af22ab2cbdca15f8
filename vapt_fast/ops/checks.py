"""Checks of the ops' arguments: each names the argument, what was given and what is expected."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .plan import TENSORS, is_watched

__all__ = [
    "check_affine",
    "check_by_image",
    "check_dtype",
    "check_float",
    "check_grid",
    "check_integer",
    "check_length_values",
    "check_lengths",
    "check_number",
    "check_one_dtype",
    "check_residual",
    "check_same_device",
    "check_score_bias",
    "check_shape",
    "unsupported_dtypes",
    "unsupported_mixture",
]


# ---- tensors


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


def check_by_image(
    name: str, tensor: Tensor, layout: str, batch: int, *sizes: int | None, like: Tensor | None = None
) -> None:
    """Raise unless ``tensor`` has ``sizes``, as in ``check_shape``, or (batch, *sizes): them for each image.

    Args:
        name: of the tensor.
        tensor: what was given.
        layout: names the ``sizes`` alone, as "(R, N)".
        batch: number of images.
        sizes: without the batch; None: any size.
        like: a tensor of as many dimensions, which says the form; None: either form.
    """
    form = tensor if like is None else like
    if isinstance(form, Tensor) and form.ndim == len(sizes) + 1:
        check_shape(name, tensor, f"(B, {layout[1:]}".replace(",)", ")"), batch, *sizes)
    else:
        check_shape(name, tensor, layout, *sizes)


def check_residual(x: Tensor, branch: Tensor | None, layer_scale: Tensor | None) -> None:
    """Raise unless ``layer_scale * branch`` can be added to the tokens ``x`` (B, T, C); both may be None."""
    if branch is not None:
        check_shape("branch", branch, "(B, T, C)", *x.shape)
    if layer_scale is not None:
        if branch is None:
            raise ValueError("layer_scale must be None where branch is, got a tensor")
        check_shape("layer_scale", layer_scale, "(C,)", x.shape[-1])


def check_affine(dim: int, **affine: Tensor | None) -> None:
    """Raise unless ``affine``, the weight and the bias of a LayerNorm over ``dim``, are both (C,) or None."""
    given = [name for name, tensor in affine.items() if tensor is not None]
    if len(given) == 1:
        raise ValueError(f"{' and '.join(affine)} must be given both or not at all, got {given[0]} alone")
    for name, tensor in affine.items():
        if tensor is not None:
            check_shape(name, tensor, "(C,)", dim)


def check_score_bias(bias: Tensor | None, batch: int, heads: int, num_queries: int, num_tokens: int) -> None:
    """Raise unless ``bias`` is None or can be broadcast, in its first dimensions, to the shape of scores."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"bias must be a tensor (..., {num_queries}, {num_tokens}), got {type(bias).__name__}"
        )
    if bias.shape[-2:] != (num_queries, num_tokens):
        raise ValueError(f"bias must be (..., {num_queries}, {num_tokens}), got {tuple(bias.shape)}")
    leading = (batch, heads)[4 - bias.ndim :] if bias.ndim <= 4 else None
    if leading is None or any(
        given not in (1, size) for given, size in zip(bias.shape[:-2], leading, strict=True)
    ):
        shape = (batch, heads, num_queries, num_tokens)
        raise ValueError(f"bias must be broadcastable to {shape}, got {tuple(bias.shape)}")


def check_lengths(lengths: Tensor | None, batch: int) -> None:
    """Raise unless ``prompt_lengths`` are None or one integer for each image, whatever their values are."""
    if lengths is not None:
        check_shape("prompt_lengths", lengths, "(B,)", batch)
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"prompt_lengths must be int32 or int64, got {lengths.dtype}")


def check_length_values(lengths: Tensor | None, num_prompts: int) -> None:
    """Raise unless all ``prompt_lengths`` are from 0 to ``num_prompts``.

    They are not read where that would wait for a device, nor where a call is recorded or transformed.
    """
    if lengths is None or is_watched() or lengths.device.type != "cpu" or type(lengths) not in TENSORS:
        return
    values = lengths.tolist()
    if values and not (min(values) >= 0 and max(values) <= num_prompts):
        raise ValueError(f"prompt_lengths must be 0 to {num_prompts}, got {values}")


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


def check_one_dtype(**tensors: Tensor | None) -> None:
    """Raise unless all tensors are of one dtype once autocast, where it is on, has cast them."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({autocast_dtype(tensor.dtype, tensor.device) for tensor in given.values()}) > 1:
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise TypeError(f"all tensors must be of one dtype, unless autocast casts them, got {dtypes}")


# ---- the rest


def check_number(name: str, value: Any, expected: str = "a finite number", least: float = -math.inf) -> float:
    """``value`` as Python's or a symbolic number; raises unless it is a finite one of at least ``least``.

    NumPy's numbers are as good as Python's, booleans are none.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {value}")
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be {expected}, got {_shown(value)}")
        value = float(value)
    if not (least <= value and -math.inf < value < math.inf):
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value


def check_integer(name: str, value: Any, least: int) -> int:
    """``value`` as Python's or a symbolic integer; raises unless it is one of at least ``least``."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError(f"{name} must be an int, got {value}")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an int, got {_shown(value)}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_grid(grid: Any) -> tuple[int, int]:
    """``grid`` as two integers; raises unless it is (H, W), at least 1 each."""
    if not isinstance(grid, (tuple, list)):
        raise TypeError(f"grid must be a tuple (H, W), got {_shown(grid)}")
    if len(grid) != 2:
        raise ValueError(f"grid must be (H, W), got {_shown(grid)}")
    height, width = (check_integer(f"grid[{i}]", side, least=1) for i, side in enumerate(grid))
    return height, width


def check_dtype(name: str, dtype: Any) -> None:
    """Raise unless ``dtype`` is a floating torch.dtype."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, as torch.float32, got {_shown(dtype)}")
    if not dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating dtype, got {dtype}")


def _shown(value: Any) -> str:
    """``value``, or its type where it may be large."""
    return repr(value) if isinstance(value, (str, int, float, tuple)) else type(value).__name__


# ---- what kernels can't take: reasons, not errors

HALF = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (*HALF, torch.float32, torch.float64)


def unsupported_dtypes(
    known: tuple[torch.dtype, ...] = KERNEL_DTYPES, /, **tensors: Tensor | None
) -> list[str]:
    """A reason for each of ``tensors`` whose dtype is not ``known``."""
    return [
        f"{name} must be {_listed(known)}, got {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype not in known
    ]


def unsupported_mixture(*tensors: Tensor | None, known: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> list[str]:
    """A reason where ``tensors`` are not all of one and the same of the ``known`` dtypes."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) == 1 and dtypes <= set(known):
        return []
    given = ", ".join(sorted(map(str, dtypes)))
    return [f"all tensors must be of one dtype, {_listed(known)}, got {given}"]


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(names)} or {last}" if names else last
