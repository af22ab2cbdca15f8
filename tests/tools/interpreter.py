"""Triton's interpreter with what it computes wrongly put right, and with less to do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

__all__ = ["bfloat16", "only_last_program", "quick_calls", "recorded_launches"]


@contextmanager
def bfloat16() -> Iterator[None]:
    """bfloat16 as a GPU has it: casts round to nearest, arithmetic is in float32 and then rounded.

    The interpreter keeps its bits as integers, computes on these as if they were the numbers, and casts by
    cutting off the lower bits. Casts to e4m3 are
    put right as well: it loses carries into the exponent, and NaN.
    """
    patched = {
        "cast_impl": _cast(InterpreterBuilder.cast_impl),
        "create_fp_to_fp": _cast(InterpreterBuilder.create_fp_to_fp),
        "create_dot": _in_float32(InterpreterBuilder.create_dot),
        "create_fma": _in_float32(InterpreterBuilder.create_fma),
        "binary_op": _in_float32(InterpreterBuilder.binary_op),
        "unary_op": _in_float32(InterpreterBuilder.unary_op),
    }
    with ExitStack() as patches:
        for name, method in patched.items():
            patches.enter_context(mock.patch.object(InterpreterBuilder, name, method))
        yield


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(value: TensorHandle) -> TensorHandle:
    """bfloat16 as float32."""
    bits = torch.from_numpy(np.ascontiguousarray(value.data).view(np.int16))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def _narrow(value: TensorHandle) -> TensorHandle:
    """Any number as bfloat16."""
    rounded = torch.from_numpy(np.ascontiguousarray(value.data)).bfloat16()
    return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _cast(method: Callable) -> Callable:
    def cast(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype, *args: Any) -> TensorHandle:
        if to.scalar == tl.bfloat16:
            return source if _is_bfloat16(source) else _narrow(source)
        if to.scalar == tl.float8e4nv and source.dtype.scalar == tl.float32:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)
        return (
            method(self, source, to, *args) if not _is_bfloat16(source) else _from_float32(self, source, to)
        )

    return cast


def _from_float32(builder: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
    wide = _widen(source)
    return wide if to.scalar == tl.float32 else builder.cast_impl(wide, to)


def _in_float32(method: Callable) -> Callable:
    def compute(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        if not any(map(_is_bfloat16, args)):
            return method(self, *args)
        result = method(self, *(_widen(arg) if _is_bfloat16(arg) else arg for arg in args))
        # The accumulator of a product is wider, and a comparison gives booleans.
        own = _is_bfloat16(args[2] if method is _DOT else args[0]) and result.data.dtype == np.float32
        return _narrow(result) if own else result

    return compute


_DOT = InterpreterBuilder.create_dot


@contextmanager
def quick_calls() -> Iterator[None]:
    """Do once what the interpreter does anew for every call and every tensor, which takes most of the time.

    A kernel's calls of its own functions patch triton.language once a module, which the interpreter never
    undoes; shapes, types of blocks and NumPy's dtypes are kept.
    """
    patched = set()

    def call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    with (
        mock.patch.object(InterpretedFunction, "__call__", call),
        mock.patch.object(tl.tensor, "__init__", _TENSOR),
        mock.patch.object(tl.block_type, "__init__", _BLOCK_TYPE),
        mock.patch.object(interpreter, "_get_np_dtype", _NUMPY_DTYPE),
    ):
        yield


def _quick_tensor(make: Callable) -> Callable:
    """What ``make`` sets of a tensor but its handle and type depends on the shape alone."""
    known: dict[tuple[int, ...], dict[str, Any]] = {}

    def init(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
        own = {"handle": handle, "type": type, "dtype": type.scalar}
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in known:
            make(self, handle, type)
            known[shape] = {name: value for name, value in vars(self).items() if name not in own}
        vars(self).update(known[shape], **own)

    return init


def _quick_block_type(make: Callable) -> Callable:
    """What ``make`` sets depends on the shape, and on the name of the type of an element."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        sizes = [getattr(size, "value", size) for size in shape]
        key = (str(element_ty), *sizes, *map(type, sizes))  # 8.0 is refused, and equals 8
        if key not in known:
            make(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key], element_ty=element_ty)

    return init


def _quick_numpy_dtype(find: Callable) -> Callable:
    """``find``, whose result depends on the type of an element."""
    known = functools.cache(find)
    return lambda dtype: find(dtype) if dtype.scalar.is_ptr() else known(dtype.scalar)


_TENSOR = _quick_tensor(tl.tensor.__init__)
_BLOCK_TYPE = _quick_block_type(tl.block_type.__init__)
_NUMPY_DTYPE = _quick_numpy_dtype(interpreter._get_np_dtype)


class Launch(NamedTuple):
    """The launch of a kernel: the module that the kernel is in, and the grid."""

    module: str
    grid: tuple[int, ...]


@contextmanager
def recorded_launches(run: bool = True) -> Iterator[list[Launch]]:
    """Each launch in the ``with`` block, run or not."""
    launches = []
    own_run = InterpretedFunction.run

    def record(self: InterpretedFunction, *args: Any, grid: tuple, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self.fn.__module__, grid))
        if run:
            own_run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", record):
        yield launches


@contextmanager
def only_last_program() -> Iterator[None]:
    """Of each launch only the last program runs: enough to see where it reads and writes."""
    builder = interpreter.interpreter_builder

    class Executor(interpreter.GridExecutor):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            (programs,), self.grid = self.grid, (1,)
            last = {
                "set_grid_dim": partial(_ignoring, builder.set_grid_dim, programs, 1, 1),
                "set_grid_idx": partial(_ignoring, builder.set_grid_idx, programs - 1, 0, 0),
            }
            with mock.patch.multiple(builder, **last):
                super().__call__(*args, **kwargs)

        def _restore_args_dev(self, *args: Any) -> None:
            """Nothing to do: tensors on the CPU are not copied, and these are large."""

    with mock.patch.object(interpreter, "GridExecutor", Executor):
        yield


def _ignoring(function: Callable, x: int, y: int, z: int, *_: int) -> None:
    function(x, y, z)
