"""prompt_pool on CUDA: the launches of csrc/prompt_pool, by vapt_fast._C."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import HALF, unsupported_dtypes
from ..cuda_launch import address, aligned, launch, rows
from ..device import native
from .op import Arguments, Gradients, Outputs, Saved, incoming_gradients

__all__ = ["ONE_PASS", "backward", "forward", "unsupported_reasons"]

# Whether to read the tokens once, by clusters of thread blocks, where device and sizes allow it. Tests and
# benchmarks turn it off, to compare.
ONE_PASS = True


def unsupported_reasons(args: Arguments) -> list[str]:
    """Every reason why the kernels can't take ``args``."""
    dtype, x, branch = args.dtype, args.x, args.branch
    reasons = []
    if dtype not in HALF:
        reasons.append(f"normed must be float16 or bfloat16, got {dtype}")
    if x.dtype not in (dtype, torch.float32):
        reasons.append(f"x must be float32 or normed's {dtype}, got {x.dtype}")
    if branch is not None and branch.dtype != dtype:
        reasons.append(f"branch must be normed's {dtype}, got {branch.dtype}")
    reasons += unsupported_dtypes((torch.float32,), matrix=args.matrix)
    if x.shape[-1] % 8 or not x.shape[-1]:
        reasons.append(f"tokens must have 8, 16, 24, ... channels, got {x.shape[-1]}")
    return reasons


def forward(args: Arguments, out: Outputs) -> None:
    """Write all outputs but raw."""
    x, branch = aligned(args.x), None if args.branch is None else aligned(args.branch)
    layer_scale, matrix = _vector(args.layer_scale), _readable(args.matrix)
    affine = (args.weight, args.bias, args.norm_weight, args.norm_bias)
    weight, bias, norm_weight, norm_bias = map(_vector, affine)
    launch(
        "prompt_pool_forward",
        x,
        sizes=_sizes(x, matrix, args.dtype),
        eps=args.eps,
        prompt_eps=args.prompt_eps,
        x=rows(x),
        branch=rows(branch),
        layer_scale=address(layer_scale),
        matrix=rows(matrix),
        weight=address(weight),
        bias=address(bias),
        norm_weight=address(norm_weight),
        norm_bias=address(norm_bias),
        total=address(None if branch is None else out.total),
        normed=address(out.normed),
        pooled=address(out.pooled),
        mean=address(out.mean),
        rstd=address(out.rstd),
        one_pass=ONE_PASS,
    )


def backward(saved: Saved, grad_results: tuple[Tensor | None, ...], grads: Gradients) -> None:
    """Write the gradients that are needed; those of what is learned are computed anyway."""
    total, matrix = aligned(saved.total), _readable(saved.matrix)
    layer_scale, norm_weight = _vector(saved.layer_scale), _vector(saved.norm_weight)
    weight, bias = _vector(saved.weight), _vector(saved.bias)
    sizes = _sizes(total, matrix, saved.dtype)
    workspace = matrix.new_empty(native().prompt_pool_backward_workspace(sizes))
    grad_total, grad_normed, grad_pooled = incoming_gradients(saved, grad_results)
    grad_total = None if grad_total is None else aligned(grad_total)
    grad_normed, grad_pooled = aligned(grad_normed), aligned(grad_pooled)
    grad_matrix = torch.empty_like(matrix) if grads.matrix is None else grads.matrix
    affine = matrix.new_empty((2, total.shape[-1])) if grads.affine is None else grads.affine
    grad_weight, grad_bias = affine.unbind()
    launch(
        "prompt_pool_backward",
        total,
        sizes=sizes,
        eps=saved.eps,
        prompt_eps=saved.prompt_eps,
        total=rows(total),
        grad_total=rows(grad_total),
        grad_normed=rows(grad_normed),
        grad_pooled=rows(grad_pooled),
        layer_scale=address(layer_scale),
        matrix=rows(matrix),
        weight=address(weight),
        bias=address(bias),
        norm_weight=address(norm_weight),
        mean=address(saved.mean),
        rstd=address(saved.rstd),
        workspace=address(workspace),
        grad_x=address(grads.x),
        grad_branch=address(grads.branch),
        grad_matrix=address(grad_matrix),
        grad_weight=address(grad_weight),
        grad_bias=address(grad_bias),
        one_pass=ONE_PASS,
    )


def _sizes(tokens: Tensor, matrix: Tensor, dtype: torch.dtype) -> Any:
    """The op's sizes for vapt_fast._C; ``dtype`` is normed's."""
    (batch, num_tokens, channels), (num_rows, num_patches) = tokens.shape, matrix.shape
    return native().PromptPoolSizes(
        dtype=str(dtype).removeprefix("torch."),
        float32_tokens=tokens.dtype == torch.float32,
        batch=batch,
        prefix=num_tokens - num_patches,
        patches=num_patches,
        channels=channels,
        rows=num_rows,
    )


def _vector(tensor: Tensor | None) -> Tensor | None:
    """A (C,) as the kernels take it."""
    return None if tensor is None else aligned(tensor.to(torch.float32))


def _readable(matrix: Tensor) -> Tensor:
    """The matrix with contiguous columns."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
