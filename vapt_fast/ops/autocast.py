"""What autocast makes of the tensors that matrix products read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "cast", "without_autocast"]

Given = TypeVar("Given", Tensor, "Tensor | None")


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrix products and attention of PyTorch read a tensor of ``dtype`` on ``device``.

    ``dtype`` itself without autocast; float64 always stays.
    """
    if dtype == torch.float64 or not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)


def cast(tensor: Given) -> Given:
    """``tensor``, if there is one, as autocast, where it is on, casts what matrix products read."""
    return None if tensor is None else tensor.to(autocast_dtype(tensor.dtype, tensor.device))


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off; costs nothing where it is off already."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
