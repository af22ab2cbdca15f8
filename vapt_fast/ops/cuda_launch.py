"""How every CUDA kernel is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .device import native

__all__ = ["address", "aligned", "launch", "rows"]


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` (..., channels) if the kernels can read its rows, else a copy.

    They load 16 bytes at a time, so the channels of a row must be contiguous and begin at a multiple of 16
    bytes.
    """
    *strides, last = tensor.stride()
    begins = 0
    for stride in strides:
        begins |= stride
    if last == 1 and tensor.data_ptr() % 16 == 0 and begins * tensor.element_size() % 16 == 0:
        return tensor
    # The strides of axes of length 1 do not matter.
    matter = [stride for stride, size in zip(strides, tensor.shape, strict=False) if size > 1]
    readable = tensor.data_ptr() % 16 == 0 and not any(s * tensor.element_size() % 16 for s in matter)
    if readable and (last == 1 or tensor.shape[-1] == 1):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def rows(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Address and strides of ``tensor`` (B, ..., channels) for vapt_fast._C; None where there is no row.

    Args:
        tensor: aligned if it is read; it must live until the kernels were launched.
    """
    if tensor is None or tensor.numel() == 0:
        return None
    return (tensor.data_ptr(), *tensor.stride()[:-1])


def address(tensor: Tensor | None) -> int:
    """That of a contiguous ``tensor`` for vapt_fast._C; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def launch(name: str, on: Tensor, **arguments: Any) -> None:
    """Run function ``name`` of vapt_fast._C on the device of ``on`` and its current stream."""
    with torch.cuda.device_of(on):
        stream = torch.cuda.current_stream(on.device).cuda_stream
        getattr(native(), name)(**arguments, stream=stream)
