"""How every kernel is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import native

__all__ = ["address", "aligned", "launch", "rows"]


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` (..., channels) if the kernels can read its rows, else a copy.

    They load 16 bytes at a time, so the channels of a row must be contiguous and begin at a multiple of 16
    bytes.
    """
    elements = 16 // tensor.element_size()
    *strides, last = zip(tensor.stride(), tensor.shape, strict=True)
    strides = [stride for stride, size in strides if size > 1]
    if last[0] == 1 and tensor.data_ptr() % 16 == 0 and not any(s % elements for s in strides):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def rows(tensor: Tensor | None, batch: int | None = None) -> tuple[int, ...] | None:
    """Address and strides of ``tensor`` (B, ..., channels) for vapt_fast._C; None where there is no row.

    Args:
        tensor: aligned if it is read; it must live until the kernels were launched.
        batch: B of the op, if the tensor may have a batch of 1 that stands for all.
    """
    if tensor is None or tensor.numel() == 0:
        return None
    if batch is not None:
        tensor = tensor.expand(batch, *tensor.shape[1:])
    return (tensor.data_ptr(), *tensor.stride()[:-1])


def address(tensor: Tensor | None) -> int:
    """That of a contiguous ``tensor`` for vapt_fast._C; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def launch(name: str, on: Tensor, **arguments: Any) -> None:
    """Run function ``name`` of vapt_fast._C on the device of ``on`` and its current stream."""
    with torch.cuda.device_of(on):
        stream = torch.cuda.current_stream(on.device).cuda_stream
        getattr(native(), name)(**arguments, stream=stream)
