"""The ops that have Triton kernels, for the tests that are the same for all of them: one entry an op."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ops import attention_case, pool_case

__all__ = ["KERNELS", "Kernels", "precision_cases", "random_cases"]


@dataclass(frozen=True)
class Kernels:
    """One op.

    Attributes:
        make: makes a case of it, see ops.py.
        sizes: what to choose each argument of ``make`` from: around the sizes of blocks, and nothing at all.
        precise: sizes for comparisons in low precision.
    """

    make: Callable[..., tuple]
    sizes: dict[str, list[Any]]
    precise: dict[str, Any]


KERNELS = {
    "prompt_pool": Kernels(
        pool_case,
        {
            "batch": [1, 1, 2, 5, 0],
            "prefix": [0, 1, 3],
            "patches": [1, 9, 31, 33],
            "dim": [1, 6, 63, 65],
            "rows": [1, 3, 15, 17, 0],
        },
        {"batch": 1, "dim": 32},
    ),
    "prompt_attention": Kernels(
        attention_case,
        {
            "batch": [1, 1, 2, 0],
            "queries": [1, 5, 16, 17],
            "tokens": [1, 7, 16, 17],
            "heads": [2],
            "groups": [1, 2],
            "dim": [1, 3, 8, 17],
            "prompts": [0, 1, 5, 17],
            "shared": [False, True],
            "bias": [False, False, True],
        },
        {"batch": 1, "heads": 1, "groups": 1, "queries": 30, "tokens": 28, "dim": 32, "prompts": 5},
    ),
}


def random_cases(op: str, count: int) -> Iterator[dict[str, Any]]:
    """Sizes for the op's ``make``, different from each other and always the same."""
    choose, seen = random.Random(op), []
    while len(seen) < count:
        sizes = {name: choose.choice(values) for name, values in KERNELS[op].sizes.items()}
        if sizes not in seen:
            seen.append(sizes)
            yield sizes


def precision_cases(op: str, scale: float, count: int = 20) -> Iterator[tuple]:
    """Cases for ops.assert_policy: ``count`` seeds, the inputs multiplied by ``scale``."""
    for seed in range(count):
        torch.manual_seed(seed)
        function, formula, tensors, options = KERNELS[op].make(**KERNELS[op].precise)
        yield function, formula, [t * scale for t in tensors], options
