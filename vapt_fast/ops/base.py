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
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend as backends
from . import device as devices
from .autocast import without_autocast
from .measurement import Measurement

__all__ = [
    "OPS",
    "Op",
    "Signature",
    "differentiable_once",
    "empty_like",
    "is_recorded",
    "is_transformed",
    "or_zeros",
    "placeholder",
]


OPS: dict[str, Op] = {}
"""All ops that have kernels, by name."""


class Signature(NamedTuple):
    """The tuples of an op, each a NamedTuple.

    Their fields are tensors, tensors or None, or numbers, names and dtypes; the schema in ``torch.library``
    is read off their annotations.

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

    def allocate(self, args: Any, implementation: str) -> Any:
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
        self._tensors = tuple(name for name, hint in hints.items() if _SCHEMA[hint].startswith("Tensor"))
        saved = get_type_hints(self.signature.saved)
        self._saved_tensors = tuple(_SCHEMA[hint].startswith("Tensor") for hint in saved.values())
        differentiable = self.differentiable or self.signature.gradients._fields
        self._frozen = tuple(name for name in self._tensors if name not in differentiable)
        self.library_op = _define(self, hints, saved)

    def run(self, backend: str | None, args: Any) -> tuple[Tensor, ...]:
        """The results.

        Args:
            backend: the name of a backend or of an implementation; None for the current one.
            args: the arguments, validated.

        Raises:
            TypeError, ValueError: ``backend`` is no such name, or is "reference", the whole model's.
            BackendUnavailableError: it was named and can't run here, or not with these arguments.
        """
        implementation = self.choose(backend, args)
        with without_autocast(args[0].device.type):
            if implementation == "torch":
                return self.compute(args)
            if forward_ad._current_level >= 0:
                self._refuse_tangents(args)
            if is_recorded(args[0]):
                outputs = _as_tuple(self.library_op(*args, implementation))
            elif torch.is_grad_enabled():
                outputs = _Kernels.apply(self, implementation, *args)
            else:
                outputs = self.forward(implementation, args)
            return outputs[: self.num_results]

    def load(self, implementation: str) -> ModuleType:
        """The module of an implementation; imported only now, because its library may be missing."""
        _import(self.name, implementation)
        return getattr(self, f"_{implementation}")

    def forward(self, implementation: str, args: Any) -> Any:
        """Run the kernels of ``implementation`` and return the outputs."""
        out = self.allocate(args, implementation)
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
        self.load(implementation).forward(args, out)

    def write_gradients(self, implementation: str, saved: Any, grad_results: tuple, grads: Any) -> None:
        """Run the kernels of the backward pass."""
        self.load(implementation).backward(saved, grad_results, grads)

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
        """The implementation that runs, see ``run``."""
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
        if all(capability not in entry.capabilities for entry in self.measured):
            backends.warn_once(
                f"{self.name} runs on PyTorch's operations: nothing is known of GPUs of compute capability "
                f"{capability[0]}.{capability[1]}. backend='triton' or 'cuda' tries the kernels"
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
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.jit.is_tracing()
    )


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """What an op of torch.library returned: a tensor, where there is one, or a tuple or list."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# ---- what implementations share


def placeholder(like: Tensor) -> Tensor:
    """A tensor of (0,), in place of what there is none of: an op of torch.library has to return tensors.

    It also must not return an input, or the same tensor twice.
    """
    return torch.empty(0, dtype=like.dtype, device=like.device)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of the same shape, not initialised."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)


def or_zeros(grad: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``grad``, or zeros in the shape of ``like`` where there is none."""
    if grad is not None:
        return grad
    return torch.zeros(like.shape, dtype=dtype or like.dtype, device=like.device)


# ---- autograd, in eager mode and in torch.library


def _setup_context(op: Op, ctx: Any, implementation: str, args: tuple, output: tuple) -> None:
    # No zeros for outputs that nobody used: autograd would write them in each backward.
    ctx.mark_non_differentiable(*output[op.num_results :])
    ctx.set_materialize_grads(False)
    saved = op.save(op.signature.arguments(*args), op.signature.outputs(*output))
    ctx.save_for_backward(
        *(value for value, is_tensor in zip(saved, op._saved_tensors, strict=True) if is_tensor)
    )
    ctx.numbers = [value for value, is_tensor in zip(saved, op._saved_tensors, strict=True) if not is_tensor]
    ctx.implementation = implementation


def _saved(op: Op, ctx: Any) -> Any:
    tensors, numbers = iter(ctx.saved_tensors), iter(ctx.numbers)
    return op.signature.saved(*(next(tensors if is_tensor else numbers) for is_tensor in op._saved_tensors))


def _grad_inputs(
    op: Op, ctx: Any, grad_outputs: tuple, needed: tuple[bool, ...], backward: Callable[..., Any]
) -> list[Tensor | None]:
    """The gradients of all arguments; ``backward`` as Op.backward."""
    fields, results = op.signature.arguments._fields, grad_outputs[: op.num_results]
    if all(grad is None for grad in results):
        return [None] * len(fields)
    saved = _saved(op, ctx)
    names = {name for name, need in zip(fields, needed, strict=True) if need}
    device = next(grad.device.type for grad in results if grad is not None)
    with torch.no_grad(), without_autocast(device):
        grads = backward(ctx.implementation, saved, results, names)
        by_name = op.gradients_of_arguments(saved, grads, names)
    ordered = [by_name.get(name) if name in names else None for name in fields]
    return differentiable_once(op.name, ordered, [t for t in (*saved, *results) if isinstance(t, Tensor)])


def differentiable_once(
    op: str, grads: Sequence[Tensor | None], constants: Sequence[Tensor] = ()
) -> list[Tensor | None]:
    """``grads`` as a backward returns them, such that differentiating them again raises and names ``op``.

    Args:
        op: its name.
        grads: what was computed.
        constants: what it was computed from without a graph. A hand-written backward takes these for
            constants; without this a second derivative would be silently wrong.
    """
    if not torch.is_grad_enabled():  # nobody asked for a graph of the backward
        return list(grads)
    return [None if grad is None else _Once.apply(op, grad, *constants) for grad in grads]


class _Kernels(torch.autograd.Function):
    """An op's kernels as autograd sees them in eager mode."""

    # Without setup_context, for which autograd would inspect the signature in each call.
    @staticmethod
    def forward(ctx: Any, op: Op, implementation: str, *args: Any) -> tuple[Tensor, ...]:
        output = tuple(op.forward(implementation, op.signature.arguments(*args)))
        ctx.op = op
        _setup_context(op, ctx, implementation, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        grads = _grad_inputs(ctx.op, ctx, grad_outputs, ctx.needs_input_grad[2:], ctx.op.backward)
        return None, None, *grads


_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
}


def _define(op: Op, arguments: dict[str, Any], saved: dict[str, Any]) -> Any:
    """``torch.ops.vapt_fast.<name>`` and ``<name>_backward``, for what records ops; returns the first."""
    name, backward_name = f"vapt_fast::{op.name}", f"vapt_fast::{op.name}_backward"
    types = op.signature
    results = types.outputs._fields[: op.num_results]

    def schema(inputs: list[str], num_outputs: int) -> str:
        outputs = ", ".join(["Tensor"] * num_outputs)
        return (
            f"({', '.join(inputs)}, str implementation) -> {outputs if num_outputs == 1 else f'({outputs})'}"
        )

    def as_tensors(values: tuple) -> Any:
        some = next(value for value in values if value is not None)
        tensors = tuple(placeholder(some) if value is None else value for value in values)
        return tensors if len(tensors) > 1 else tensors[0]

    def forward(*args: Any) -> Any:
        *values, implementation = args
        return as_tensors(op.forward(implementation, types.arguments(*values)))

    def fake(*args: Any) -> Any:
        *values, implementation = args
        return as_tensors(op.allocate(types.arguments(*values), implementation))

    def split(args: tuple) -> tuple[str, Any, tuple, set[str]]:
        *values, needed, implementation = args
        kept = types.saved(*values[len(results) :])
        names = {name for name, need in zip(types.arguments._fields, needed, strict=True) if need}
        return implementation, kept, tuple(values[: len(results)]), names

    def backward(*args: Any) -> Any:
        return as_tensors(op.backward(*split(args)))

    def fake_backward(*args: Any) -> Any:
        _, kept, _, names = split(args)
        return as_tensors(op.allocate_gradients(kept, names))

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        *args, implementation = inputs
        _setup_context(
            op, ctx, implementation, tuple(args), output if isinstance(output, tuple) else (output,)
        )

    def differentiate(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        def call(implementation: str, kept: Any, grad_results: tuple, names: set[str]) -> Any:
            needed = [name in names for name in types.arguments._fields]
            result = _as_tuple(backward_op(*grad_results, *kept, needed, implementation))
            wanted = op.allocate_gradients(kept, names)
            return types.gradients(
                *(r if w is not None else None for r, w in zip(result, wanted, strict=True))
            )

        return *_grad_inputs(op, ctx, grad_outputs, tuple(ctx.needs_input_grad[:-1]), call), None

    forward_inputs = [f"{_SCHEMA[hint]} {field}" for field, hint in arguments.items()]
    torch.library.define(name, schema(forward_inputs, len(types.outputs._fields)))
    backward_inputs = [f"Tensor? grad_of_{field}" for field in results]
    backward_inputs += [f"{_SCHEMA[hint]} {field}" for field, hint in saved.items()]
    torch.library.define(
        backward_name, schema([*backward_inputs, "bool[] needed"], len(types.gradients._fields))
    )
    torch.library.impl(name, "default", forward)
    torch.library.impl(backward_name, "default", backward)
    torch.library.register_fake(name, fake)
    torch.library.register_fake(backward_name, fake_backward)
    torch.library.register_autograd(name, differentiate, setup_context=setup_context)
    backward_op = getattr(torch.ops.vapt_fast, f"{op.name}_backward").default
    return getattr(torch.ops.vapt_fast, op.name).default


class _Once(torch.autograd.Function):
    """A gradient that raises where it is differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, grad: Tensor, *constants: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError(
            f"{ctx.op} can't be differentiated twice: its backward is written by hand. "
            'Use vapt_fast.use_backend("reference") for second derivatives'
        )
