"""The launch configurations of absorbed_attention's Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_launch import Config, block_size
from ..tuned import tuned

__all__ = ["config"]


@lru_cache
def config(kernel: str, dtype: torch.dtype, num_queries: int) -> Config:
    """For tokens of ``dtype`` and ``num_queries`` queries, those of all heads.

    ``kernel`` is "scores", "sums" or "bwd_rows".
    """
    size = {2: 64, 4: 32, 8: 32}[dtype.itemsize]
    default = Config({"BLOCK_M": block_size(num_queries, 64), "BLOCK_K": size, "BLOCK_C": size})
    return tuned(f"absorbed_attention_{kernel}", default, bytes=dtype.itemsize, queries=num_queries)
