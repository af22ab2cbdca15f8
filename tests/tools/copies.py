"""Copies from the CPU to another device, which may wait until that has done everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Copies"]


class Copies(TorchDispatchMode):
    """Counts them, and those that wait, as long as it is entered.

    Args:
        to: the type of the other device.
    """

    def __init__(self, to: str) -> None:
        super().__init__()
        self._to, self.all, self.waiting = to, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].is_cpu:
            device = kwargs.get("device")
            if device is not None and device.type == self._to:
                self.all += 1
                self.waiting += not kwargs.get("non_blocking", False)
        return function(*args, **kwargs)
