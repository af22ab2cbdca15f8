"""What is checked of the Triton kernels of every op, in their tests and of mutants by kill_mutants.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from interpreter import bfloat16
from kernel_cases import KERNELS, laid_out, precision_cases
from op_cases import assert_policy, assert_same_results, results
from shadow import no_overflow, shadow

__all__ = ["check_far_offsets", "check_precision", "check_values", "made"]


def made(op: str, **sizes: Any) -> tuple:
    """A case of the op, the same each time."""
    torch.manual_seed(0)
    return KERNELS[op].make(**sizes)


def check_values(op: str, sizes: dict[str, Any], layout: str = "padded rows") -> None:
    """Outputs and gradients equal the formula's in float64; kernels load and store only what they may."""
    function, formula, tensors, options = made(op, **sizes)
    expected = results(formula, tensors, options)
    lay_out = partial(laid_out, layout=layout)
    tensors = list(map(lay_out, tensors))
    options = {name: lay_out(value) for name, value in options.items()} | {"backend": "triton"}
    with shadow() as findings:
        actual = results(function, tensors, options, lay_out=lay_out)
    assert not findings, "\n".join(map(str, findings))
    assert_same_results(actual, expected, 1e-10)


def check_far_offsets(op: str, sizes: dict[str, Any], dim: int, stride: int) -> None:
    """With ``stride`` between neighbours in a dimension of each tensor: no offset is wrong."""
    function, _, tensors, options = made(op, **sizes)
    tensors = [t.float() for t in tensors]
    options = {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }
    expected = results(function, tensors, options | {"backend": "torch"})

    given = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor) and t.ndim > max(dim, 1)]
    farthest = max((tensor.shape[dim] - 1) * stride for tensor in given)
    memory = torch.empty(farthest + 2**20)  # only the pages that are written take any
    starts = iter(range(0, 2**20, 2**14))

    def apart(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        strides = list(torch.empty(value.shape).stride())
        if value.ndim > max(dim, 1):
            strides[dim] = stride
        return memory[next(starts) :].as_strided(value.shape, strides).copy_(value)

    distant = {name: apart(value) for name, value in options.items()} | {"backend": "triton"}
    with shadow() as findings, no_overflow():
        actual = results(function, list(map(apart, tensors)), distant)
    assert not findings, "\n".join(map(str, findings))
    assert_same_results(actual, expected, 1e-4)


def check_precision(op: str, dtype: torch.dtype, scale: float = 1.0, count: int = 20) -> None:
    """The policy for low precision over ``count`` cases."""
    cases = (
        (partial(function, backend="triton"), *rest) for function, *rest in precision_cases(op, scale, count)
    )
    with bfloat16():
        assert_policy(KERNELS[op].make, cases, dtype)
