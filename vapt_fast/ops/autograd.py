"""Ops as autograd sees them, in eager mode and in torch.library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .autocast import without_autocast

if TYPE_CHECKING:
    from .base import Op

__all__ = ["Kernels", "as_tuple", "define", "differentiable_once", "num_tensors", "placeholder"]


def _setup_context(op: Op, ctx: Any, implementation: str, args: Any, output: Any) -> None:
    # No zeros for outputs that nobody used: autograd would write them in each backward.
    ctx.set_materialize_grads(False)
    saved = op.save(args, output)
    ctx.save_for_backward(*saved[: op.num_saved_tensors])
    ctx.numbers = saved[op.num_saved_tensors :]
    ctx.implementation = implementation


@cache
def _needed(fields: tuple[str, ...], needed: tuple[bool, ...]) -> frozenset[str]:
    """The names of the arguments whose gradients are needed."""
    return frozenset(name for name, need in zip(fields, needed, strict=True) if need)


def _grad_inputs(
    op: Op, ctx: Any, grad_outputs: tuple, needed: tuple[bool, ...], backward: Callable[..., Any]
) -> list[Tensor | None]:
    """The gradients of all arguments; ``backward`` as Op.backward."""
    fields, results = op.signature.arguments._fields, grad_outputs[: op.num_results]
    grad = next((grad for grad in results if grad is not None), None)
    if grad is None:
        return [None] * len(fields)
    saved = op.signature.saved(*ctx.saved_tensors, *ctx.numbers)
    names = _needed(fields, needed)

    def compute() -> list[Tensor | None]:
        by_name = op.gradients_of_arguments(saved, backward(ctx.implementation, saved, results, names), names)
        return [by_name.get(name) if name in names else None for name in fields]

    if not (torch.is_grad_enabled() or torch.is_autocast_enabled(grad.device.type)):  # as a rule
        return compute()
    with torch.no_grad(), without_autocast(grad.device.type):
        grads = compute()
    return differentiable_once(op.name, grads, [t for t in (*saved, *results) if isinstance(t, Tensor)])


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


class Kernels(torch.autograd.Function):
    """An op's kernels as autograd sees them in eager mode."""

    # Without setup_context, for which autograd would inspect the signature in each call.
    @staticmethod
    def forward(ctx: Any, op: Op, implementation: str, *args: Any) -> tuple[Tensor, ...]:
        """Return the results."""
        arguments = op.signature.arguments(*args)
        output = op.forward(implementation, arguments)
        ctx.op = op
        _setup_context(op, ctx, implementation, arguments, output)
        return tuple(output[: op.num_results])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        """Return the gradients of all inputs."""
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


def define(op: Op, arguments: dict[str, Any], saved: dict[str, Any]) -> Any:
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
        *values, _ = args
        return as_tensors(op.allocate(types.arguments(*values)))

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
        outputs = types.outputs(*as_tuple(output))
        ctx.mark_non_differentiable(*outputs[op.num_results :])
        _setup_context(op, ctx, implementation, types.arguments(*args), outputs)

    def differentiate(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        def call(implementation: str, kept: Any, grad_results: tuple, names: set[str]) -> Any:
            needed = [name in names for name in types.arguments._fields]
            result = as_tuple(backward_op(*grad_results, *kept, needed, implementation))
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


def num_tensors(hints: dict[str, Any]) -> int:
    """How many of the fields are tensors; they have to be the first ones."""
    tensors = [_SCHEMA[hint].startswith("Tensor") for hint in hints.values()]
    assert tensors == sorted(tensors, reverse=True), f"tensors come first, got {tuple(hints)}"
    return sum(tensors)


def placeholder(like: Tensor) -> Tensor:
    """A tensor of (0,), in place of what there is none of: an op of torch.library has to return tensors.

    It also must not return an input, or the same tensor twice.
    """
    return like.new_empty(0)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """What an op of torch.library returned: a tensor, where there is one, or a tuple or list."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
