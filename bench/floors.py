"""Floors: the least time that an op can take on a device, to hold a measurement against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CEILINGS", "Ceiling", "Work"]


@dataclass(frozen=True)
class Ceiling:
    """The rates measured on a device with large transfers and large products of random matrices.

    Attributes:
        bytes: moved in a second, read and written.
        operations: in a second, of 16-bit products with float32 sums; a multiplication and an addition are
            two.
    """

    bytes: float
    operations: float


# By the name that PyTorch gives. Others have none: no figure is made up for them.
CEILINGS = {"NVIDIA H200": Ceiling(bytes=4.3e12, operations=790e12)}


@dataclass(frozen=True)
class Work:
    """The least that an op has to do: every input read once, every output written once, every operation."""

    bytes: float
    operations: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)

    def seconds(self, device: str, dtype: torch.dtype) -> float | None:
        """Return the least time on the device of this name; None where that is not known."""
        ceiling = CEILINGS.get(device)
        if ceiling is None or dtype.itemsize != 2:
            return None
        return max(self.bytes / ceiling.bytes, self.operations / ceiling.operations)
