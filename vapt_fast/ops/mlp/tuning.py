"""The launch configurations of mlp's Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_launch import Config
from ..tuned import tuned

__all__ = ["config"]

# By bytes of an element. 16-bit products run on tensor cores, fed by loads that are several steps ahead.
_CONFIGS = {
    2: Config({"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_DEPTH": 64}, num_warps=8, num_stages=4),
    4: Config({"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_DEPTH": 16}, num_warps=8, num_stages=3),
    8: Config({"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 32, "BLOCK_DEPTH": 16}, num_warps=4, num_stages=2),
}


@lru_cache
def config(kernel: str, dtype: torch.dtype) -> Config:
    """For ``kernel``, "fwd" or "bwd", and tensors of ``dtype``."""
    return tuned(f"mlp_{kernel}", _CONFIGS[dtype.itemsize], bytes=dtype.itemsize)
