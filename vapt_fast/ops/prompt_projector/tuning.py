"""The launch configurations of prompt_projector's Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_launch import Config, block_size
from ..tuned import tuned

__all__ = ["LARGEST_PROJECTOR", "config"]

LARGEST_PROJECTOR = 64  # features

# By bytes of an element and features at most: channels, warps and stages of a program of each kernel. "fwd"
# and "bwd_weights" of the first line were the fastest on an H200 (C = 768, r = 8, P = 50), the others hardly
# spill.
_BLOCKS = {
    (2, 16): {"fwd": (256, 8, 1), "bwd_rows": (64, 4, 1), "bwd_weights": (64, 4, 3)},
    (2, 64): {"fwd": (32, 8, 1), "bwd_rows": (32, 8, 1), "bwd_weights": (32, 8, 1)},
    (4, 16): {"fwd": (64, 4, 1), "bwd_rows": (32, 4, 1), "bwd_weights": (32, 4, 1)},
    (4, 64): {"fwd": (32, 8, 1), "bwd_rows": (32, 8, 1), "bwd_weights": (32, 4, 1)},
    (8, 16): {"fwd": (32, 4, 1), "bwd_rows": (16, 4, 1), "bwd_weights": (16, 4, 1)},
    (8, 64): {"fwd": (16, 8, 1), "bwd_rows": (16, 8, 1), "bwd_weights": (16, 8, 1)},
}


@lru_cache
def config(kernel: str, dtype: torch.dtype, width: int, dim: int, activation: str) -> Config:
    """For prompts of ``dtype`` and ``width`` features, at most LARGEST_PROJECTOR, 0 without a projector.

    Fewer than 16 rows, which a tensor core takes, stay in the registers of a warp. No default has so few: the
    table of measured ones may, where features are few, and not for softmax, which sees several of them.

    Args:
        kernel: "fwd", "bwd_rows" or "bwd_weights".
        dtype: of the prompts, float64 where they are computed in that.
        width: r.
        dim: C.
        activation: of the features.
    """
    features = block_size(width, LARGEST_PROJECTOR)
    channels, num_warps, num_stages = _BLOCKS[dtype.itemsize, 16 if features == 16 else 64][kernel]
    default = Config({"BLOCK_ROWS": 16, "BLOCK_R": features, "BLOCK_C": channels}, num_warps, num_stages)
    if activation == "softmax":
        return default
    return tuned(f"prompt_projector_{kernel}", default, bytes=dtype.itemsize, features=features, channels=dim)
