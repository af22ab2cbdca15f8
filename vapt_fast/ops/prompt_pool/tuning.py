"""The launch configurations of prompt_pool's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..triton_launch import Config

__all__ = ["Configs", "configs"]


@dataclass(frozen=True)
class Configs:
    """One for each kernel."""

    fwd: Config
    bwd_products: Config
    bwd_tokens: Config
    bwd_affine: Config


_FEW_ROWS = Configs(
    fwd=Config({"BLOCK_R": 16, "BLOCK_N": 32, "BLOCK_C": 64}, num_stages=3),
    bwd_products=Config({"BLOCK_R": 16, "BLOCK_T": 32, "BLOCK_C": 64}, num_stages=2),
    bwd_tokens=Config({"BLOCK_T": 32, "BLOCK_R": 16, "BLOCK_C": 64}),
    bwd_affine=Config({"BLOCK_R": 16, "BLOCK_N": 64, "BLOCK_C": 64}),
)
_MANY_ROWS = replace(
    _FEW_ROWS,
    fwd=Config({"BLOCK_R": 64, "BLOCK_N": 32, "BLOCK_C": 64}, num_stages=3),
    bwd_products=Config({"BLOCK_R": 64, "BLOCK_T": 64, "BLOCK_C": 64}, num_stages=2),
    bwd_tokens=Config({"BLOCK_T": 64, "BLOCK_R": 32, "BLOCK_C": 64}),
)
_FLOAT64 = replace(
    _FEW_ROWS,
    fwd=Config({"BLOCK_R": 16, "BLOCK_N": 32, "BLOCK_C": 64}),
    bwd_products=Config({"BLOCK_R": 16, "BLOCK_T": 16, "BLOCK_C": 32}),
    bwd_tokens=Config({"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_C": 32}),
)


def configs(dtype: torch.dtype, num_rows: int) -> Configs:
    """For a matrix of ``dtype`` with R = ``num_rows``."""
    if dtype == torch.float64:
        return _FLOAT64
    return _FEW_ROWS if num_rows <= 16 else _MANY_ROWS
