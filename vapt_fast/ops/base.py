"""What an op is: described once, whatever computes it.

An op is a folder. Its ``op.py`` has the public function, which checks what it is given, and an ``Op``:
the arguments, what is computed from them, what is kept for the backward, what has a gradient, and what was
measured. Beside it lie the implementations, one file each:

- ``torch.py``: ``compute(args)``, in PyTorch operations that autograd differentiates. The definition.
- ``triton.py``, ``cuda.py``, ...: ``forward(args, out)``, ``backward(saved, grad_results, grads)`` and
  ``unsupported_reasons(args)``. They write into tensors that the op has allocated.

All of them run without autocast: the public functions have cast what it would cast.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend as backends
from . import device as devices
from .autocast import without_autocast
from .autograd import Kernels, as_tuple, define, num_tensors
from .measurement import KNOWN, Measurement
from .plan import PLANS, TENSORS, describe, is_watched, make_plan

__all__ = ["OPS", "Op", "Signature", "empty_like", "is_recorded", "is_transformed", "or_zeros"]


OPS: dict[str, Op] = {}
"""All ops that have kernels, by name."""


class Signature(NamedTuple):
    """The tuples of an op, each a NamedTuple.

    Their fields are tensors, or None, and after them numbers, names and dtypes; the schema in
    ``torch.library`` is read off their annotations.

    Attributes:
        arguments: what an implementation is given. The first field is a tensor on the op's device.
        outputs: what kernels write: the results, then what is kept for the backward.
        saved: what the backward reads.
        gradients: what the backward writes.
    """

    arguments: Any
    outputs: Any
    saved: Any
    gradients: Any


class Op:
    """The description of an op; one instance for each op.

    Attributes:
        name: of its folder, and in ``torch.ops.vapt_fast``.
        folder: where its implementations are, if not in the folder of its name.
        num_results: how many of the outputs are results, which may be differentiated; the others are kept.
        measured: where an implementation was found to be faster than PyTorch; the first that fits is taken.
        signature: its tuples, called args, out, saved and grads below.
        differentiable: the arguments that have a gradient, if they are not the fields of the gradients.
            Kernels refuse any other tensor that requires one.
    """

    name: ClassVar[str]
    folder: ClassVar[str | None] = None
    num_results: ClassVar[int] = 1
    measured: ClassVar[tuple[Measurement, ...]] = ()
    signature: ClassVar[Signature]
    differentiable: ClassVar[tuple[str, ...]] = ()

    def check(self, args: Any) -> Any:
        """``args`` as implementations take them, of other dtypes and other numbers at most.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        """
        raise NotImplementedError

    def check_values(self, args: Any) -> None:
        """Raise where a tensor of ``args``, which are checked, holds values that it must not.

        Unlike ``check`` it runs in every call.

        Raises:
            ValueError: values out of range.
        """

    def allocate(self, args: Any) -> Any:
        """The outputs, not yet computed: shapes, dtypes and strides."""
        raise NotImplementedError

    def save(self, args: Any, out: Any) -> Any:
        """What is saved of a forward pass."""
        raise NotImplementedError

    def allocate_gradients(self, saved: Any, needed: Collection[str]) -> Any:
        """The gradients, not yet computed; None where ``needed``, names of arguments, lacks them."""
        raise NotImplementedError

    def gradients_of_arguments(
        self, saved: Any, grads: Any, needed: Collection[str]
    ) -> dict[str, Tensor | None]:
        """The gradients by names of arguments: those of the same names, unless an op says otherwise."""
        return grads._asdict()

    # ---- running

    def __init__(self) -> None:
        OPS[self.name] = self
        folder = Path(__file__).with_name(self.folder or self.name)
        names = (name for name in backends.BACKENDS if name != "torch")
        # Those that have a file.
        self.implementations = tuple(name for name in names if (folder / f"{name}.py").exists())
        hints = get_type_hints(self.signature.arguments)
        self._num_tensors = num_tensors(hints)
        saved = get_type_hints(self.signature.saved)
        self.num_saved_tensors = num_tensors(saved)
        differentiable = self.differentiable or self.signature.gradients._fields
        self._frozen = tuple(name for name in tuple(hints)[: self._num_tensors] if name not in differentiable)
        self.library_op = define(self, hints, saved)

    def __call__(self, backend: str | None, args: Any) -> tuple[Tensor, ...]:
        """The results of ``args`` as a user gave them.

        Args:
            backend: the name of a backend or of an implementation; None for the current one.
            args: the arguments, not checked.

        Raises:
            TypeError, ValueError: see ``check``; ``backend`` is no such name, or is "reference", the whole
                model's.
            BackendUnavailableError: it was named and can't run here, or not with these arguments.
        """
        if is_watched() or forward_ad._current_level >= 0:
            return self._run_recorded(backend, self.check(args))
        name = backends.resolve() if backend is None else backend
        described = describe(args, self._num_tensors) if isinstance(name, str) else None
        if described is None:
            return self._run_recorded(name, self.check(args))
        key = (self.name, name, *described)
        plan = PLANS.get(key)
        if plan is None:
            checked = self.check(args)
            plan = make_plan(key, args, checked, self._num_tensors, self.choose(name, checked))
        tensors = args[: self._num_tensors]
        if plan.casts:
            tensors = list(tensors)
            for index, dtype in plan.casts:
                tensors[index] = tensors[index].to(dtype)
        args = self.signature.arguments(*tensors, *plan.options)
        if described[0] is not None:  # autocast is on
            with without_autocast(args[0].device.type):
                return self._run(plan.implementation, args, plan.differentiable)
        return self._run(plan.implementation, args, plan.differentiable)

    def _run(self, implementation: str, args: Any, differentiable: bool) -> tuple[Tensor, ...]:
        """The results in an ordinary call, without autocast."""
        self.check_values(args)
        if implementation == "torch":
            return self.compute(args)
        if differentiable:
            return Kernels.apply(self, implementation, *args)
        return self.forward(implementation, args)[: self.num_results]

    def _run_recorded(self, backend: str | None, args: Any) -> tuple[Tensor, ...]:
        """The results where someone may record or transform the call; ``args`` are checked."""
        implementation = self.choose(backend, args)
        with without_autocast(args[0].device.type):
            if implementation != "torch" and forward_ad._current_level >= 0:
                self._refuse_tangents(args)
            if implementation == "torch" or not is_recorded(args[0]):
                return self._run(implementation, args, torch.is_grad_enabled())
            return as_tuple(self.library_op(*args, implementation))[: self.num_results]

    def load(self, implementation: str) -> ModuleType:
        """The module of an implementation; imported only now, because its library may be missing."""
        _import(self.name, implementation)
        return getattr(self, f"_{implementation}")

    def _loaded(self, implementation: str) -> Any:
        """The same where nothing is compiled."""
        return self.__dict__.get(f"_{implementation}") or self.load(implementation)

    def forward(self, implementation: str, args: Any) -> Any:
        """Run the kernels of ``implementation`` and return the outputs."""
        out = self.allocate(args)
        self.write(implementation, args, out)
        return out

    def backward(self, implementation: str, saved: Any, grad_results: tuple, needed: Collection[str]) -> Any:
        """Run the backward kernels of ``implementation`` and return the gradients."""
        grads = self.allocate_gradients(saved, needed)
        self.write_gradients(implementation, saved, grad_results, grads)
        return grads

    # What an implementation is asked. An op on joint tensors hands it views instead.

    def compute(self, args: Any) -> tuple[Tensor, ...]:
        """The results by PyTorch's operations."""
        return self.load("torch").compute(args)

    def write(self, implementation: str, args: Any, out: Any) -> None:
        """Run the kernels of the forward pass."""
        self._loaded(implementation).forward(args, out)

    def write_gradients(self, implementation: str, saved: Any, grad_results: tuple, grads: Any) -> None:
        """Run the kernels of the backward pass."""
        self._loaded(implementation).backward(saved, grad_results, grads)

    def implementation_reasons(self, implementation: str, args: Any) -> list[str]:
        """Every reason why the implementation can't take ``args``, in its own words."""
        return self.load(implementation).unsupported_reasons(args)

    def _refuse_tangents(self, args: Any) -> None:
        tensors = [t for t in args if isinstance(t, Tensor)]
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(
                f"{self.name} has no forward-mode derivative: its backward is written by hand. "
                'Use vapt_fast.use_backend("reference") for forward-mode derivatives'
            )

    # ---- choosing

    def choose(self, backend: str | None, args: Any) -> str:
        """The implementation that runs, see ``__call__``."""
        known = ("torch", *self.implementations)
        name = backends.resolve() if backend is None else backends.check_backend(backend, also=known)
        if name == "reference":
            raise ValueError(
                f"{self.name} has no backend 'reference', which is that of a whole model: give the op "
                "backend='torch', or call a model within vapt_fast.use_backend('reference')"
            )
        if name == "auto":
            return self._fastest(args)
        if name not in self.implementations:
            return "torch"
        reasons = devices.unsupported_reasons(name, args[0].device) or self.unsupported_reasons(name, args)
        if reasons:
            raise backends.BackendUnavailableError(
                f"{self.name} can't run on backend {name!r}: " + "; ".join(reasons)
            )
        return name

    def unsupported_reasons(self, implementation: str, args: Any) -> list[str]:
        """Every reason why the kernels of ``implementation`` can't take ``args``; empty if they can."""
        reasons = self.implementation_reasons(implementation, args)
        if torch.is_grad_enabled():
            for name in self._frozen:
                tensor = getattr(args, name)
                if tensor is not None and tensor.requires_grad:
                    reasons.append(f"its kernels have no gradient of {name}, which must not require one")
        return reasons

    def _fastest(self, args: Any) -> str:
        """The first implementation that was measured to be faster here and can run, else "torch"."""
        device = args[0].device
        if device.type != "cuda" or not self.measured or is_transformed():
            return "torch"
        capability = devices.capability(device)
        if capability not in KNOWN:
            backends.warn_once(
                f"{self.name} runs on PyTorch's operations: nothing is known of GPUs of compute capability "
                f"{capability[0]}.{capability[1]}. backend='triton' tries Triton's kernels"
            )
            return "torch"
        for entry in self.measured:
            if capability in entry.capabilities and entry.fits(args):
                name = entry.implementation
                missing = devices.unavailable_reasons(name)
                if missing:
                    backends.warn_once(
                        f"backend {name!r}, the fastest on this GPU, can't run: " + "; ".join(missing)
                    )
                elif not self.unsupported_reasons(name, args):
                    return name
        return "torch"


@torch.compiler.assume_constant_result  # torch.compile can't trace an import by name, nor return a module
def _import(name: str, implementation: str) -> None:
    """Make the module of an implementation an attribute of the op ``name``."""
    op = OPS[name]
    if not hasattr(op, f"_{implementation}"):
        module = importlib.import_module(f"{__package__}.{op.folder or name}.{implementation}")
        setattr(op, f"_{implementation}", module)


def is_transformed() -> bool:
    """Whether forward-mode derivatives or a transform of torch.func are under way, which no kernel serves."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def is_recorded(tensor: Tensor) -> bool:
    """Whether someone records the calls of ops: then they must be those in torch.library.

    Else it need not, which saves the host's time: each such op costs it up to 350 microseconds.
    """
    return type(tensor) not in TENSORS or is_watched()


# ---- what implementations share


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of the same shape, not initialised."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def or_zeros(grad: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``grad``, or zeros in the shape of ``like`` where there is none."""
    if grad is not None:
        return grad
    return like.new_zeros(like.shape, dtype=dtype)
