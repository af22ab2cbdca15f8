"""What autocast makes of the tensors that matrix products read."""

from __future__ import annotations

import torch

__all__ = ["autocast_dtype"]


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrix products and attention of PyTorch read a tensor of ``dtype`` on ``device``.

    ``dtype`` itself without autocast; float64 always stays.
    """
    if dtype == torch.float64 or not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)
