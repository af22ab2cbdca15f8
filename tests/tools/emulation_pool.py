"""prompt_pool's CUDA kernels compiled for a CPU, on tensors; see emulation.py."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from emulation import DTYPES, OK, Status, unwritten
from torch import Tensor

__all__ = ["Backward", "Forward", "PoolKernels", "Sizes", "Tensor3"]


# ---- the launchers' arguments, as vapt_fast/prompt_pool.h declares them


class Tensor3(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("batch", c_int64), ("row", c_int64))

    @classmethod
    def of(cls, tensor: Tensor | None) -> Tensor3:
        if tensor is None:
            return cls()
        image, row, channel = tensor.stride()
        assert channel == 1
        return cls(tensor.data_ptr(), image, row)


class Matrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("row", c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> Matrix:
        row, column = tensor.stride()
        assert column == 1 or tensor.shape[1] == 1
        return cls(tensor.data_ptr(), row)


class Sizes(ctypes.Structure):
    _fields_ = (
        ("dtype", c_int32),
        ("float32_tokens", c_bool),
        *((name, c_int64) for name in ("batch", "prefix", "patches", "channels", "rows")),
    )


class Forward(ctypes.Structure):
    _fields_ = (
        ("sizes", Sizes),
        ("eps", c_float),
        ("prompt_eps", c_float),
        *((name, Tensor3) for name in ("x", "branch")),
        ("layer_scale", c_void_p),
        ("matrix", Matrix),
        *((name, c_void_p) for name in ("weight", "bias", "norm_weight", "norm_bias")),
        *((name, c_void_p) for name in ("total", "normed", "pooled", "mean", "rstd")),
        ("one_pass", c_bool),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        ("sizes", Sizes),
        ("eps", c_float),
        ("prompt_eps", c_float),
        *((name, Tensor3) for name in ("total", "grad_total", "grad_normed", "grad_pooled")),
        ("layer_scale", c_void_p),
        ("matrix", Matrix),
        *((name, c_void_p) for name in ("weight", "bias", "norm_weight", "mean", "rstd", "workspace")),
        *((name, c_void_p) for name in ("grad_x", "grad_branch", "grad_matrix", "grad_weight", "grad_bias")),
        ("one_pass", c_bool),
    )


def address(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def sizes_of(x: Tensor, normed: Tensor, matrix: Tensor) -> Sizes:
    rows, patches = matrix.shape
    batch, tokens, channels = x.shape
    float32_tokens = x.dtype == torch.float32
    return Sizes(DTYPES[normed.dtype], float32_tokens, batch, tokens - patches, patches, channels, rows)


class PoolKernels:
    """The launchers of a library that ``emulation.build`` made, on CPU tensors.

    Attributes:
        one_pass: whether forward and backward may use clusters.
        half: dtype of normed where the tokens are float32.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.bank_conflicts.restype = c_int64
        self.library.prompt_pool_workspace.restype = c_int64
        self.one_pass = True
        self.half = torch.bfloat16

    def launch(self, name: str, arguments: ctypes.Structure) -> Status:
        status = Status()
        getattr(self.library, name)(ctypes.byref(arguments), ctypes.byref(status))
        return status

    def forward_arguments(
        self,
        x: Tensor,
        matrix: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        branch: Tensor | None,
        layer_scale: Tensor | None,
        eps: float,
        prompt_eps: float,
    ) -> tuple[Forward, tuple[Tensor | None, ...]]:
        """The arguments, and the outputs: total, normed, pooled, mean, rstd."""
        batch, tokens, channels = x.shape
        total = None if branch is None else unwritten(*x.shape, dtype=x.dtype)
        normed = unwritten(*x.shape, dtype=self.half if x.dtype == torch.float32 else x.dtype)
        pooled = unwritten(batch, matrix.shape[0], channels, dtype=torch.float32)
        mean, rstd = (unwritten(batch, tokens, dtype=torch.float32) for _ in range(2))
        outputs = (total, normed, pooled, mean, rstd)
        arguments = Forward(
            sizes_of(x, normed, matrix),
            eps,
            prompt_eps,
            Tensor3.of(x),
            Tensor3.of(branch),
            address(layer_scale),
            Matrix.of(matrix),
            *map(address, (weight, bias, norm_weight, norm_bias, *outputs)),
            self.one_pass,
        )
        return arguments, outputs

    def forward(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        given, outputs = self.forward_arguments(*arguments)
        status = self.launch("prompt_pool_forward", given)
        assert status.code == OK, status.message
        return outputs

    def backward_arguments(
        self,
        total: Tensor,
        grad_total: Tensor | None,
        grad_normed: Tensor | None,
        grad_pooled: Tensor,
        matrix: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor | None,
        layer_scale: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
        prompt_eps: float,
        wanted: tuple[bool, bool] = (True, False),
    ) -> tuple[Backward, tuple[Tensor | None, ...]]:
        """The arguments, and the outputs: gradients of x and branch if ``wanted``, matrix, weight and bias."""
        half = self.half if total.dtype == torch.float32 else total.dtype
        dtypes = (total.dtype, half)
        grads = [
            unwritten(*total.shape, dtype=dtype) if want else None
            for dtype, want in zip(dtypes, wanted, strict=True)
        ]
        grads += [unwritten(*t.shape, dtype=torch.float32) for t in (matrix, weight, bias)]
        sizes = sizes_of(total, torch.empty(0, dtype=half), matrix)
        size = self.library.prompt_pool_workspace(ctypes.byref(sizes))
        self.workspace = unwritten(size, dtype=torch.float32)  # it must outlive the arguments
        arguments = Backward(
            sizes,
            eps,
            prompt_eps,
            *map(Tensor3.of, (total, grad_total, grad_normed, grad_pooled)),
            address(layer_scale),
            Matrix.of(matrix),
            *map(address, (weight, bias, norm_weight, mean, rstd, self.workspace, *grads)),
            self.one_pass,
        )
        return arguments, tuple(grads)

    def backward(self, *arguments: Any, **options: Any) -> tuple[Tensor | None, ...]:
        given, grads = self.backward_arguments(*arguments, **options)
        status = self.launch("prompt_pool_backward", given)
        assert status.code == OK, status.message
        return grads

    def prompt_pool(
        self,
        x: Tensor,
        matrix: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        num_prefix: int,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        branch: Tensor | None = None,
        layer_scale: Tensor | None = None,
        eps: float,
        prompt_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """functional.prompt_pool by these kernels."""
        assert x.shape[1] - num_prefix == matrix.shape[1]
        frozen = (None if t is None else t.float() for t in (norm_weight, norm_bias, layer_scale))
        norm_weight, norm_bias, layer_scale = frozen
        arguments = (x, matrix, weight, bias, norm_weight, norm_bias, branch, layer_scale, eps, prompt_eps)
        total, normed, pooled = Pool.apply(self, *arguments)
        return x if branch is None else total, normed, pooled


class Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: PoolKernels, *arguments: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        x, *learned, norm_weight, _, branch, layer_scale, eps, prompt_eps = arguments
        total, normed, pooled, mean, rstd = kernels.forward(*arguments)
        ctx.kernels, ctx.eps, ctx.wanted = kernels, (eps, prompt_eps), (True, branch is not None)
        tokens = x if branch is None else total
        ctx.save_for_backward(tokens, *learned, norm_weight, layer_scale, mean, rstd)
        return total, normed, pooled

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor, grad_pooled: Tensor) -> tuple:
        total, *others = ctx.saved_tensors
        grad_x, grad_branch, *grads = ctx.kernels.backward(
            *(total, grad_total, grad_normed, grad_pooled, *others, *ctx.eps), wanted=ctx.wanted
        )
        return None, grad_x, *grads, None, None, grad_branch, None, None, None
