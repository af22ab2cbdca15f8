"""How every kernel is launched."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ...kernels import common
from .configs import ADD_CHUNKS, Launch

__all__ = ["STRIDE_LIMIT", "add_chunks", "launch", "num_blocks", "strided"]

# Of strides that a kernel multiplies by row numbers within a block in 32 bits.
STRIDE_LIMIT = 2**24


def num_blocks(config: Launch, **sizes: int) -> int:
    """How many blocks cover ``sizes``, each given by the name of its block size, as BLOCK_C=channels."""
    return math.prod(triton.cdiv(size, config.blocks[name]) for name, size in sizes.items())


def strided(tensor: Tensor | None, ndim: int) -> tuple[Tensor | int | None, ...]:
    """``tensor`` and its ``ndim`` strides, as kernels take what users give; zeros where there is none."""
    return (None, *([0] * ndim)) if tensor is None else (tensor, *tensor.stride())


def launch(
    kernel: triton.runtime.KernelInterface, config: Launch, programs: int, *args: Any, **constants: Any
) -> None:
    """Run ``kernel`` on the device of ``args[0]``, a tensor; ``programs`` may be 0.

    The grid has one dimension, which may be as long as 2^31 - 1: the others end at 65,535.
    """
    if programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants, **config.options)


def add_chunks(partial: Tensor) -> Tensor:
    """The sum of ``partial`` (chunks, ...) over its chunks, in the same order every time."""
    total = torch.empty(partial.shape[1:], dtype=partial.dtype, device=partial.device)
    programs = num_blocks(ADD_CHUNKS, BLOCK=total.numel())
    launch(common.add_chunks, ADD_CHUNKS, programs, partial, total, partial.shape[0], total.numel())
    return total
