"""How every kernel is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import native

__all__ = ["aligned", "launch", "rows"]


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` (B, T, h, d) if the kernels can read its rows, else a copy.

    They load 16 bytes at a time, so the d channels of a row must be contiguous and begin at a multiple of 16
    bytes.
    """
    elements = 16 // tensor.element_size()
    strides = [stride for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1]
    if tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and not any(s % elements for s in strides):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def rows(tensor: Tensor, batch: int | None = None) -> tuple[int, int, int, int] | None:
    """Address and strides of ``tensor`` (B, T, h, d), for vapt_fast._C; None where there is no row.

    Args:
        tensor: aligned if it is read; it must live until the kernels were launched.
        batch: B of the op, if the tensor may have a batch of 1 that stands for all.
    """
    if tensor.numel() == 0:
        return None
    images = tensor.shape[0] if batch is None else batch
    return (tensor.data_ptr(), *tensor.expand(images, -1, -1, -1).stride()[:3])


def launch(name: str, on: Tensor, **arguments: Any) -> None:
    """Run function ``name`` of vapt_fast._C on the device of ``on`` and its current stream."""
    with torch.cuda.device_of(on):
        stream = torch.cuda.current_stream(on.device).cuda_stream
        getattr(native(), name)(**arguments, stream=stream)
