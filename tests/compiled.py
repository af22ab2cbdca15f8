"""The Triton kernels compiled ahead of time, on a machine without a GPU, and what they need of one.

``python tests/compiled.py`` writes what it measures to kernels/resources.json.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vapt_fast import functional
from vapt_fast.backends import _dispatch

TABLE = Path(__file__).parent.parent / "kernels" / "resources.json"

# Bytes of shared memory that a block may have, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def pool(dtype: torch.dtype, rows: int) -> Callable[[], Any]:
    """prompt_pool of a ViT-B/16 at 224 x 224 pixels, forward and backward."""

    def run() -> None:
        x = torch.zeros(2, 197, 768, dtype=dtype, requires_grad=True)
        shapes, learned_dtype = ((rows, 196), (768,), (768,)), torch.promote_types(dtype, torch.float32)
        learned = [torch.zeros(shape, dtype=learned_dtype, requires_grad=True) for shape in shapes]
        outputs = functional.prompt_pool(x, *learned, num_prefix=1, backend="triton")
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])

    return run


CASES = {
    f"prompt_pool {str(dtype).removeprefix('torch.')} R={rows}": pool(dtype, rows)
    for dtype, rows in (
        *itertools.product((torch.bfloat16, torch.float32), (10, 50)),
        (torch.float64, 10),
    )
}

Launch = tuple[JITFunction, tuple, dict[str, Any]]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """The kernels launched in the ``with`` block, on CPU tensors and without running: kernel, arguments."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(_dispatch, "interpreting", return_value=True),
    ):
        yield launches


def compile_launch(launch: Launch, capability: int) -> dict[str, int]:
    """What the kernel needs, compiled exactly as this launch would compile it.

    Returns:
        Registers of a thread, stack (spilled registers and the like) of a thread in bytes, shared memory of a
        block in bytes.
    """
    kernel, args, options = launch
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=parsed.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def resources(case: str) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> architecture -> what it needs, for all kernels that one of CASES launches."""
    with recorded_launches() as launches:
        CASES[case]()
    return {
        launch[0].__name__: {
            f"sm_{capability}": compile_launch(launch, capability) for capability in SHARED_MEMORY
        }
        for launch in launches
    }


if __name__ == "__main__":
    table = {"triton": triton.__version__, "cases": {case: resources(case) for case in CASES}}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
