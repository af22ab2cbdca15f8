"""The launch configuration of absorbed_attention's Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_launch import Config, block_size

__all__ = ["config"]


@lru_cache
def config(dtype: torch.dtype, num_queries: int) -> Config:
    """For tokens of ``dtype`` and ``num_queries`` queries, those of all heads."""
    size = {2: 64, 4: 32, 8: 32}[dtype.itemsize]
    return Config({"BLOCK_M": block_size(num_queries, 64), "BLOCK_K": size, "BLOCK_C": size})
