"""The gate: no speed is reported unless what is compared gives the same numbers, in the same run."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from workload import Setting, Variant, Workload

# Largest error of a tensor relative to its norm. A wrong formula is off by far more, rounding by far less.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2}


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> float:
    """The largest relative error of any tensor, computed in ``dtype``.

    Raises:
        AssertionError: it is above the tolerance, or something is missing.
    """
    assert actual.keys() == expected.keys()
    errors = {name: _relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    tolerance = TOLERANCES[dtype]
    assert errors[worst] <= tolerance, f"{worst} is off by {errors[worst]:.1e}, more than {tolerance:.0e}"
    return errors[worst]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    error = ((actual - expected).norm() / expected.norm()).item()
    # Comparisons with NaN are false: as an infinite error it can't slip through.
    return error if error == error else float("inf")


@cache
def models_agree(setting: Setting, kind: str, num_prompts: int) -> float:
    """The largest relative error of logits and gradients, backend "torch" against "reference"."""
    expected, actual = (
        Workload(setting, Variant(backend, kind, num_prompts)).outputs() for backend in ("reference", "torch")
    )
    return largest_error(actual, expected, setting.compute_dtype)
