"""Launch configurations: how large a block of each kernel is, by dtype and shape.

Tables, not autotuning: a launch is the same on every machine and in every run. They were chosen by what the
compiler makes of them (no spills, see kernels/resources.json): nothing has been timed on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = [
    "Launch",
    "PromptPool",
    "images_per_program",
    "product_precision",
    "prompt_pool",
]


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


@dataclass(frozen=True)
class PromptPool:
    """Launches of the kernels of prompt_pool."""

    normalise: Launch
    pool: Launch
    tokens_backward: Launch
    matrix_backward: Launch
    affine_backward: Launch
    add_chunks: Launch = Launch({"BLOCK": 256})


_FEW_ROWS = PromptPool(
    normalise=Launch({"BLOCK_T": 4, "BLOCK_C": 256}),
    pool=Launch({"BLOCK_R": 16, "BLOCK_N": 32, "BLOCK_C": 64}),
    tokens_backward=Launch({"BLOCK_T": 32, "BLOCK_R": 16, "BLOCK_C": 64}),
    matrix_backward=Launch({"BLOCK_R": 16, "BLOCK_N": 32, "BLOCK_C": 64}),
    affine_backward=Launch({"BLOCK_R": 16, "BLOCK_N": 64, "BLOCK_C": 64}),
)
_MANY_ROWS = replace(
    _FEW_ROWS,
    pool=Launch({"BLOCK_R": 64, "BLOCK_N": 32, "BLOCK_C": 128}, num_warps=8),
    tokens_backward=Launch({"BLOCK_T": 32, "BLOCK_R": 64, "BLOCK_C": 64}, num_warps=8),
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


def product_precision(dtype: torch.dtype) -> str:
    """How products of float32 values round their factors, for tokens of ``dtype``.

    Of 16-bit tokens to tf32, whose mantissa is that of float16.
    """
    return "tf32" if dtype.itemsize == 2 else "ieee"


def images_per_program(batch: int) -> int:
    """Images that one program adds up itself: few partial sums are left, also of a large batch."""
    return max(4, -(-batch // 64))
