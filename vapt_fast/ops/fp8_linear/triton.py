"""fp8_linear on Triton: the launch of vapt_fast.kernels.fp8_linear."""

from __future__ import annotations

from torch import Tensor

from ...kernels import fp8_linear as kernels
from ..triton_launch import Config, launch, num_blocks, strided

__all__ = ["quantise"]

# Neighbours in memory are read together: those of a row, or, of a transposed weight, of a column.
_ROWS = Config({"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 256})
_TRANSPOSED = Config({"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64})


def quantise(rows: Tensor, values: Tensor, scale: Tensor, gelu: bool) -> None:
    """Write ``values`` (M, K) and ``scale`` (M, 1), both contiguous, of ``rows`` (M, K) or of their GELU."""
    (num_rows, num_columns), (row_stride, column_stride) = rows.shape, rows.stride()
    config = _TRANSPOSED if row_stride < column_stride else _ROWS
    programs = num_blocks(config, BLOCK_ROWS=num_rows)
    launch(
        kernels.quantise_kernel,
        config,
        programs,
        *(strided(rows), values, scale, num_rows, num_columns),
        GELU=gelu,
    )
