"""The launch configurations of add_norm's Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_launch import Config
from ..tuned import tuned

__all__ = ["config"]


@lru_cache
def config(kernel: str, dtype: torch.dtype, dim: int) -> Config:
    """For ``kernel``, "fwd" or "bwd", and rows of ``dim`` channels, which a program keeps in its registers.

    They are computed in ``dtype``.
    """
    if dim <= 1536:
        default = Config({"BLOCK_T": 4 if dtype.itemsize <= 4 else 2, "BLOCK_C": 256})
    else:  # one row, in at most four blocks
        block = max(1024, 1 << (dim - 1).bit_length() >> 2)
        default = Config({"BLOCK_T": 1, "BLOCK_C": block}, num_warps=min(16, block // 256))
    return tuned(f"add_norm_{kernel}", default, bytes=dtype.itemsize, channels=dim)
