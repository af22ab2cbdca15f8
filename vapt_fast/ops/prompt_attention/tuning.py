"""The launch configurations of prompt_attention's Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_launch import Config, block_size
from ..tuned import tuned

__all__ = ["LARGEST_HEAD", "config"]

LARGEST_HEAD = 128  # channels

# By bytes of an element and largest head size: queries, keys, warps and stages of a program of each kernel.
# The first line was the fastest on an H200, the others hardly spill. Products of 16 bits run on tensor cores;
# the operands of others are in registers, so their blocks are smaller.
_BLOCKS = {
    (2, 64): {"fwd": (64, 32, 4, 3), "bwd_queries": (64, 32, 4, 2), "bwd_keys": (32, 64, 4, 3)},
    (2, 128): {"fwd": (128, 32, 8, 2), "bwd_queries": (64, 32, 8, 2), "bwd_keys": (32, 64, 8, 2)},
    (4, 64): {"fwd": (64, 32, 8, 2), "bwd_queries": (32, 32, 8, 2), "bwd_keys": (32, 32, 8, 2)},
    (4, 128): {"fwd": (32, 16, 8, 2), "bwd_queries": (32, 16, 8, 2), "bwd_keys": (32, 32, 8, 2)},
    (8, 64): {"fwd": (16, 16, 4, 2), "bwd_queries": (16, 16, 4, 2), "bwd_keys": (16, 16, 4, 2)},
    (8, 128): {"fwd": (16, 16, 8, 2), "bwd_queries": (16, 16, 8, 2), "bwd_keys": (16, 16, 8, 2)},
}
# What differs where the scores have a bias, whose offsets take registers too.
_BIASED_BLOCKS = {
    (2, 64): {"bwd_keys": (32, 32, 4, 2)},
    (2, 128): {"fwd": (64, 32, 8, 2), "bwd_keys": (32, 32, 8, 2)},
    (4, 64): {"fwd": (32, 32, 8, 2)},
}


@lru_cache
def config(kernel: str, dtype: torch.dtype, head_dim: int, biased: bool = False, **sizes: int) -> Config:
    """For tensors of ``dtype`` with heads of size ``head_dim``, at most LARGEST_HEAD.

    Args:
        kernel: "fwd", "bwd_queries" or "bwd_keys".
        dtype: of the tensors.
        head_dim: d.
        biased: whether the scores have a bias.
        sizes: how many rows each of the kernel's blocks, BLOCK_QUERIES and those of keys, has to cover.
    """
    key = (dtype.itemsize, 64 if head_dim <= 64 else 128)
    table = _BLOCKS[key] | (_BIASED_BLOCKS.get(key, {}) if biased else {})
    queries, keys, num_warps, num_stages = table[kernel]
    blocks = {
        name: block_size(size, queries if name == "BLOCK_QUERIES" else keys) for name, size in sizes.items()
    }
    default = Config(blocks | {"BLOCK_DIM": block_size(head_dim, LARGEST_HEAD)}, num_warps, num_stages)
    if biased:
        return default
    facts = {name.removeprefix("BLOCK_").lower(): size for name, size in sizes.items()}
    return tuned(f"prompt_attention_{kernel}", default, bytes=dtype.itemsize, channels=head_dim, **facts)
