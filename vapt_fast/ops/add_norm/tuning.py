"""The launch configuration of add_norm's Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_launch import Config

__all__ = ["config"]


@lru_cache
def config(dtype: torch.dtype, dim: int) -> Config:
    """For rows of ``dim`` channels, computed in ``dtype``, which a program keeps in its registers."""
    if dim <= 1536:
        return Config({"BLOCK_T": 4 if dtype.itemsize <= 4 else 2, "BLOCK_C": 256})
    # One row, in at most four blocks.
    block = max(1024, 1 << (dim - 1).bit_length() >> 2)
    return Config({"BLOCK_T": 1, "BLOCK_C": block}, num_warps=min(16, block // 256))
