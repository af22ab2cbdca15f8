"""Argument checks shared by several ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ._autocast import autocast_dtype

__all__ = ["HALF", "why_not_dtypes", "why_not_frozen", "why_not_one_dtype"]

HALF = (torch.float16, torch.bfloat16)
ALL = (*HALF, torch.float32, torch.float64)


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(names)} or {last}"


def why_not_dtypes(**tensors: Tensor | None) -> list[str]:
    """A reason for each of ``tensors`` whose dtype no kernel has."""
    return [
        f"{name} must be {_listed(ALL)}, got {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype not in ALL
    ]


def why_not_one_dtype(*tensors: Tensor | None, known: tuple[torch.dtype, ...] = ALL) -> list[str]:
    """A reason where ``tensors``, as autocast leaves them, are not all of one and the same of ``known``."""
    dtypes = {autocast_dtype(t.dtype, t.device) for t in tensors if t is not None}
    if len(dtypes) == 1 and dtypes <= set(known):
        return []
    given = ", ".join(sorted(map(str, dtypes)))
    return [f"all tensors must be of one dtype, {_listed(known)}, got {given}"]


def why_not_frozen(**tensors: Tensor | None) -> list[str]:
    """A reason for each of ``tensors``, which belong to a frozen backbone, that requires a gradient."""
    return [
        f"its kernels have no gradient of {name}, which must not require one"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    ]
