"""What was measured of an implementation of an op: backend "auto" goes by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .checks import HALF

__all__ = ["INHERITING", "KNOWN", "Measurement", "has_half_tokens"]

# Compute capabilities that take over what was measured on another: A100, B200, consumer GPUs. All kernels run
# there.
INHERITING = ((8, 0), (8, 6), (8, 9), (10, 0), (12, 0))
MEASURED = (9, 0)
KNOWN = (MEASURED, *INHERITING)


def has_half_tokens(args: Any) -> bool:
    """Whether the op's matrix products are of 16 bits: its argument ``dtype``, or that of the first one."""
    first: Tensor = args[0]
    return getattr(args, "dtype", first.dtype) in HALF


@dataclass(frozen=True)
class Measurement:
    """An implementation of an op that was measured to be faster than "torch".

    What is compared is the time of an op's kernels on the GPU, within forward passes and training steps of a
    ViT-B/16 in bfloat16, with 64 images and 50 prompts; float16 was not measured.

    Attributes:
        implementation: its name.
        ratio: how many times as fast it is as "torch".
        compared: what was timed of both.
        fits: which arguments of the op it holds for.
        device, capability, date: where and when it was measured.
        inheriting: compute capabilities that it is also used on, without a measurement.
    """

    implementation: str
    ratio: float
    compared: str
    fits: Callable[[Any], bool] = has_half_tokens
    device: str = "NVIDIA H200"
    capability: tuple[int, int] = MEASURED
    date: str = "2026-11-27"
    inheriting: tuple[tuple[int, int], ...] = INHERITING

    def __str__(self) -> str:
        found = f"{self.ratio} times as fast as torch on an {self.device}, {self.date}"
        return f"{self.implementation}, {found} ({self.compared})"

    @property
    def capabilities(self) -> tuple[tuple[int, int], ...]:
        """All compute capabilities that it is used on."""
        return (self.capability, *self.inheriting)
