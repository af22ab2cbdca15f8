"""The prompts of one block as plain tensors: what several adapters need in common to share a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["KeysValues", "PlainProjector", "PlainPrompts", "Pooling"]


class KeysValues(NamedTuple):
    """Keys and values for the attention of one block, each (B or 1, P, g * d): g heads of d channels."""

    keys: Tensor
    values: Tensor


class PlainProjector(NamedTuple):
    """A feature projector as tensors: down (r, C), and up (r, C), which is transposed and has the scale."""

    down: Tensor
    up: Tensor
    activation: str


class Pooling(NamedTuple):
    """What makes prompts of the patch tokens: prompts = projector(sum_s kernel[s] * (matrix[s] z) + offset).

    z is the tokens' LayerNorm with ``weight`` and ``bias`` (C). matrix (S, P, N) and offset (P) are the
    convolution and the projection; kernel (S, C) is that of a depthwise convolution, else None and S = 1.
    """

    matrix: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor
    kernel: Tensor | None
    projector: PlainProjector | None
    own_projector: bool


@dataclass(frozen=True)
class PlainPrompts:
    """The prompts of one block as plain tensors: pooled ones plus a table; or keys and values.

    Attributes:
        num_prompts: P.
        table: (P, C).
        pooling: of the patch tokens.
        keys_values: each (P, g * d).
        rates: of the dropouts that are on: of the table or the keys and values, of the channels, of the
            projector's features.
    """

    num_prompts: int
    table: Tensor | None = None
    pooling: Pooling | None = None
    keys_values: KeysValues | None = None
    rates: tuple[float, float, float] = (0.0, 0.0, 0.0)
