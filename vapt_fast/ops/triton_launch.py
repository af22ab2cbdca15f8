"""How every Triton kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction, native_specialize_impl

from ..kernels import common

__all__ = [
    "STRIDE_LIMIT",
    "Config",
    "Strided",
    "block_size",
    "images_per_program",
    "launch",
    "num_blocks",
    "product_precision",
    "strided",
    "sum_chunks",
]

Strided: TypeAlias = tuple[Tensor | int, ...]  # a tensor and its strides

# Of strides that a kernel multiplies by row numbers within a block in 32 bits.
STRIDE_LIMIT = 2**24


@dataclass(frozen=True)
class Config:
    """Block sizes of one kernel, by the names of its parameters, and what the compiler is told.

    Each op's ``tuning.py`` has a table of them, not an autotuner: a launch is the same in every run. They
    were chosen by what the compiler makes of them (hardly any spills) or by times on an H200; what was
    measured on a GPU takes their place there, see ``tuned.py``.
    """

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 1

    @cached_property
    def options(self) -> dict[str, Any]:
        """Keywords for the launch."""
        # Contracting a * b + c into one instruction: Triton's default differs between versions.
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# Whether a launch skips what Triton finds out anew in each. Turned off by what only records launches.
PREPARED = True

# For partial sums of images, see kernels.common.
SUM_CHUNKS = Config({"BLOCK_CHUNKS": 64, "BLOCK": 32})


def num_blocks(config: Config, **sizes: int) -> int:
    """How many blocks cover ``sizes``, each given by the name of its block size, as BLOCK_C=channels."""
    blocks = 1
    for name, size in sizes.items():
        blocks *= -(-size // config.blocks[name])
    return blocks


def block_size(size: int, largest: int) -> int:
    """The power of two that covers ``size``, at least 16, as products need, and at most ``largest``."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))


def product_precision(dtype: torch.dtype) -> str:
    """How products of float32 values round their factors, where the backbone's products are of ``dtype``.

    Where those are of 16 bits, to tf32, whose mantissa is that of float16.
    """
    return "tf32" if dtype.itemsize == 2 else "ieee"


def images_per_program(batch: int) -> int:
    """Images that one program adds up itself: few partial sums are left, also of a large batch."""
    return max(4, -(-batch // 64))


def strided(tensor: Tensor | None, batch: int | None = None) -> Strided | None:
    """``tensor`` as kernels take what users give: with all its strides.

    Args:
        tensor: None where there is none.
        batch: how often a tensor of (1, ...) is repeated.
    """
    if tensor is None:
        return None
    strides = tensor.stride()
    if batch is not None and tensor.shape[0] != batch:
        strides = (0, *strides[1:])
    return tensor, *strides


def launch(
    kernel: triton.runtime.KernelInterface, config: Config, programs: int, *args: Any, **constants: Any
) -> None:
    """Run ``kernel`` on the device of the first tensor of ``args``; ``programs`` may be 0.

    The grid has one dimension, which may be as long as 2^31 - 1: the others end at 65,535.
    """
    if programs:
        first = args[0][0] if isinstance(args[0], tuple) else args[0]
        with _on_device_of(first):
            compiled = _prepared(kernel, config, args, constants) if PREPARED else None
            if compiled is None:
                kernel.run(*args, grid=(programs,), warmup=False, **constants, **config.options)
            else:
                compiled.kernel[programs, 1, 1](*args, *compiled.constants)


class _Compiled(NamedTuple):
    """A kernel compiled for some sort of arguments, and the values of its last parameters, all constants.

    ``made_for`` keeps alive what the key of this one has only the address of.
    """

    kernel: Any
    constants: tuple
    made_for: tuple[Any, Config]


_COMPILED: dict[tuple, _Compiled] = {}


def _prepared(kernel: Any, config: Config, args: tuple, constants: dict[str, Any]) -> _Compiled | None:
    """The kernel compiled for arguments like these; None where Triton is to find out itself what to launch.

    The key has all that Triton's own has, found out by the same function: dtypes, which addresses and sizes
    are multiples of 16, which sizes are 1. Hooks of launches are run as ever.
    """
    runtime = triton.knobs.runtime
    if type(kernel) is not JITFunction or kernel.pre_run_hooks:
        return None
    if getattr(runtime, "add_stages_inspection_hook", None) is not None:
        return None
    device = driver.active.get_current_device()
    backend = _backend(device)
    if backend is None:
        return None
    key = (
        *(id(kernel), id(config), device, runtime.debug, triton.knobs.compilation.instrumentation_mode),
        native_specialize_impl(backend, args, False, True, True),
        *constants.items(),
        *map(type, constants.values()),
    )
    known = _COMPILED.get(key)
    if known is None:
        parameters = kernel.params
        if [p.is_constexpr for p in parameters] != [i >= len(args) for i in range(len(parameters))]:
            return None
        named = constants | config.blocks
        values = tuple(named[parameter.name] for parameter in parameters[len(args) :])
        compiled = kernel.warmup(*args, grid=(1,), **constants, **config.options)
        if not isinstance(compiled, CompiledKernel):  # a hook of Triton's, or one that is still compiling
            return None
        known = _COMPILED[key] = _Compiled(compiled, values, (kernel, config))
    return known


@cache
def _backend(device: int) -> Any:
    """Triton's compiler for the current ``device``; None for one that is not of CUDA."""
    target = driver.active.get_current_target()
    return make_backend(target) if target.backend == "cuda" else None


_HERE: AbstractContextManager = nullcontext()


def _on_device_of(tensor: Tensor) -> AbstractContextManager:
    """A context in which the device of ``tensor`` is the current one; costs nothing where it is already."""
    index = tensor.get_device()  # -1 on a CPU
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def sum_chunks(partial: Tensor, out: Tensor | None = None) -> Tensor:
    """The sum of ``partial`` (chunks, ...) over its chunks, in the same order every time.

    Args:
        partial: contiguous.
        out: where to write it, contiguous; None for a new tensor.
    """
    total = torch.empty(partial.shape[1:], dtype=partial.dtype, device=partial.device) if out is None else out
    programs = num_blocks(SUM_CHUNKS, BLOCK=total.numel())
    launch(common.sum_chunks_kernel, SUM_CHUNKS, programs, partial, total, partial.shape[0], total.numel())
    return total
