"""Reasons that several ops have not to take their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["why_not_dtypes", "why_not_frozen"]


def why_not_dtypes(**tensors: Tensor | None) -> list[str]:
    """A reason for each of ``tensors`` whose dtype no kernel has."""
    return [
        f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor is not None
        and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ]


def why_not_frozen(**tensors: Tensor | None) -> list[str]:
    """A reason for each of ``tensors``, which belong to a frozen backbone, that requires a gradient."""
    return [
        f"its kernels have no gradient of {name}, which must not require one"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    ]
