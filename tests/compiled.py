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


def attention(
    dtype: torch.dtype, dim: int, prompts: int, tokens: int = 197, biased: bool = False
) -> Callable[[], Any]:
    """prompt_attention of four heads (or of one, for one token), forward and backward."""

    def run() -> None:
        heads = min(4, tokens)
        qkv = torch.zeros(2, tokens, 3, heads, dim, dtype=dtype, requires_grad=True)
        kv = torch.zeros(2, prompts, 2, heads, dim, dtype=dtype, requires_grad=True)
        bias = torch.zeros(1, heads, tokens, tokens, dtype=dtype) if biased else None
        out = functional.prompt_attention(
            *qkv.unbind(2), *kv.unbind(2), scale=1.0, bias=bias, backend="triton"
        )
        out.backward(torch.zeros_like(out))

    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = {
    **{
        f"prompt_pool {_name(dtype)} R={rows}": pool(dtype, rows)
        for dtype, rows in (
            *itertools.product((torch.bfloat16, torch.float32), (10, 50)),
            (torch.float64, 10),
        )
    },
    **{
        f"prompt_attention {_name(dtype)} d={dim} P={prompts}": attention(dtype, dim, prompts)
        for dtype, dim, prompts in (
            *itertools.product((torch.bfloat16, torch.float16), (32, 64, 80, 128), (50,)),
            (torch.bfloat16, 64, 10),
            (torch.float32, 64, 50),
            (torch.float64, 64, 50),
        )
    },
    **{
        f"prompt_attention {_name(dtype)} d={dim} P=50 with bias": attention(dtype, dim, 50, biased=True)
        for dtype, dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64))
    },
    # Triton makes a constant of every size of 1.
    "prompt_attention bfloat16 d=64 P=1 T=1": attention(torch.bfloat16, 64, 1, tokens=1),
}

# Cases that the tests compile again; to do so with all of them would take many minutes.
COMPILED_IN_TESTS = [
    *(case for case in CASES if case.startswith("prompt_pool")),
    "prompt_attention bfloat16 d=64 P=50",
    "prompt_attention float32 d=64 P=50",
    "prompt_attention bfloat16 d=64 P=1 T=1",
]

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
    """Kernel -> architecture -> what it needs, for all kernels that one of CASES launches.

    A kernel's second launch is named with a 2.
    """
    with recorded_launches() as launches:
        CASES[case]()
    needed = {}
    for launch in launches:
        name = launch[0].__name__
        needed[f"{name} 2" if name in needed else name] = {
            f"sm_{capability}": compile_launch(launch, capability) for capability in SHARED_MEMORY
        }
    return needed


if __name__ == "__main__":
    table = {"triton": triton.__version__, "cases": {case: resources(case) for case in CASES}}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
