"""The Triton kernels compiled ahead of time, on a machine without a GPU, and what they need of one.

``python tests/compiled.py`` prints it for all cases.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vapt_fast import functional
from vapt_fast.backends import _dispatch

# Bytes of shared memory that a block may have, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def residual(dtype: torch.dtype, dim: int, autocast: bool) -> tuple[torch.Tensor, ...]:
    """x and branch of 197 tokens, and the layer_scale of branch; under autocast x stays in float32."""
    x = torch.zeros(2, 197, dim, dtype=torch.float32 if autocast else dtype, requires_grad=True)
    branch = torch.zeros(2, 197, dim, dtype=dtype, requires_grad=True)
    return x, branch, torch.zeros(dim, dtype=x.dtype)


def norm(dtype: torch.dtype, dim: int, autocast: bool = False) -> Callable[[], Any]:
    """add_norm with everything it can have, forward and backward."""

    def run() -> None:
        x, branch, layer_scale = residual(dtype, dim, autocast)
        with torch.autocast("cpu", dtype, enabled=autocast):
            outputs = functional.add_norm(
                x, branch, layer_scale, layer_scale, layer_scale=layer_scale, backend="triton"
            )
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])

    return run


def bare_norm(dtype: torch.dtype, dim: int) -> Callable[[], Any]:
    """add_norm without anything to add and without affine, forward and backward."""

    def run() -> None:
        x, _, _ = residual(dtype, dim, autocast=False)
        _, normed = functional.add_norm(x, None, backend="triton")
        normed.backward(torch.zeros_like(normed))

    return run


def pool(dtype: torch.dtype, rows: int, autocast: bool = False, affine: bool = True) -> Callable[[], Any]:
    """prompt_pool of a ViT-B/16 at 224 x 224 pixels, forward and backward."""

    def run() -> None:
        x, branch, layer_scale = residual(dtype, 768, autocast)
        shapes, learned_dtype = ((rows, 196), (768,), (768,)), torch.promote_types(dtype, torch.float32)
        learned = [torch.zeros(shape, dtype=learned_dtype, requires_grad=True) for shape in shapes]
        with torch.autocast("cpu", dtype, enabled=autocast):
            outputs = functional.prompt_pool(
                x,
                *learned,
                num_prefix=1,
                norm_weight=layer_scale if affine else None,
                norm_bias=layer_scale if affine else None,
                branch=branch,
                layer_scale=layer_scale,
                backend="triton",
            )
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])

    return run


def attention(
    dtype: torch.dtype,
    dim: int,
    prompts: int,
    tokens: int = 197,
    biased: bool = False,
    packed: bool = True,
) -> Callable[[], Any]:
    """prompt_attention of four heads (or of one, for one token), forward and backward."""

    def run() -> None:
        heads = min(4, tokens)
        qkv = torch.zeros(2, tokens, 3 * heads * dim, dtype=dtype, requires_grad=True)
        kv = torch.zeros(2, prompts, 2 * heads * dim, dtype=dtype, requires_grad=True)
        bias = torch.zeros(1, heads, tokens, tokens, dtype=dtype) if biased else None
        options = {"scale": 1.0, "bias": bias, "backend": "triton"}
        if packed:
            out = functional.prompt_attention_packed(qkv, kv, num_heads=heads, num_kv_heads=heads, **options)
        else:
            parts = (part.unflatten(-1, (heads, dim)) for part in (*qkv.chunk(3, -1), *kv.chunk(2, -1)))
            out = functional.prompt_attention(*parts, **options)
        out.backward(torch.zeros_like(out))

    return run


def mlp(dtype: torch.dtype, frozen: bool = False, bias: bool = True) -> Callable[[], Any]:
    """mlp of a ViT-B/16, forward and, unless the tokens are ``frozen``, backward."""

    def run() -> None:
        x = torch.zeros(2, 197, 768, dtype=dtype, requires_grad=not frozen)
        weights = [torch.zeros(shape, dtype=dtype) for shape in ((3072, 768), (768, 3072))]
        biases = [torch.zeros(size, dtype=dtype) if bias else None for size in (3072, 768)]
        y = functional.mlp(x, weights[0], biases[0], weights[1], biases[1], backend="triton")
        if not frozen:
            y.backward(torch.zeros_like(y))

    return run


def projector(
    dtype: torch.dtype, prompts: int, width: int | None = 8, eps: float | None = 1e-6, **options: Any
) -> Callable[[], Any]:
    """prompt_projector of a ViT-B/16 in training, forward and backward."""

    def run() -> None:
        own = torch.promote_types(dtype, torch.float32)
        shapes = [(2, prompts, 768), (prompts,), *([] if width is None else [(width, 768), (768, width)])]
        learned = [torch.zeros(shape, dtype=own, requires_grad=True) for shape in shapes]
        out = functional.prompt_projector(
            *learned,
            scale=torch.zeros(1, dtype=own, requires_grad=True),
            channel_mask=torch.zeros(2, 1, 768, dtype=own),
            feature_mask=None if width is None else torch.zeros(2, prompts, width, dtype=own),
            norm_weight=None if eps is None else torch.zeros(768, dtype=dtype),
            norm_bias=None if eps is None else torch.zeros(768, dtype=dtype),
            eps=eps,
            dtype=dtype,
            backend="triton",
            **options,
        )
        out.backward(torch.zeros_like(out))

    return run


def cls(dtype: torch.dtype, prompts: int, rows: int = 1, shared: bool = False) -> Callable[[], Any]:
    """absorbed_attention of a ViT-B/16 at 224 x 224 pixels, forward and backward."""

    def run() -> None:
        shapes = [(2, rows, 12, 64), (2, 197, 768), (1 if shared else 2, prompts, 768)]
        tensors = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        weights = torch.zeros(2, 12, 64, 768, dtype=dtype)
        out = functional.absorbed_attention(*tensors, *weights, scale=1.0, backend="triton")
        out.backward(torch.zeros_like(out))

    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = {
    **{
        f"add_norm {_name(dtype)} C={dim}": norm(dtype, dim)
        for dtype, dim in (
            *itertools.product((torch.bfloat16, torch.float32), (768, 1536, 2048)),
            (torch.float64, 768),
        )
    },
    "add_norm bfloat16 C=768 under autocast": norm(torch.bfloat16, 768, autocast=True),
    "add_norm bfloat16 C=768 bare": bare_norm(torch.bfloat16, 768),
    **{
        f"prompt_pool bfloat16 R={rows} under autocast": pool(torch.bfloat16, rows, autocast=True)
        for rows in (10, 50)
    },
    **{
        f"prompt_pool {_name(dtype)} R={rows}": pool(dtype, rows)
        for dtype, rows in (
            *itertools.product((torch.bfloat16, torch.float32), (10, 50)),
            (torch.float64, 10),
        )
    },
    "prompt_pool bfloat16 R=50 without affine": pool(torch.bfloat16, 50, affine=False),
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
    "prompt_attention bfloat16 d=64 P=50 not packed": attention(torch.bfloat16, 64, 50, packed=False),
    **{
        f"mlp {_name(dtype)}": mlp(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    },
    "mlp bfloat16 frozen": mlp(torch.bfloat16, frozen=True),
    "mlp bfloat16 without bias": mlp(torch.bfloat16, bias=False),
    **{
        f"prompt_projector {_name(dtype)} P={prompts} r={width}": projector(dtype, prompts, width)
        for dtype, prompts, width in (
            *itertools.product((torch.bfloat16, torch.float32), (10, 50, 100), (8,)),
            *itertools.product((torch.bfloat16, torch.float32), (50,), (None, 64)),
            (torch.float64, 50, 8),
        )
    },
    **{
        f"prompt_projector bfloat16 P=50 r=8 {activation}": projector(
            torch.bfloat16, 50, activation=activation
        )
        for activation in ("gelu", "sigmoid", "softmax", "identity")
    },
    "prompt_projector bfloat16 P=50 r=8 without norm": projector(torch.bfloat16, 50, eps=None),
    **{
        f"absorbed_attention {_name(dtype)} P={prompts}": cls(dtype, prompts)
        for dtype, prompts in (
            *itertools.product((torch.bfloat16, torch.float32), (10, 50, 100)),
            (torch.float64, 50),
        )
    },
    **{
        f"absorbed_attention {_name(dtype)} P=50 shared": cls(dtype, 50, shared=True)
        for dtype in (torch.bfloat16, torch.float32)
    },
    **{
        f"absorbed_attention {_name(dtype)} P=50 R=5": cls(dtype, 50, rows=5)
        for dtype in (torch.bfloat16, torch.float32)
    },
    # Triton makes a constant of every size of 1.
    "prompt_attention bfloat16 d=64 P=1 T=1": attention(torch.bfloat16, 64, 1, tokens=1),
}

# Those that the tests compile; all of them would take many minutes.
COMPILED_IN_TESTS = [
    "add_norm bfloat16 C=768 under autocast",
    "prompt_pool bfloat16 R=50",
    "prompt_pool float32 R=10",
    "prompt_attention bfloat16 d=64 P=50",
    "prompt_attention bfloat16 d=64 P=1 T=1",
    "mlp bfloat16",
    "prompt_projector bfloat16 P=50 r=8",
    "absorbed_attention bfloat16 P=50",
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
    print(f"Triton {triton.__version__}")
    for case in CASES:
        for kernel, architectures in resources(case).items():
            for architecture, usage in architectures.items():
                print(f"{case}: {kernel} on {architecture}: {usage}", flush=True)
