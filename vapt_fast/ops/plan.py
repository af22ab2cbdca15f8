"""What an op finds out about its arguments, once for all calls that are alike.

Checks, casts and the choice of an implementation read of a tensor no more than what ``describe`` returns. A
plan is kept under that: it is a note of what was found, never of values.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["PLANS", "TENSORS", "Plan", "describe", "is_watched", "make_plan"]

TENSORS = (Tensor, torch.nn.Parameter)  # subclasses may mean something of their own
_OPTIONS = {int, float, bool, str, torch.dtype, type(None)}
_MOST_PLANS = 4096  # of calls in ever new shapes
_facts = attrgetter("shape", "dtype", "device", "requires_grad")


class Plan(NamedTuple):
    """How to run an op.

    Attributes:
        implementation: its name.
        casts: position and new dtype of the tensors that are to be cast.
        options: the arguments that are no tensors, as the checks returned them.
        differentiable: whether autograd has to know of the call.
    """

    implementation: str
    casts: tuple[tuple[int, torch.dtype], ...]
    options: tuple
    differentiable: bool


PLANS: dict[tuple, Plan] = {}
"""By op, backend, modes and the description of the arguments."""


def is_watched() -> bool:
    """Whether anybody but autograd and autocast records or changes what is called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._is_tracing()
    )


def describe(args: tuple, num_tensors: int) -> list[Any] | None:
    """Return autocast's dtype, or None, and what else checks read of ``args``; None where that is not known.

    Args:
        args: as the user gave them.
        num_tensors: how many of them, the first ones, are to be tensors or None.
    """
    first = args[0]
    if type(first) not in TENSORS:
        return None
    device = first.device.type
    if device not in ("cuda", "cpu") and not torch.amp.is_autocast_available(device):
        return None
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    found: list[Any] = [autocast, torch.is_grad_enabled()]
    for value in args[:num_tensors]:
        if value is None:
            found.append(None)
        elif type(value) in TENSORS:
            found.append(_facts(value))
        else:
            return None
    options = args[num_tensors:]
    types = tuple(map(type, options))  # 1, 1.0 and True are equal
    if not _OPTIONS.issuperset(types):
        return None
    return [*found, types, options]


def make_plan(key: tuple, given: tuple, checked: tuple, num_tensors: int, implementation: str) -> Plan:
    """Return the plan of an op that was given ``given``, of which its checks made ``checked``; keeps it."""
    pairs = enumerate(zip(given[:num_tensors], checked, strict=False))
    casts = tuple((index, new.dtype) for index, (old, new) in pairs if new is not old)
    learns = any(tensor is not None and tensor.requires_grad for tensor in given[:num_tensors])
    plan = Plan(implementation, casts, tuple(checked[num_tensors:]), torch.is_grad_enabled() and learns)
    if len(PLANS) >= _MOST_PLANS:
        PLANS.clear()
    PLANS[key] = plan
    return plan
