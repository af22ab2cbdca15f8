"""The gate: no speed is reported unless what is compared gives the same numbers, in the same run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .workload import Precision

__all__ = ["DisagreementError", "check", "relative_error", "relative_errors"]

# A wrong formula is off by far more, rounding by far less.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
# Where products are rounded to less, the literal method is the yardstick, under the same rounding.
FACTOR = 2.0


class DisagreementError(RuntimeError):
    """Numbers that should be the same differ."""


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the ``relative_error`` of each tensor.

    Raises:
        DisagreementError: something is missing.
    """
    if actual.keys() != expected.keys():
        raise DisagreementError(f"there is {sorted(actual)}, expected {sorted(expected)}")
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def check(errors: dict[str, float], literal: dict[str, float], precision: Precision) -> float:
    """Return the largest of ``errors``, if all are small enough.

    Args:
        errors: of what is checked, by relative_errors.
        literal: the errors of the literal method in the same precision.
        precision: float32 and float64 must be within TOLERANCES; below, an error may be twice that of the
            literal method, plus twice the dtype's precision.

    Raises:
        DisagreementError: they are not.
    """
    dtype = precision.compute
    if precision.tf32 and dtype == torch.float32:
        dtype = torch.float16  # the mantissa of TF32 is that of float16
    for name, error in errors.items():
        allowed = TOLERANCES.get(dtype, FACTOR * literal[name] + 2 * torch.finfo(dtype).eps)
        if error > allowed or math.isinf(error):
            raise DisagreementError(f"{name} is off by {error:.1e}, more than {allowed:.1e}")
    return max(errors.values())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the error relative to that of the expected tensor; infinite for NaN."""
    error = ((actual - expected).norm() / expected.norm()).item()
    # Comparisons with NaN are false: as an infinite error it can't slip through.
    return math.inf if math.isnan(error) else error
