"""How every kernel is launched."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from .configs import Launch

__all__ = ["launch", "num_blocks"]


def num_blocks(config: Launch, **sizes: int) -> int:
    """How many blocks cover ``sizes``, each given by the name of its block size, as BLOCK_C=channels."""
    return math.prod(triton.cdiv(size, config.blocks[name]) for name, size in sizes.items())


def launch(
    kernel: triton.runtime.KernelInterface, config: Launch, programs: int, *args: Any, **constants: Any
) -> None:
    """Run ``kernel`` on the device of ``args[0]``, a tensor; ``programs`` may be 0.

    The grid has one dimension, which may be as long as 2^31 - 1: the others end at 65,535.
    """
    if programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants, **config.options)
