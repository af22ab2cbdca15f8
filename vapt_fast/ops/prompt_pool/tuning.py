"""The launch configurations of prompt_pool's Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_launch import Config
from ..tuned import tuned

__all__ = ["config"]


_PREPARATION = {
    "weights": Config({"BLOCK_R": 8, "BLOCK_T": 256}),
    "bwd_grads": Config({"BLOCK_R": 16, "BLOCK_C": 128}),
}
_FEW_ROWS = _PREPARATION | {
    "fwd": Config({"BLOCK_R": 16, "BLOCK_T": 32, "BLOCK_C": 128}, num_stages=4),
    "bwd_products": Config({"BLOCK_R": 16, "BLOCK_T": 64, "BLOCK_C": 64}, num_stages=3),
    "bwd_tokens": Config({"BLOCK_T": 64, "BLOCK_R": 16, "BLOCK_C": 64}),
}
_MANY_ROWS = _PREPARATION | {
    "fwd": Config({"BLOCK_R": 64, "BLOCK_T": 32, "BLOCK_C": 128}, num_stages=4),
    "bwd_products": Config({"BLOCK_R": 64, "BLOCK_T": 32, "BLOCK_C": 64}, num_stages=3),
    "bwd_tokens": Config({"BLOCK_T": 64, "BLOCK_R": 64, "BLOCK_C": 64}),
}
# Of tokens in float32, whose products need more registers.
_FEW_ROWS_FLOAT32 = _PREPARATION | {
    "fwd": Config({"BLOCK_R": 16, "BLOCK_T": 32, "BLOCK_C": 64}, num_stages=3),
    "bwd_products": Config({"BLOCK_R": 16, "BLOCK_T": 32, "BLOCK_C": 32}, num_stages=2),
    "bwd_tokens": Config({"BLOCK_T": 32, "BLOCK_R": 16, "BLOCK_C": 64}),
}
_MANY_ROWS_FLOAT32 = _PREPARATION | {
    "fwd": Config({"BLOCK_R": 64, "BLOCK_T": 16, "BLOCK_C": 64}, num_stages=3),
    "bwd_products": Config({"BLOCK_R": 64, "BLOCK_T": 32, "BLOCK_C": 16}, num_stages=2),
    "bwd_tokens": Config({"BLOCK_T": 64, "BLOCK_R": 32, "BLOCK_C": 64}),
}
_FLOAT64 = _PREPARATION | {
    "fwd": Config({"BLOCK_R": 16, "BLOCK_T": 32, "BLOCK_C": 64}),
    "bwd_products": Config({"BLOCK_R": 16, "BLOCK_T": 16, "BLOCK_C": 32}),
    "bwd_tokens": Config({"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_C": 32}),
}


@lru_cache
def config(kernel: str, dtype: torch.dtype, tokens: torch.dtype, num_rows: int) -> Config:
    """For a matrix of ``dtype`` with R = ``num_rows``, and tokens of the dtype ``tokens``.

    ``kernel`` is "weights", "fwd", "bwd_grads", "bwd_products" or "bwd_tokens".
    """
    if dtype == torch.float64:
        return _FLOAT64[kernel]
    if tokens.itemsize == 2:
        few, many = _FEW_ROWS, _MANY_ROWS
    else:
        few, many = _FEW_ROWS_FLOAT32, _MANY_ROWS_FLOAT32
    default = (few if num_rows <= 16 else many)[kernel]
    return tuned(f"prompt_pool_{kernel}", default, bytes=tokens.itemsize, rows=num_rows)
