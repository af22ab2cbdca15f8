"""What was measured to be faster than PyTorch's own operations: backend "auto" goes by this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._why_not import HALF

__all__ = ["INHERITING", "MEASUREMENTS", "Measurement"]

LARGEST_NUM_KEYS = 400
# Compute capabilities on which nothing was measured, but all of these kernels run: A100, B200, consumer GPUs.
INHERITING = ((8, 0), (8, 6), (8, 9), (10, 0), (12, 0))


def _always(*args: object) -> bool:
    return True


def _rounded_to_half(*args: object) -> bool:
    """Whether prompt_projector, which computes in float32 at least, rounds to 16 bits: its last argument."""
    return args[-1] in HALF


def _few_keys(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, *rest: object) -> bool:
    """Whether prompt_attention has few keys, which cost the more to concatenate; 247 were measured."""
    *_, bias = rest
    return bias is None and k.shape[1] + prompt_k.shape[1] <= LARGEST_NUM_KEYS


@dataclass(frozen=True)
class Measurement:
    """An implementation of an op that was measured to be faster than "torch".

    Attributes:
        op, implementation: keys and values of _dispatch.IMPLEMENTATIONS.
        ratio: how many times as fast it is as "torch".
        compared: what was timed of both.
        dtypes: of the op's first argument, or of autocast where that is on.
        fits: which arguments of the op (positional, as its implementations take them) it holds for.
        device, capability, date: where and when it was measured.
        inheriting: compute capabilities that it is also used on, without a measurement.
    """

    op: str
    implementation: str
    ratio: float
    compared: str
    dtypes: tuple[torch.dtype, ...] = HALF
    fits: Callable[..., bool] = _always
    device: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    date: str = "2026-11-27"
    inheriting: tuple[tuple[int, int], ...] = INHERITING

    def __str__(self) -> str:
        found = f"{self.ratio} times as fast as torch on an {self.device}, {self.date}"
        return f"{self.implementation}, {found} ({self.compared})"

    @property
    def capabilities(self) -> tuple[tuple[int, int], ...]:
        """All compute capabilities that it is used on."""
        return (self.capability, *self.inheriting)


# The first entry that matches decides. What is compared is the time of an op's kernels on the GPU, within
# forward passes and training steps of a ViT-B/16 in bfloat16, with 64 images and 50 prompts; float16 was not
# measured. What PyTorch's pooling takes with its backward is the difference of whole steps. There is no entry
# for mlp: a product with GELU takes 170 + 220 µs, forward and backward, in Triton, and 144 + 156 in PyTorch.
MEASUREMENTS: tuple[Measurement, ...] = (
    Measurement("add_norm", "triton", 1.9, "0.49 ms of a training step against 0.92"),
    Measurement(
        "prompt_pool",
        "cuda",
        2.5,
        "forward 65 µs against 165, with the backward 173 against about 570",
    ),
    Measurement(
        "prompt_pool",
        "triton",
        2.1,
        "forward 78 µs against 165, with the backward 387 against about 570",
    ),
    Measurement(
        "prompt_projector",
        "triton",
        2.6,
        "forward 35 µs against 92, with the backward and absorbed_attention 1.6 ms of a step against 2.5",
        dtypes=(torch.float32, *HALF),
        fits=_rounded_to_half,
    ),
    Measurement(
        "prompt_attention",
        "triton",
        1.5,
        "forward and backward, with the products before and after, 428 µs against 638",
        fits=_few_keys,
    ),
    Measurement("absorbed_attention", "triton", 1.9, "forward 53 µs against 101"),
)
