"""Which implementation of an op runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ..backends import _dispatch, _measurements
from ..backends import torch as torch_backend

__all__ = ["choose", "function", "run"]


def run(op: str, backend: str | None, *args: Any) -> Any:
    """The result of ``op`` by the implementation that ``choose`` names."""
    return function(op, choose(op, backend, *args))(*args)


def choose(op: str, backend: str | None, *args: Any) -> str:
    """The implementation of ``op`` that runs, one of _dispatch.IMPLEMENTATIONS.

    Args:
        op: its name.
        backend: a name of _dispatch.BACKENDS, or one of the op's own implementations; None for the current
            backend, see _dispatch.resolve.
        args: of the op, validated, the first one a tensor.

    Raises:
        TypeError, ValueError: ``backend`` is no such name, or is "reference", the whole model's.
        BackendUnavailableError: it was named and can't run here, or not with these arguments ("auto" takes
            the next best then).
    """
    known = _dispatch.IMPLEMENTATIONS[op]
    name = _dispatch.resolve() if backend is None else _dispatch.check_backend(backend, also=known)
    if name == "reference":
        raise ValueError(
            f"{op} has no backend 'reference', which is that of a whole model: give the op backend='torch', "
            "or call a model within vapt_fast.use_backend('reference')"
        )
    device = args[0].device
    if name == "auto":
        return _fastest(op, device, args)
    if name == "torch" or name not in known:
        return "torch"
    reasons = _dispatch.device_lacks(name, device) or _why_not(op, name, args)
    if reasons:
        raise _dispatch.BackendUnavailableError(f"{op} can't run on backend {name!r}: " + "; ".join(reasons))
    return name


def _fastest(op: str, device: torch.device, args: tuple) -> str:
    """The first of the measured implementations that holds here and can run, else "torch"."""
    entries = [entry for entry in _measurements.MEASUREMENTS if entry.op == op]
    if device.type != "cuda" or not entries or _transformed():
        return "torch"
    capability = _dispatch.capability(device)
    if all(capability not in entry.capabilities for entry in entries):
        _dispatch.warn_once(
            f"{op} runs on PyTorch's operations: nothing is known of GPUs of compute capability "
            f"{capability[0]}.{capability[1]}. backend='triton' or 'cuda' tries the kernels"
        )
        return "torch"
    dtype = args[0].dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    for entry in entries:
        if capability in entry.capabilities and dtype in entry.dtypes and entry.fits(*args):
            name = entry.implementation
            missing = _dispatch.unavailable_because(name)
            if missing:
                _dispatch.warn_once(
                    f"backend {name!r}, the fastest on this GPU, can't run: " + "; ".join(missing)
                )
            elif not _why_not(op, name, args):
                return name
    return "torch"


def _transformed() -> bool:
    """Whether forward-mode derivatives or a transform of torch.func are under way, which no kernel serves."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def _why_not(op: str, name: str, args: tuple) -> list[str]:
    """Every reason why implementation ``name`` of ``op`` can't take ``args``."""
    return function(f"why_not_{op}", name)(*args)


def function(name: str, implementation: str) -> Callable:
    """What the backend's module calls ``name``; imported only now, because its library may be missing."""
    if implementation == "triton":
        from ..backends import triton as module
    elif implementation == "cuda":
        from ..backends import cuda as module
    elif implementation == "torch":
        module = torch_backend
    else:  # one of PyTorch's own libraries
        module, name = torch_backend, f"{name}_{implementation}"
    return getattr(module, name)
