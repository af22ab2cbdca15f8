"""A shadow of the memory that kernels touch in Triton's interpreter: bounds, races, what nobody has written.

The interpreter itself loads and stores wherever it is told to. Within ``with shadow() as findings`` each
pointer carries the number of the argument it comes from in its upper bits, which addresses of this machine
don't use, and every lane of every load and store is checked:

- out of bounds: the address is not that of an element of this argument. Elements are those of the view, so
  the padding between its rows, or another tensor's element next to it, is out of bounds too;
- race: two programs, or two lanes of one store, write the same element, or a program reads what was written
  in the same launch or writes what another one reads: on a GPU any order is possible;
- uninitialised: the element was made by torch.empty and nobody has written it;
- hole: such an element of an argument that nobody has written in the whole ``with`` block. Outputs have none,
  and neither has scratch memory that is no larger than it needs to be.

Atomics raise: they add up in another order every time.

Lanes that are out of bounds are left out, so that the kernel goes on and the process survives.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import vapt_fast.kernels
from torch import Tensor
from triton.runtime import interpreter

__all__ = ["Finding", "no_overflow", "shadow"]

# What torch.empty is filled with, by bytes of an element: quiet NaNs (two bytes: of both dtypes) that no
# computation makes. Memory is written where it holds anything else, whoever wrote it.
UNWRITTEN = {2: 0x7FDA, 4: 0x7FDA5A5A, 8: 0x7FFDA5A5A5A5A5A5}
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}

ADDRESS_BITS = 48
NOBODY, SEVERAL = -1, -2


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. ``index`` is the element's, or how many elements it lies behind the first."""

    kind: str
    kernel: str
    argument: str
    index: tuple[int, ...] | int
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.kernel}, {self.argument}[{self.index}] {self.detail}"


@dataclass
class _View:
    """An argument: its name, and the address of each of its elements."""

    name: str
    tensor: Tensor
    addresses: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        offsets = np.zeros(self.tensor.shape, np.int64)
        for dim, (size, stride) in enumerate(zip(self.tensor.shape, self.tensor.stride(), strict=True)):
            along = np.arange(size, dtype=np.int64) * stride
            offsets += along.reshape(-1, *[1] * (self.tensor.ndim - dim - 1))
        self.addresses = (self.tensor.data_ptr() + offsets * self.tensor.itemsize).astype(np.uint64)

    def index_of(self, address: int) -> tuple[int, ...] | int:
        found = np.argwhere(self.addresses == address)
        if len(found):
            return tuple(found[0].tolist())
        return (address - self.tensor.data_ptr()) // self.tensor.itemsize


class _Launch:
    """The elements that one launch may touch, and which program has read and written each of them."""

    def __init__(self, kernel: str, names: Iterator[str], findings: list[Finding]) -> None:
        self.kernel, self.names, self.findings = kernel, names, findings
        self.views: list[_View] = []

    def tag(self, tensor: Tensor) -> int:
        """What is added to the tensor's address."""
        self.views.append(_View(next(self.names), tensor))
        return len(self.views) << ADDRESS_BITS

    def start(self) -> None:
        self.elements = np.unique(np.concatenate([view.addresses.ravel() for view in self.views]))
        self.belongs = np.zeros((len(self.views), len(self.elements)), bool)
        for belongs, view in zip(self.belongs, self.views, strict=True):
            belongs[np.searchsorted(self.elements, view.addresses.ravel())] = True
        self.reader = np.full(len(self.elements), NOBODY)
        self.writer = np.full(len(self.elements), NOBODY)

    def locate(self, pointers: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, ...]:
        """Addresses, numbers of arguments, positions in ``elements``, and ``mask`` where it is in bounds."""
        if not hasattr(self, "elements"):
            self.start()
        addresses = pointers & np.uint64((1 << ADDRESS_BITS) - 1)
        argument = (pointers >> np.uint64(ADDRESS_BITS)).astype(np.int64) - 1
        inside = np.zeros(pointers.shape, bool)
        position = np.zeros(pointers.shape, np.int64)
        if len(self.elements):
            position = np.searchsorted(self.elements, addresses).clip(max=len(self.elements) - 1)
            inside = (self.elements[position] == addresses) & (argument < len(self.views))
            inside[inside] &= self.belongs[argument[inside], position[inside]]
        return addresses, argument, position, mask.astype(bool) & inside

    def report(self, kind: str, which: np.ndarray, addresses, argument, detail) -> None:
        """Add a finding for the first lane of ``which``, unless there is one of its kind and argument."""
        if not which.any():
            return
        lane = tuple(np.argwhere(which)[0])
        view = self.views[argument[lane]] if 0 <= argument[lane] < len(self.views) else None
        name = view.name if view else "no argument"
        if not any((kind, self.kernel, name) == (f.kind, f.kernel, f.argument) for f in self.findings):
            index = view.index_of(int(addresses[lane])) if view else int(addresses[lane])
            self.findings.append(Finding(kind, self.kernel, name, index, detail(lane)))

    def load(self, real, pointers, mask, other, dtype) -> np.ndarray:
        program = _program()
        addresses, argument, position, inside = self.locate(pointers, mask)
        self.report("out of bounds", mask & ~inside, addresses, argument, lambda _: f"read by {program}")
        values = real(addresses, inside, other, dtype)
        if len(self.elements):
            writer = self.writer[position]
            self.report(
                "race",
                inside & (writer != NOBODY),
                addresses,
                argument,
                lambda lane: f"read by {program}, written by {writer[lane]}",
            )
            at = position[inside]
            self.reader[at] = np.where(np.isin(self.reader[at], (NOBODY, program)), program, SEVERAL)
        if values.dtype.itemsize in UNWRITTEN:
            unwritten = values.view(UNSIGNED[values.dtype.itemsize]) == UNWRITTEN[values.dtype.itemsize]
            self.report(
                "uninitialised", inside & unwritten, addresses, argument, lambda _: f"read by {program}"
            )
        return values

    def store(self, real, pointers, values, mask) -> None:
        program = _program()
        addresses, argument, position, inside = self.locate(pointers, mask)
        self.report("out of bounds", mask & ~inside, addresses, argument, lambda _: f"written by {program}")
        if len(self.elements):
            twice = np.zeros(mask.shape, bool)
            written, count = np.unique(position[inside], return_counts=True)
            twice[inside] = np.isin(position[inside], written[count > 1])
            self.report(
                "race",
                twice,
                addresses,
                argument,
                lambda _: f"written by two lanes of one store of {program}",
            )
            for others, verb in ((self.writer[position], "written"), (self.reader[position], "read")):
                self.report(
                    "race",
                    inside & ~np.isin(others, (NOBODY, program)),
                    addresses,
                    argument,
                    lambda lane, others=others, verb=verb: (
                        f"written by {program}, {verb} by {_named(others[lane])}"
                    ),
                )
            self.writer[position[inside]] = program
        real(addresses, values, inside)


def _no_atomics(*args: Any) -> NoReturn:
    raise RuntimeError("an atomic operation, whose results depend on the order of programs")


def _named(program: int) -> str:
    return "several" if program == SEVERAL else str(program)


def _program() -> int:
    (x, y, z), (nx, ny, _) = (
        interpreter.interpreter_builder.grid_idx,
        interpreter.interpreter_builder.grid_dim,
    )
    return x + nx * (y + ny * z)


def _tensors(name: str, value: Any) -> Iterator[str]:
    """The name of each tensor in an argument, in order."""
    if isinstance(value, tuple):
        for position, member in enumerate(value):
            yield from _tensors(f"{name}[{position}]", member)
    elif isinstance(value, Tensor):
        yield name.removesuffix("[0]")


@contextmanager
def shadow() -> Iterator[list[Finding]]:
    """Findings of all launches in the ``with`` block; complete, with the holes, when it ends."""
    findings: list[Finding] = []
    launches: list[_Launch] = []
    fresh: list[Tensor] = []
    owners: dict[int, tuple[str, _View]] = {}  # of the fresh tensors' storages
    convert = interpreter._implicit_cvt

    class Executor(interpreter.GridExecutor):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            given = {name: value for name, value in kwargs.items() if name in self.arg_names}
            bound = inspect.getcallargs(self.fn, *args, **given)
            names = [name for key, value in bound.items() for name in _tensors(key, value)]
            launches.append(_Launch(self.fn.__name__, iter(names), findings))
            try:
                super().__call__(*args, **kwargs)
            finally:
                launch = launches.pop()
                for view in launch.views:
                    owners.setdefault(view.tensor.untyped_storage().data_ptr(), (launch.kernel, view))

        def _restore_args_dev(self, *args: Any) -> None:
            """Nothing to do, and much where the memory is large: tensors on the CPU are not copied."""

    def tagged(arg: Any) -> Any:
        converted = convert(arg)
        if isinstance(arg, Tensor):
            converted.handle.data = converted.handle.data + np.uint64(launches[-1].tag(arg))
        return converted

    def unwritten(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if type(tensor) is Tensor and tensor.is_floating_point() and tensor.numel():
                _bits(tensor).fill_(UNWRITTEN[tensor.itemsize])
                fresh.append(tensor)
            return tensor

        return made

    memory = interpreter._interpreter
    load, store = memory.load, memory.store
    with ExitStack() as patches:
        for owner, name, replacement in (
            (interpreter, "GridExecutor", Executor),
            (interpreter, "_implicit_cvt", tagged),
            (memory, "load", lambda *args: launches[-1].load(load, *args)),
            (memory, "store", lambda *args: launches[-1].store(store, *args)),
            (memory, "atomic_rmw", _no_atomics),
            (memory, "atomic_cas", _no_atomics),
            (torch, "empty", unwritten(torch.empty)),
            (torch, "empty_like", unwritten(torch.empty_like)),
            (torch, "empty_strided", unwritten(torch.empty_strided)),
            (Tensor, "new_empty", unwritten(Tensor.new_empty)),
        ):
            patches.enter_context(mock.patch.object(owner, name, replacement))
        yield findings
    for tensor in fresh:
        storage = tensor.untyped_storage().data_ptr()
        holes = (_bits(tensor) == UNWRITTEN[tensor.itemsize]).nonzero()
        if len(holes) and storage in owners:
            kernel, view = owners[storage]
            index = view.index_of(storage + int(holes[0]) * tensor.itemsize)
            detail = f"is one of {len(holes)} that nobody has written"
            findings.append(Finding("hole", kernel, view.name, index, detail))


def _bits(tensor: Tensor) -> Tensor:
    """All of the tensor's storage as integers."""
    return torch.tensor([], dtype=SIGNED[tensor.itemsize]).set_(tensor.untyped_storage())


@contextmanager
def no_overflow() -> Iterator[None]:
    """Integer arithmetic of kernels that leaves its type's range, 32 bits for example, raises.

    The variables of their loops have the type of the bounds, as on a GPU; the interpreter's own are Python's.
    """
    builder = interpreter.interpreter_builder
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(builder, "options", replace(builder.options, debug=True)))
        for found in iter_modules(vapt_fast.kernels.__path__):
            module = import_module(f"vapt_fast.kernels.{found.name}")
            patches.enter_context(mock.patch.object(module, "range", _typed_range, create=True))
        yield


def _typed_range(*bounds: Any) -> Iterator[Any]:
    tensors = [bound for bound in bounds if isinstance(bound, tl.tensor)]
    for number in range(*map(operator.index, bounds)):
        yield sum((0 * tensor for tensor in tensors), number)
