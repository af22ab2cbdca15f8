"""fp8_linear on Triton: the launch of vapt_fast.kernels.fp8_linear."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from ...kernels import fp8_linear as kernels
from ..triton_launch import Config, launch, num_blocks, strided

__all__ = ["quantise"]

_LONGEST = 8192  # of rows that are kept in registers
# Of a transposed weight neighbours in memory are those of a column, so these are read together.
_TRANSPOSED = Config({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}, num_warps=8)
_LONG = Config({"BLOCK_ROWS": 1, "BLOCK_COLUMNS": 4096}, num_warps=8)


@lru_cache
def _kept(num_columns: int) -> Config:
    """For rows that are kept: 32 values a thread or fewer."""
    if num_columns <= 1536:
        return Config({"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 256})
    block = max(1024, 1 << (num_columns - 1).bit_length() >> 2)
    return Config({"BLOCK_ROWS": 1, "BLOCK_COLUMNS": block}, num_warps=min(16, block // 256))


def quantise(rows: Tensor, values: Tensor, scale: Tensor, gelu: bool) -> None:
    """Write ``values`` (M, K) and ``scale`` (M, 1), both contiguous, of ``rows`` (M, K) or of their GELU."""
    (num_rows, num_columns), (row_stride, column_stride) = rows.shape, rows.stride()
    kernel, constants = kernels.quantise_by_two_passes_kernel, {}
    if row_stride < column_stride:
        config = _TRANSPOSED
    elif num_columns > _LONGEST:
        config = _LONG
    else:
        kernel, config = kernels.quantise_kernel, _kept(num_columns)
        constants = {"CHUNKS": num_blocks(config, BLOCK_COLUMNS=num_columns)}
    programs = num_blocks(config, BLOCK_ROWS=num_rows)
    sizes = (num_rows, num_columns)
    launch(kernel, config, programs, strided(rows), values, scale, *sizes, GELU=gelu, **constants)
