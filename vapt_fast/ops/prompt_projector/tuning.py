"""The launch configurations of prompt_projector's Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_launch import Config, block_size
from ..tuned import tuned

__all__ = ["LARGEST_PROJECTOR", "config"]

LARGEST_PROJECTOR = 64  # features

# Of bwd_weights, by bytes of an element and features at most: channels, warps and stages. That of the first
# line was the fastest on an H200 (C = 768, r = 8, P = 50), the others hardly spill.
_WEIGHTS = {
    (2, 16): (64, 4, 3),
    (2, 64): (32, 8, 1),
    (4, 16): (32, 4, 1),
    (4, 64): (32, 4, 1),
    (8, 16): (16, 4, 1),
    (8, 64): (16, 8, 1),
}


@lru_cache
def config(kernel: str, dtype: torch.dtype, dim: int, width: int) -> Config:
    """For prompts of ``dtype`` and ``width`` features, at most LARGEST_PROJECTOR, 0 without a projector.

    Args:
        kernel: "fwd", "bwd_rows" or "bwd_weights".
        dtype: of the prompts, float64 where they are computed in that.
        dim: channels, which a program of the first two keeps in its registers.
        width: r.
    """
    sizes = {"bytes": dtype.itemsize, "channels": dim, "features": max(1, width)}
    features = block_size(width, LARGEST_PROJECTOR)
    if kernel == "bwd_weights":
        channels, num_warps, num_stages = _WEIGHTS[dtype.itemsize, 16 if features == 16 else 64]
        default = Config({"BLOCK_ROWS": 16, "BLOCK_R": features, "BLOCK_C": channels}, num_warps, num_stages)
        return tuned(f"prompt_projector_{kernel}", default, **sizes)
    # A warp of its own for each row never waits for another.
    channels, num_warps = 256, 1 if dtype.itemsize < 8 and dim <= 768 else 4
    if dim > 1536:  # in at most four blocks
        channels = max(1024, 1 << (dim - 1).bit_length() >> 2)
        num_warps = min(16, channels // 256)
    default = Config({"BLOCK_ROWS": 1, "BLOCK_R": features, "BLOCK_C": channels}, num_warps)
    return tuned(f"prompt_projector_{kernel}", default, **sizes)
