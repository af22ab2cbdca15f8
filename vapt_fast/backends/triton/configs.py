"""Launch configurations: how large a block of each kernel is, by dtype and shape.

Tables, not autotuning: a launch is the same on every machine and in every run. They were chosen by what the
compiler makes of them (hardly any spills, see tests/compiled.py), not by times on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = [
    "ADD_CHUNKS",
    "LARGEST_HEAD",
    "LARGEST_PROJECTOR",
    "Launch",
    "PromptPool",
    "absorbed_attention",
    "add_norm",
    "images_per_program",
    "mlp",
    "product_precision",
    "prompt_attention",
    "prompt_pool",
    "prompt_projector",
]

# Channels of a head of attention.
LARGEST_HEAD = 128

# Features of a projector.
LARGEST_PROJECTOR = 64


@dataclass(frozen=True)
class Launch:
    """Block sizes of one kernel, by the names of its parameters, and what the compiler is told."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the launch."""
        # Contracting a * b + c into one instruction: Triton's default differs between versions.
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def add_norm(dtype: torch.dtype, dim: int) -> Launch:
    """For rows of ``dim`` channels, computed in ``dtype``, which a program keeps in its registers."""
    if dim <= 1536:
        return Launch({"BLOCK_T": 4 if dtype.itemsize <= 4 else 2, "BLOCK_C": 256})
    # One row, in at most four blocks.
    block = max(1024, 1 << (dim - 1).bit_length() >> 2)
    return Launch({"BLOCK_T": 1, "BLOCK_C": block}, num_warps=min(16, block // 256))


@dataclass(frozen=True)
class PromptPool:
    """Launches of the kernels of prompt_pool."""

    pool: Launch
    tokens_backward: Launch
    matrix_backward: Launch
    affine_backward: Launch


_FEW_ROWS = PromptPool(
    pool=Launch({"BLOCK_R": 16, "BLOCK_N": 32, "BLOCK_C": 64}),
    tokens_backward=Launch({"BLOCK_T": 64, "BLOCK_R": 16, "BLOCK_C": 32}, num_warps=8),
    matrix_backward=Launch({"BLOCK_R": 16, "BLOCK_N": 32, "BLOCK_C": 64}),
    affine_backward=Launch({"BLOCK_R": 16, "BLOCK_N": 64, "BLOCK_C": 64}),
)
_MANY_ROWS = replace(
    _FEW_ROWS,
    pool=Launch({"BLOCK_R": 64, "BLOCK_N": 32, "BLOCK_C": 128}, num_warps=8),
    tokens_backward=Launch({"BLOCK_T": 64, "BLOCK_R": 32, "BLOCK_C": 32}, num_warps=8),
    matrix_backward=Launch({"BLOCK_R": 64, "BLOCK_N": 64, "BLOCK_C": 32}),
)
_FLOAT64 = replace(
    _FEW_ROWS,
    tokens_backward=Launch({"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_C": 32}),
    matrix_backward=Launch({"BLOCK_R": 16, "BLOCK_N": 32, "BLOCK_C": 32}),
)


def prompt_pool(dtype: torch.dtype, num_rows: int) -> PromptPool:
    """For a matrix of ``dtype`` with R = ``num_rows``."""
    if dtype == torch.float64:
        return _FLOAT64
    return _FEW_ROWS if num_rows <= 16 else _MANY_ROWS


# For partial sums of images, see kernels.common.
ADD_CHUNKS = Launch({"BLOCK": 256})


def absorbed_attention(dtype: torch.dtype, num_queries: int) -> Launch:
    """For rows of ``dtype`` and ``num_queries`` queries, those of all heads."""
    size = {2: 64, 4: 32, 8: 32}[dtype.itemsize]
    return Launch({"BLOCK_M": _block(num_queries, 64), "BLOCK_K": size, "BLOCK_C": size})


# By bytes of an element and features at most: channels and warps of a program of each kernel.
_PROMPT_PROJECTOR = {
    (2, 16): {"project": (64, 4), "project_backward": (64, 4), "weights_backward": (64, 4)},
    (2, 64): {"project": (32, 8), "project_backward": (32, 8), "weights_backward": (32, 8)},
    (4, 16): {"project": (64, 4), "project_backward": (32, 4), "weights_backward": (32, 4)},
    (4, 64): {"project": (32, 8), "project_backward": (32, 8), "weights_backward": (32, 4)},
    (8, 16): {"project": (32, 4), "project_backward": (16, 4), "weights_backward": (16, 4)},
    (8, 64): {"project": (16, 8), "project_backward": (16, 8), "weights_backward": (16, 8)},
}


def prompt_projector(kernel: str, dtype: torch.dtype, width: int) -> Launch:
    """For prompts of ``dtype`` and ``width`` features, at most LARGEST_PROJECTOR, 0 without a projector.

    Args:
        kernel: its name in kernels.prompt_projector.
        dtype: of the prompts, float64 where they are computed in that.
        width: r.
    """
    features = _block(width, LARGEST_PROJECTOR)
    channels, num_warps = _PROMPT_PROJECTOR[dtype.itemsize, 16 if features == 16 else 64][kernel]
    return Launch({"BLOCK_ROWS": 16, "BLOCK_R": features, "BLOCK_C": channels}, num_warps)


def product_precision(dtype: torch.dtype) -> str:
    """How products of float32 values round their factors, where the backbone's products are of ``dtype``.

    Where those are of 16 bits, to tf32, whose mantissa is that of float16.
    """
    return "tf32" if dtype.itemsize == 2 else "ieee"


def images_per_program(batch: int) -> int:
    """Images that one program adds up itself: few partial sums are left, also of a large batch."""
    return max(4, -(-batch // 64))


# By bytes of an element and head size at most: queries, keys and warps of a program of each kernel. 16-bit
# products run on tensor cores; others take registers, so their blocks are smaller.
_PROMPT_ATTENTION = {
    (2, 64): {"forward": (64, 32, 4), "grad_queries": (64, 32, 4), "grad_keys": (32, 64, 4)},
    (2, 128): {"forward": (128, 32, 8), "grad_queries": (64, 32, 8), "grad_keys": (32, 64, 8)},
    (4, 64): {"forward": (64, 32, 8), "grad_queries": (32, 32, 8), "grad_keys": (32, 32, 8)},
    (4, 128): {"forward": (32, 16, 8), "grad_queries": (32, 16, 8), "grad_keys": (32, 32, 8)},
    (8, 64): {"forward": (16, 16, 4), "grad_queries": (16, 16, 4), "grad_keys": (16, 16, 4)},
    (8, 128): {"forward": (16, 16, 8), "grad_queries": (16, 16, 8), "grad_keys": (16, 16, 8)},
}
# What differs where the scores have a bias, whose offsets take registers too.
_PROMPT_ATTENTION_BIASED = {
    (2, 64): {"grad_keys": (32, 32, 4)},
    (2, 128): {"forward": (64, 32, 8), "grad_keys": (32, 32, 8)},
    (4, 64): {"forward": (32, 32, 8)},
}


def prompt_attention(
    kernel: str, dtype: torch.dtype, head_dim: int, biased: bool = False, **sizes: int
) -> Launch:
    """For tensors of ``dtype`` with heads of size ``head_dim``, at most LARGEST_HEAD.

    Args:
        kernel: its name in kernels.prompt_attention.
        biased: whether the scores have a bias.
        sizes: how many rows each of the kernel's blocks, BLOCK_QUERIES and those of keys, has to cover.
    """
    key = (dtype.itemsize, 64 if head_dim <= 64 else 128)
    table = _PROMPT_ATTENTION[key] | (_PROMPT_ATTENTION_BIASED.get(key, {}) if biased else {})
    queries, keys, num_warps = table[kernel]
    blocks = {
        name: _block(size, queries if name == "BLOCK_QUERIES" else keys) for name, size in sizes.items()
    }
    return Launch(blocks | {"BLOCK_DIM": _block(head_dim, LARGEST_HEAD)}, num_warps, num_stages=2)


# By bytes of an element. 16-bit products run on tensor cores, fed by loads that are several steps ahead.
_MLP = {
    2: Launch({"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_DEPTH": 64}, num_warps=8, num_stages=4),
    4: Launch({"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_DEPTH": 16}, num_warps=8, num_stages=3),
    8: Launch({"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 32, "BLOCK_DEPTH": 16}, num_warps=4, num_stages=2),
}


def mlp(dtype: torch.dtype) -> Launch:
    """For tensors of ``dtype``, both kernels."""
    return _MLP[dtype.itemsize]


def _block(size: int, largest: int) -> int:
    """The power of two that covers ``size``, at least 16, as products need, and at most ``largest``."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))
