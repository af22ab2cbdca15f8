"""The Triton kernels compiled ahead of time, on a machine without a GPU, and what they need of one.

``python tests/tools/compiled.py [CASE ...]`` prints it, a line of JSON a case; without a name, for all cases.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from kernel_cases import KERNELS, POOL_BY_IMAGE, PROJECTOR_BY_IMAGE, REAL, converted
from op_cases import results
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vapt_fast import kernels
from vapt_fast.ops import triton_launch

CAPABILITIES = (80, 90, 100, 120)
FP8 = "quantise"  # begins the names of cases with FP8, which needs 89


# What each op of a ViT-B/16 is compiled with: changes of REAL.
CHANGES: dict[str, list[dict[str, Any]]] = {
    "add_norm": [{}, {"dim": 1536}, {"dim": 2048}, {"branch": False, "affine": False}, {"autocast": True}],
    "prompt_pool": [{}, {"rows": 10}, {"affine": False}, {"autocast": True}, POOL_BY_IMAGE],
    "prompt_projector": [
        {"masked": True, "learned_scale": True} | change
        for change in (
            *({"prompts": prompts} for prompts in (10, 50, 100)),
            *({"width": width} for width in (None, 64)),
            *({"activation": name} for name in ("gelu", "sigmoid", "softmax", "identity")),
            {"eps": None},
            PROJECTOR_BY_IMAGE,
        )
    ],
    "prompt_attention": [{}],
    "prompt_attention_packed": [
        *({"dim": dim, "bias": bias} for dim in (32, 64, 80, 128) for bias in (False, True)),
        {"prompts": 10},
        {"lengths": (50,)},
        # Triton makes a constant of every size of 1.
        {"tokens": 1, "prompts": 1, "heads": 1, "groups": 1},
    ],
    "absorbed_attention": [
        {},
        {"prompts": 10},
        {"prompts": 100},
        {"shared": True},
        {"rows": 5},
        {"lengths": (50,)},
    ],
    "mlp": [{}, {"bias": False}],
}


def case(op: str, dtype: torch.dtype, autocast: bool = False, **change: Any) -> Callable[[], Any]:
    """The op forward and backward; under autocast the tokens are in float32."""

    def run() -> None:
        made = KERNELS[op].make(**REAL[op] | change)
        function, tensors, options = converted(op, made, dtype)
        options |= {"backend": "triton"} | ({"dtype": dtype} if op == "prompt_projector" else {})
        if autocast:
            tensors[0] = tensors[0].float()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results(function, tensors, options)

    return run


def _name(op: str, dtype: torch.dtype, change: dict[str, Any]) -> str:
    return " ".join([op, str(dtype).removeprefix("torch."), *(f"{k}={v}" for k, v in change.items())])


CASES = {
    _name(op, dtype, change): case(op, dtype, **change)
    for op, changes in CHANGES.items()
    for change in changes
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    if change == changes[0] or dtype in (torch.bfloat16, torch.float32)
}


def quantise_case(columns: int, transposed: bool, gelu: bool) -> Callable[[], Any]:
    """Rows to FP8, or the columns of a transposed weight."""

    def run() -> None:
        from vapt_fast.ops.fp8_linear import triton

        rows = torch.empty(768, columns, dtype=torch.bfloat16)
        rows = rows.t() if transposed else rows
        values, scale = torch.empty(rows.shape, dtype=torch.float8_e4m3fn), torch.empty(len(rows), 1)
        triton.quantise(rows, values, scale, gelu)

    return run


CASES |= {
    f"{FP8} rows": quantise_case(3072, False, True),
    f"{FP8} long rows": quantise_case(16384, False, True),
    f"{FP8} transposed": quantise_case(3072, True, False),
}

Launch = tuple[JITFunction, tuple, dict[str, Any]]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """The kernels launched in the ``with`` block, on CPU tensors and without running: kernel, arguments."""
    launches: list[Launch] = []
    for module in pkgutil.iter_modules(
        kernels.__path__
    ):  # before the variable says that they are interpreted
        importlib.import_module(f"{kernels.__name__}.{module.name}")

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(triton_launch, "PREPARED", False),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # CPU tensors are taken
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


def resources(name: str) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> architecture -> what it needs, for all kernels that one of CASES launches.

    A kernel's second launch is named with a 2.
    """
    with recorded_launches() as launches:
        CASES[name]()
    needed = {}
    for launch in launches:
        kernel = launch[0].__name__
        needed[f"{kernel} 2" if kernel in needed else kernel] = {
            f"sm_{capability}": compile_launch(launch, capability)
            for capability in CAPABILITIES
            if capability >= 89 or not name.startswith(FP8)
        }
    return needed


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(json.dumps({name: resources(name)}), flush=True)
