"""What may be done with a module that others may have changed: read its weights, or only call it.

Calling a module respects everything that was done to it: hooks, LoRA, pruning, quantised, sharded or
offloaded weights, another forward. Reading its weights is right only where none of that was done: see
``is_plain``.
"""

from __future__ import annotations

import copy
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Generic, SupportsIndex, TypeVar
from weakref import WeakKeyDictionary

import torch
from timm.layers import (
    GELU,
    DropPath,
    GELUTanh,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    QuickGELU,
    RmsNorm,
    SwiGLU,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "HOOKS",
    "Enclosing",
    "Once",
    "call_within",
    "class_of",
    "enclosing",
    "evaluating",
    "has_global_hooks",
    "has_hooks",
    "has_user_hooks",
    "has_weight_hooks",
    "is_active_dropout",
    "is_ordinary",
    "is_patched",
    "is_plain",
    "is_wrapper",
    "register_by_token",
    "remember_forward",
    "share_tensors",
    "token_mixing_reason",
    "weights_of",
]

Answer = TypeVar("Answer")

# Whether a tensor is made of others: a quantised one of torchao, or a DTensor.
is_wrapper: Callable[[object], bool] = is_traceable_wrapper_subclass

# The packages whose hooks bring a module's weights to where they are needed, or compute them (FSDP, pruning,
# weight norm, offloading), and leave what the module computes as it is.
WEIGHT_HOOKS = ("torch.distributed.", "torch.nn.utils.", "accelerate.hooks")
# These only look.
WATCHERS = ("torch.utils.module_tracker",)

# What timm's blocks are made of, besides attention. Each acts on every token by itself.
BY_TOKEN: list[type[nn.Module]] = [
    *(nn.Identity, nn.Linear, nn.Dropout, DropPath, LayerScale),
    *(nn.LayerNorm, LayerNorm, nn.RMSNorm, RmsNorm),
    *(nn.GELU, GELU, GELUTanh, QuickGELU, nn.SiLU, nn.ReLU),
    *(Mlp, GluMlp, SwiGLU, nn.Sequential),
]
# So do the layers of these packages, which take the place of a Linear.
BY_TOKEN_PACKAGES = ("peft.tuners.",)
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # are never called

# The attributes of a module that hold its hooks.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)

_FORWARDS: dict[type, Callable[..., Any] | None] = {}
_ANCESTORS: dict[type, tuple[type[nn.Module], ...]] = {}  # a class and those of its bases that are remembered


def remember_forward(*classes: type[nn.Module]) -> None:
    """Note the forward of ``classes`` as their library defines it: ``is_plain`` compares with it later.

    One that was replaced before is noted as None, so that no module of that class is ever plain.
    """
    for cls in classes:
        code = getattr(cls.forward, "__code__", None)
        file = getattr(sys.modules[cls.__module__], "__file__", None)
        own = code is not None and code.co_filename == file
        _FORWARDS.setdefault(cls, cls.forward if own else None)
        _ANCESTORS[cls] = tuple(base for base in cls.__mro__ if base in _FORWARDS)


def register_by_token(*classes: type[nn.Module]) -> None:
    """Note that modules of ``classes`` act on every token by itself, as a Linear does."""
    remember_forward(*classes)
    BY_TOKEN.extend(cls for cls in classes if cls not in BY_TOKEN)


def is_patched(cls: type[nn.Module]) -> bool:
    """Return whether ``cls`` or a base of it was given another forward since it was remembered."""
    return any(base.forward is not _FORWARDS[base] for base in _ANCESTORS[cls])


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Return whether reading the weights of ``module`` comes to the same as calling it.

    That is: it is of exactly one of ``classes`` (no subclass, as LoRA layers and parametrised or sharded
    modules are), neither it nor its class was given another forward, it has no hooks, and its weights are
    ordinary tensors.
    """
    return type(module) in classes and _is_untouched(module)


def _is_untouched(module: nn.Module) -> bool:
    cls = type(module)
    return (
        _FORWARDS.get(cls) is cls.forward
        and "forward" not in module.__dict__  # PyTorch 2.8 doesn't compile vars(module)
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and all(is_ordinary(parameter) for parameter in module._parameters.values())
    )


def token_mixing_reason(module: nn.Module, name: str) -> str | None:
    """Return why ``module``, called with some of the tokens, might not give the rows that it gives of all.

    None if it does. What is not known to act on every token by itself might not: modules of the user's own,
    those whose class was given another forward, hooks, dropouts that are on, weights of unknown classes
    (quantised ones may scale by the largest of all tokens).
    """
    if _is_plainly_by_token(module):
        return None
    for path, part in module.named_modules(prefix=name):
        if has_user_hooks(part):
            return f"{path} has hooks or another forward"
        if is_active_dropout(part):
            return f"{path} drops"
        if not _acts_by_token(part):
            return f"{path} is a {type(part).__name__} that may use several tokens at once"
    return None


def _is_plainly_by_token(module: nn.Module) -> bool:
    """Return whether nobody has touched any part of ``module``: the usual case, asked in every call."""
    parts = [module]
    while parts:
        part = parts.pop()
        if (
            type(part) not in BY_TOKEN
            or not _is_untouched(part)
            or (part.training and is_active_dropout(part))
        ):
            return False
        parts.extend(child for child in part._modules.values() if child is not None)
    return True


def _acts_by_token(part: nn.Module) -> bool:
    cls = type(part)
    if cls in CONTAINERS or cls.__module__.startswith(BY_TOKEN_PACKAGES):
        return True
    if cls not in BY_TOKEN:
        # Sharded and parametrised modules are of subclasses, without a forward of their own.
        bases = (base for base in BY_TOKEN if isinstance(part, base) and base.forward is cls.forward)
        known = next(bases, None)
        if known is None:
            return False
        cls = known
    known_forward = _FORWARDS.get(cls) is cls.forward
    return known_forward and all(
        is_ordinary(tensor) or _is_sharded(tensor) for tensor in part._parameters.values()
    )


def _is_sharded(tensor: Tensor | None) -> bool:
    return type(tensor).__module__.startswith("torch.distributed.")


def is_ordinary(tensor: Tensor | None) -> bool:
    """Return whether ``tensor`` is none, or of no class of a library's own."""
    return (
        tensor is None
        or type(tensor) is nn.Parameter
        or type(tensor) is Tensor
        or isinstance(tensor, (FakeTensor, FunctionalTensor))
    )


def has_hooks(module: nn.Module) -> bool:
    """Return whether ``module`` itself has hooks of any sort, or another forward than its class."""
    return "forward" in module.__dict__ or any(getattr(module, name) for name in HOOKS)


def has_user_hooks(module: nn.Module) -> bool:
    """Return whether hooks or another forward of the user's may use or change what ``module`` computes.

    Those that only prepare its weights don't count.
    """
    if "forward" in module.__dict__ and not _is_of(getattr(module, "_hf_hook", None), WEIGHT_HOOKS):
        return True
    return any(not _is_of(hook, WEIGHT_HOOKS) for name in HOOKS for hook in getattr(module, name).values())


def has_global_hooks() -> bool:
    """Return whether there are hooks on all modules that may change what they compute."""
    by_sort = [getattr(torch_module, name) for name in _GLOBAL_HOOKS]
    return any(by_sort) and any(not _is_of(hook, WATCHERS) for hooks in by_sort for hook in hooks.values())


def has_weight_hooks(module: nn.Module) -> bool:
    """Return whether hooks bring the weights of ``module`` to where they are needed, or compute them."""
    return any(_is_of(hook, WEIGHT_HOOKS) for name in HOOKS for hook in getattr(module, name).values())


def _is_of(hook: Any, packages: tuple[str, ...]) -> bool:
    owner = getattr(hook, "__self__", hook)  # of a method
    return type(owner).__module__.startswith(packages)


def is_active_dropout(module: nn.Module) -> bool:
    """Return whether ``module`` itself is a dropout that is on."""
    if not module.training:
        return False
    if isinstance(module, DropPath):
        return module.drop_prob > 0
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def weights_of(module: nn.Module, most: int | None = None) -> list[Tensor]:
    """Return the floating-point parameters of ``module``, also of a replica, which has them as attributes.

    Args:
        module: any.
        most: stop after this many.
    """
    found: list[Tensor] = []
    for part in module.modules():
        replica = "_is_replica" in part.__dict__
        for value in part.__dict__.values() if replica else part._parameters.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                found.append(value)
        if most is not None and len(found) >= most:
            return found[:most]
    return found


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have ``module`` in eval mode within the ``with`` block; then each part gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class Once(Generic[Answer]):
    """A question about a module, asked again when the module, or anything within it, has changed.

    Noticed is what ``is_plain`` and ``token_mixing_reason`` read: classes and their forwards, submodules,
    kinds of parameters, hooks, dropouts; global hooks are not. Nothing is kept while something is compiled.

    Args:
        ask: the question.
        read: further attributes that the answer depends on.
    """

    def __init__(
        self, ask: Callable[[Any], Answer], read: Callable[[Any], Sequence[Any]] | None = None
    ) -> None:
        self._ask = ask
        self._read = read
        self._known: WeakKeyDictionary[nn.Module, tuple[Answer, Sequence[Any], _Unchanged]] = (
            WeakKeyDictionary()
        )

    def __call__(self, module: Any) -> Answer:
        """Return the answer for ``module``."""
        if torch.compiler.is_compiling():
            return self._ask(module)
        read = () if self._read is None else self._read(module)
        known = self._known.get(module)
        if known is not None:
            answer, then, unchanged = known
            if all(map(operator.is_, read, then)) and unchanged.holds():
                return answer
        answer = self._ask(module)
        self._known[module] = answer, read, _Unchanged(module)
        return answer


class _Unchanged:
    """A module and all within it as they were.

    Modules are held weakly, parameters not at all: nothing that is replaced is kept alive, and a parameter
    with a weak reference could not be swapped (torch.utils.swap_tensors).
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        noted = _noted(modules)
        self._noted = None if noted is None else noted[:-1]
        if noted is None:
            return
        self._modules = [weakref.ref(part) for part in modules]
        self._parts = [_none if part is None else weakref.ref(part) for part in noted[-1]]
        classes: set[Any] = {
            base for cls in {type(part) for part in modules} for base in (cls, *_ANCESTORS.get(cls, ()))
        }
        self._forwards = [(cls, cls.forward) for cls in classes]

    def holds(self) -> bool:
        """Return whether all is as it was; False also where a part has hooks or a forward of its own."""
        if self._noted is None:
            return False
        modules = [ref() for ref in self._modules]
        noted = None if None in modules else _noted(modules)
        return (
            noted is not None
            and noted[:-1] == self._noted
            and all(map(operator.is_, noted[-1], [ref() for ref in self._parts]))
            and all(cls.forward is forward for cls, forward in self._forwards)
        )


def _none() -> None:
    """Stand in for a weak reference to None."""


def _noted(modules: list[Any]) -> tuple[list[Any], ...] | None:
    """Return classes, dropouts that may be on, names, classes of parameters, and submodules.

    None where a module has hooks or a forward of its own.
    """
    names: list[str] = []
    dropouts: list[Any] = []
    classes: list[type] = []
    parts: list[nn.Module | None] = []
    try:
        for module in modules:
            own = module.__dict__
            if (
                "forward" in own
                or own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                return None
            if own["training"]:
                dropouts += id(module), own.get("p"), own.get("drop_prob")
            if own["_modules"]:
                names += own["_modules"]
                parts += own["_modules"].values()
            if own["_parameters"]:
                names += own["_parameters"]
                classes += map(type, own["_parameters"].values())
    except KeyError:  # a module of torch.jit, which keeps these things elsewhere
        return None
    return list(map(type, modules)), dropouts, names, classes, parts


remember_forward(*BY_TOKEN)


class Enclosing:
    """A mixin for modules that run a function of others within their own call.

    What surrounds the call of a module (hooks that gather, move or compute its weights) then surrounds that
    function, which may use the module's parts in its own way.
    """

    def forward(self, *args: Any, within: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Run the module's own forward; or, with ``within``, ``within(self, *args)``."""
        if within is not None:
            return within(self, *args)
        return super().forward(*args, **kwargs)  # type: ignore[misc]  # of the class that it is mixed with

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        state = super().__reduce_ex__(2)[2]  # Python 3.10 has no __getstate__
        return _restore, (class_of(self),), state


def enclosing(module: nn.Module) -> nn.Module:
    """Make ``module`` Enclosing; returns it."""
    if not isinstance(module, Enclosing):
        module.__class__ = _enclosing_class(type(module))
    return module


def call_within(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(module, *args)``, run within a call of ``module``."""
    return enclosing(module)(*args, within=function)


_ENCLOSING: dict[type, type] = {}


def _enclosing_class(cls: type) -> type:
    if cls not in _ENCLOSING:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _ENCLOSING[cls] = type(cls.__name__, (Enclosing, cls), names)
    return _ENCLOSING[cls]


def class_of(module: object) -> type:
    """Return the class of ``module``, or the one that it had before ``enclosing``."""
    mro = type(module).__mro__
    return mro[mro.index(Enclosing) + 1] if Enclosing in mro else mro[0]


def _restore(cls: type) -> nn.Module:
    restored = _enclosing_class(cls)
    module: nn.Module = restored.__new__(restored)  # type: ignore[call-overload]
    return module


def share_tensors(module: nn.Module, own: Iterable[nn.Module]) -> nn.Module:
    """A copy of ``module`` whose parameters are its own, frozen, but share their memory with the original's.

    The copy has its own tree of modules, so that whatever is done to one (another submodule, hooks,
    requires_grad, another device or size) leaves the other as it is. In-place changes of a frozen weight show
    in both.

    Args:
        module: what to copy.
        own: submodules of which the copy gets memory of its own.
    """
    owned = {id(t) for part in own for t in chain(part.parameters(), part.buffers())}
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        if id(parameter) not in owned:
            memo[id(parameter)] = _frozen_view(parameter)
    for buffer in module.buffers():
        if id(buffer) not in owned:
            memo[id(buffer)] = buffer
    return copy.deepcopy(module, memo)


def _frozen_view(parameter: nn.Parameter) -> nn.Parameter:
    if type(parameter) is nn.Parameter or is_wrapper(parameter):
        return nn.Parameter(parameter.detach(), requires_grad=False)
    return parameter  # the quantised weights of some libraries carry more than data
