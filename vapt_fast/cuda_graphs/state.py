"""What a captured call has read besides its images, and how a change of it is noticed.

A graph repeats kernels with the addresses that they were given. It sees what is written into these tensors
later, and nothing else: no other attribute, hook, module, tensor or global setting. So all of that is
compared before each replay.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import HOOKS, has_weight_hooks

__all__ = ["ModelState", "addresses", "global_state", "model_reasons"]

# Whose modules compute the same in each call, as long as their attributes are the same.
_PACKAGES = ("torch", "timm", "vapt_fast")

_Address = tuple[Any, ...]


class ModelState:
    """All attributes of a model's modules, as they are now, and where its tensors are.

    Neither the model nor its parameters and buffers are kept alive, and there are no weak references to these
    either: they forbid ``torch.utils.swap_tensors``. What is known of them is enough: another tensor at the
    same address, of the same shape, is read by a graph as well as the old one.

    Args:
        model: whose state it is.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = [module for module in model.modules() if module is not model]
        self._modules = [weakref.ref(module) for module in (model, *parts)]
        self._types = [type(module) for module in (model, *parts)]
        classes = {base for module in (model, *parts) for base in type(module).__mro__}
        self._classes = [cls for cls in classes if issubclass(cls, nn.Module)]
        self._forwards = [cls.forward for cls in self._classes]
        own = [module.__dict__ for module in parts]
        hooks = [vars(module)[name] for module in (model, *parts) for name in HOOKS]
        self._children = [module._modules for module in (model, *parts)]
        self._parts = _values(self._children)
        self._attributes: list[dict[str, Any]] = [*own, *hooks]
        self._values = _values(self._attributes)
        self._own_values = _own_values(model)
        self._tensor_dicts = [
            tensors for module in (model, *parts) for tensors in (module._parameters, module._buffers)
        ]
        self._loose = [t for t in chain(self._values, self._own_values) if isinstance(t, Tensor)]
        self._ids = [id(t) for t in self._members()]
        self._addresses = addresses(self.tensors())

    def _members(self) -> list[Tensor | None]:
        return _values(self._tensor_dicts)

    def tensors(self) -> list[Tensor]:
        """Return the parameters, the buffers, and the tensors that are attributes of modules."""
        return [t for t in chain(self._members(), self._loose) if t is not None]

    def matches(self, model: nn.Module) -> bool:
        """Return whether ``model`` is as it was: all that a graph can't see."""
        return (
            self.has_same_parts()
            and _same(_values(self._attributes), self._values)
            and _same(_own_values(model), self._own_values)
            and _same([type(module()) for module in self._modules], self._types)
            and _same([cls.forward for cls in self._classes], self._forwards)
        )

    def has_same_parts(self) -> bool:
        """Return whether the model has the same modules and tensors, where they were."""
        return (
            _same(_values(self._children), self._parts)
            and [id(t) for t in self._members()] == self._ids
            and addresses(self.tensors()) == self._addresses
        )


def _values(dicts: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


def _same(values: list[Any], others: list[Any]) -> bool:
    return len(values) == len(others) and all(map(is_, values, others))


# What is compared otherwise, or does not matter. Calls by another adapter are of another kind.
_NOT_COMPARED = ("_cuda_graphs", "active_adapter", "_modules", "_parameters", "_buffers", *HOOKS)


def _own_values(model: nn.Module) -> list[Any]:
    return [value for name, value in model.__dict__.items() if name not in _NOT_COMPARED]


def addresses(tensors: Iterable[Tensor]) -> list[_Address]:
    """Return where each tensor is; of tensors with a storage of another kind, only which it is."""
    return [
        (t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad) if _is_ordinary(t) else (id(t),)
        for t in tensors
    ]


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided


def model_reasons(model: nn.Module, device: torch.device) -> list[str]:
    """Return every reason why a captured call of ``model`` on ``device`` could not be kept right."""
    reasons = []
    for path, module in model.named_modules():
        name = path or "the model"
        if "forward" in module.__dict__:
            reasons.append(f"the forward of {name} was replaced")
        foreign = next(filter(None, map(_foreign_module, type(module).__mro__)), None)
        if foreign is not None:
            reasons.append(
                f"{name} is a {type(module).__name__} with code of {foreign}, which may do something else "
                "in each call"
            )
        if has_weight_hooks(module) if module is model else any(getattr(module, hook) for hook in HOOKS):
            reasons.append(f"{name} has hooks")
    for path, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not _is_ordinary(tensor):
            reasons.append(f"{path} is a {type(tensor).__name__} of {tensor.layout}")
        elif tensor.device != device:
            reasons.append(f"{path} is on {tensor.device}")
    return reasons


def _foreign_module(cls: type) -> str | None:
    """Return where a class or its forward is from, unless that is one of _PACKAGES."""
    names = [cls.__module__, getattr(cls.__dict__.get("forward"), "__module__", cls.__module__)]
    known = (*_PACKAGES, "builtins", "typing", "abc")
    return next((name for name in names if name.partition(".")[0] not in known), None)


def _getters() -> list[Any]:
    """PyTorch's settings that choose kernels and precisions, as functions that return them."""
    names = ["reduced_precision", "sdp_enabled", "sdp_allow", "cudnn_enabled", "cudnn_bench", "determinis"]
    # From PyTorch 2.9 on, tf32 is a value of fp32_precision, and the old question may raise.
    precision = getattr(torch._C, "_get_fp32_precision_getter", None)
    if precision is None:
        names.append("allow_tf32")
    getters = [
        getattr(torch._C, name)
        for name in sorted(dir(torch._C))
        if name.startswith("_get_") and any(part in name for part in names)
    ]
    if precision is not None:
        getters += [lambda on=on: precision(*on) for on in (("cuda", "matmul"), ("cuda", "conv"))]
    return [*getters, torch.get_default_dtype]


_GETTERS = _getters()


def global_state() -> tuple[Any, ...]:
    """Return PyTorch's settings that change which kernels run."""
    return tuple(getter() for getter in _GETTERS)
