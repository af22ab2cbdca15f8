"""Reasons that several ops have not to take their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autocast import autocast_dtype

__all__ = ["why_not_dtypes", "why_not_frozen", "why_not_one_dtype"]


def why_not_dtypes(**tensors: Tensor | None) -> list[str]:
    """A reason for each of ``tensors`` whose dtype no kernel has."""
    return [
        f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor is not None
        and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ]


def why_not_one_dtype(*tensors: Tensor | None) -> list[str]:
    """A reason where ``tensors``, as autocast leaves them, are not all of one dtype that the kernels have."""
    dtypes = {autocast_dtype(t.dtype, t.device) for t in tensors if t is not None}
    if len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        return []
    given = ", ".join(sorted(map(str, dtypes)))
    return [f"all tensors must be of one dtype, float16, bfloat16, float32 or float64, got {given}"]


def why_not_frozen(**tensors: Tensor | None) -> list[str]:
    """A reason for each of ``tensors``, which belong to a frozen backbone, that requires a gradient."""
    return [
        f"its kernels have no gradient of {name}, which must not require one"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    ]
