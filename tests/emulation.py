"""The CUDA kernels compiled for a CPU, see csrc/emulation, with the compiler that the tests find."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from ctypes import c_bool, c_char, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which("g++")
DTYPES = {torch.float16: 0, torch.bfloat16: 1}
OK, INVALID, UNSUPPORTED = range(3)


def build(output: Path, sources: list[Path], *flags: str) -> Path:
    """Compile ``sources`` with ``flags``, the emulation's runtime without sanitizers, and link them."""
    includes = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'emulation'}"]
    runtime = output.with_suffix(".runtime.o")
    common = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", *includes]
    for more, arguments in [
        ((), ["-c", str(CSRC / "emulation" / "emulation.cpp"), "-o", str(runtime)]),
        (flags, ["-x", "c++", *map(str, sources), "-x", "none", str(runtime), "-o", str(output)]),
    ]:
        subprocess.run([*common, "-Wno-unknown-pragmas", *more, *arguments], check=True)
    return output


def built(factory: pytest.TempPathFactory, name: str, sources: list[Path], *flags: str) -> Path:
    """``build``, once for all processes of the tests; without a compiler the test is skipped."""
    if COMPILER is None:
        pytest.skip("there is no g++ for the kernels")
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # it has a folder of its own beside the others'
        folder = folder.parent
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = folder / name
        if not output.exists():
            build(output, sources, *flags)
    return output


# ---- the launchers' arguments, as vapt_fast/prompt_attention.h declares them


class Status(ctypes.Structure):
    _fields_ = (("code", c_int32), ("message", c_char * 240))


class Tensor4(ctypes.Structure):
    _fields_ = (("data", c_void_p), *((name, c_int64) for name in ("batch", "token", "head")))

    @classmethod
    def of(cls, tensor: Tensor, batch: int) -> Tensor4:
        assert tensor.stride(3) == 1
        image, token, head, _ = tensor.expand(batch, -1, -1, -1).stride()
        return cls(tensor.data_ptr(), image, token, head)


SIZES = ("batch", "queries", "tokens", "prompts", "heads", "groups", "head_dim")


class Sizes(ctypes.Structure):
    _fields_ = (
        ("dtype", c_int32),
        *((name, c_int64) for name in SIZES),
    )


INPUTS = ("q", "k", "v", "prompt_k", "prompt_v")
GRADS = ("grad_q", "grad_k", "grad_v", "grad_prompt_k", "grad_prompt_v")


class Forward(ctypes.Structure):
    _fields_ = (
        ("sizes", Sizes),
        ("scale", c_float),
        *((name, Tensor4) for name in (*INPUTS, "out")),
        ("lse", c_void_p),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        *Forward._fields_,
        ("grad_out", Tensor4),
        *((name, Tensor4) for name in GRADS),
        ("float32_prompt_grads", c_bool),
        ("shared_memory", c_int64),
        ("workspace", c_void_p),
    )


def sizes_of(q: Tensor, k: Tensor, prompt_k: Tensor) -> Sizes:
    batch, queries, heads, dim = q.shape
    return Sizes(DTYPES[q.dtype], batch, queries, k.shape[1], prompt_k.shape[1], heads, k.shape[2], dim)


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory full of NaN."""
    return torch.full(shape, float("nan"), dtype=dtype)


class Kernels:
    """The launchers of a library that ``build`` made, on CPU tensors.

    Attributes:
        shared_memory: bytes that a block has in the backward.
    """

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.bank_conflicts.restype = c_int64
        self.library.prompt_attention_backward_shared_memory.restype = c_int64
        self.library.prompt_attention_backward_workspace.restype = c_int64
        self.shared_memory = 227 * 1024

    def launch(self, name: str, arguments: ctypes.Structure) -> Status:
        status = Status()
        getattr(self.library, name)(ctypes.byref(arguments), ctypes.byref(status))
        return status

    def forward_arguments(self, tensors: tuple[Tensor, ...], scale: float) -> tuple[Forward, Tensor, Tensor]:
        q, k, _, prompt_k, _ = tensors
        out = unwritten(*q.shape, dtype=q.dtype)
        lse = unwritten(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        batch = q.shape[0]
        inputs = [Tensor4.of(t, batch) for t in (*tensors, out)]
        arguments = Forward(sizes_of(q, k, prompt_k), scale, *inputs, lse.data_ptr())
        arguments.keeps = (*tensors, out, lse)  # alive as long as their addresses are in use
        return arguments, out, lse

    def forward(self, tensors: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor]:
        """out and lse."""
        arguments, out, lse = self.forward_arguments(tensors, scale)
        status = self.launch("prompt_attention_forward", arguments)
        assert status.code == OK, status.message
        return out, lse

    def bank_conflicts(self) -> int:
        """Rows of load_matrices in the banks of others, since the last call."""
        return self.library.bank_conflicts()

    def backward_shared_memory(self, tensors: tuple[Tensor, ...], prompts_only: bool) -> int:
        """Bytes that the backward needs at the least."""
        sizes = sizes_of(tensors[0], tensors[1], tensors[3])
        return self.library.prompt_attention_backward_shared_memory(ctypes.byref(sizes), c_bool(prompts_only))

    def backward_arguments(
        self,
        tensors: tuple[Tensor, ...],
        scale: float,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        prompts_only: bool = False,
    ) -> tuple[Backward, list[Tensor | None]]:
        q, k, _, prompt_k, _ = tensors
        batch = q.shape[0]
        shared = prompt_k.shape[0] != batch
        grads: list[Tensor | None] = []
        for name, tensor in zip(INPUTS, tensors, strict=True):
            of_prompts = name.startswith("prompt")
            dtype = torch.float32 if of_prompts and shared else q.dtype
            shape = (batch, *tensor.shape[1:])
            grads.append(unwritten(*shape, dtype=dtype) if of_prompts or not prompts_only else None)
        inputs = [Tensor4.of(t, batch) for t in (*tensors, out)]
        outputs = [Tensor4() if grad is None else Tensor4.of(grad, batch) for grad in grads]
        sizes = sizes_of(q, k, prompt_k)
        needed = self.library.prompt_attention_backward_workspace(
            ctypes.byref(sizes), c_bool(prompts_only), c_int64(self.shared_memory)
        )
        workspace = unwritten(needed, dtype=torch.float32)
        arguments = Backward(
            sizes,
            scale,
            *inputs,
            lse.data_ptr(),
            Tensor4.of(grad_out, batch),
            *outputs,
            shared,
            self.shared_memory,
            workspace.data_ptr(),
        )
        arguments.keeps = (*tensors, out, lse, grad_out, *grads, workspace)
        return arguments, grads

    def backward(self, tensors: tuple[Tensor, ...], *arguments: Any, **options: Any) -> list[Tensor | None]:
        """The gradients of all tensors, or of the prompts alone."""
        arguments_, grads = self.backward_arguments(tensors, *arguments, **options)
        status = self.launch("prompt_attention_backward", arguments_)
        assert status.code == OK, status.message
        for i, (grad, tensor) in enumerate(zip(grads, tensors, strict=True)):
            if grad is not None and grad.shape != tensor.shape:
                grads[i] = grad.sum(dim=0, keepdim=True).to(tensor.dtype)
        return grads

    def prompt_attention(self, *tensors: Tensor, scale: float, bias: None = None) -> Tensor:
        """functional.prompt_attention by these kernels."""
        return Attention.apply(self, scale, *tensors)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, scale: float, *tensors: Tensor) -> Tensor:
        out, lse = kernels.forward(tensors, scale)
        ctx.kernels, ctx.scale = kernels, scale
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        return None, None, *ctx.kernels.backward(tensors, ctx.scale, out, lse, grad_out)
