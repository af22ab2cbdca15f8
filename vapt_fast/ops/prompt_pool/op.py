"""prompt_pool: normalise the tokens once, for the block and for the prompts, and pool them into prompts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autocast import autocast_dtype
from ..base import Op, Signature, empty_like, or_zeros
from ..checks import (
    check_affine,
    check_by_image,
    check_float,
    check_integer,
    check_number,
    check_residual,
    check_same_device,
    check_shape,
)
from ..measurement import Measurement, has_half_tokens
from ..residual import empty_residual_gradients, empty_total, residual_gradients, total_dtype

__all__ = ["prompt_pool"]


def prompt_pool(
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
    eps: float = 1e-6,
    prompt_eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute two LayerNorms of the same tokens with one statistic, the second one pooled over the positions.

    total = x + layer_scale * branch: the tokens after the branch before, as in add_norm.
    normed = (total - mean) * rstd(eps) * norm_weight + norm_bias, over C: what the block's projections read.
    pooled = M z, z = weight * (total - mean) * rstd(prompt_eps) + bias over the patch tokens (VAPT, arXiv
    2501.18936, section 4.1), computed as weight * ((M * s) xhat) + bias * rowsum(M), with
    xhat = (total - mean) * rstd(eps) and s = rstd(prompt_eps) / rstd(eps) for each row.

    Args:
        x: tokens (B, S + N, C), the S = ``num_prefix`` prefix tokens first; any floating dtype.
        matrix: M of (R, N), float32 (float64 for float64 tokens), see prompt_matrices; or (B, R, N), one for
            each image.
        weight, bias: (C,), the affine of the prompts' LayerNorm; or both (B, C), one for each image.
        num_prefix: prefix tokens, which are normalised but not pooled.
        norm_weight, norm_bias: (C,), the affine of the block's LayerNorm, any floating dtype; both or none.
        branch: (B, S + N, C), what a branch of a block adds to the tokens; None: nothing.
        layer_scale: (C,), the branch's LayerScale; None for 1.
        eps: of the block's LayerNorm.
        prompt_eps: of the prompts' LayerNorm.
        backend: "auto", "torch" or "triton"; None for the current one, see use_backend.

    Returns:
        total (B, S + N, C), in the dtype of x + branch (``x`` itself without branch); normed (B, S + N, C),
        in total's dtype or in that of autocast where it is on, as in add_norm; pooled (B, R, C) in
        ``matrix``'s dtype. Statistics and sums are in ``matrix``'s dtype, also under autocast; the kernels
        round the factors of products to tf32 where normed has 16 bits.
        Differentiable in all tensors, once: the backward is written by hand. Gradients have the shapes of the
        arguments: of what is given for each image they are not summed over the images. The kernels have no
        gradient of norm_weight, norm_bias and layer_scale: where gradients are on, these must not require one
        there.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device; no patch token.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    affine = (weight, bias, norm_weight, norm_bias)
    args: tuple[Any, ...] = (x, branch, layer_scale, matrix, *affine, num_prefix, eps, prompt_eps, None)
    total, normed, pooled = _OP(backend, Arguments(*args))
    return x if branch is None else total, normed, pooled


class Arguments(NamedTuple):
    """As in ``prompt_pool``; checked, weight and bias have ``matrix``'s dtype, and ``dtype`` is normed's."""

    x: Tensor
    branch: Tensor | None
    layer_scale: Tensor | None
    matrix: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    num_prefix: int
    eps: float
    prompt_eps: float
    dtype: torch.dtype


# In the order in which they are checked.
_TENSORS = ("x", "matrix", "weight", "bias", "norm_weight", "norm_bias", "branch", "layer_scale")


class Outputs(NamedTuple):
    """total, (0,) without branch, and normed (B, T, C); pooled (B, R, C); mean and rstd (B, T) of total.

    raw (B, R, C) is pooled before its affine.
    """

    total: Tensor
    normed: Tensor
    pooled: Tensor
    mean: Tensor
    rstd: Tensor
    raw: Tensor


class Saved(NamedTuple):
    """What the backward reads; total is x itself without branch."""

    total: Tensor
    layer_scale: Tensor | None
    matrix: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor | None
    mean: Tensor
    rstd: Tensor
    raw: Tensor
    num_prefix: int
    eps: float
    prompt_eps: float
    dtype: torch.dtype
    x_dtype: torch.dtype
    branch_dtype: torch.dtype | None


def incoming_gradients(
    saved: Saved, grad_results: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of total, None where it is x itself, of normed and of pooled, zeros for none."""
    grad_total, grad_normed, grad_pooled = grad_results
    grad_total = None if saved.branch_dtype is None else grad_total
    return grad_total, or_zeros(grad_normed, saved.total, saved.dtype), or_zeros(grad_pooled, saved.raw)


class Gradients(NamedTuple):
    """x and branch (B, T, C), see ``residual_gradients``; matrix, in its shape; weight and bias as (2, C).

    (B, 2, C) for weight and bias of each image.
    """

    x: Tensor | None
    branch: Tensor | None
    matrix: Tensor | None
    affine: Tensor | None


def _is_shared(args: Arguments) -> bool:
    """Whether all images have one matrix and one norm; those of each image were not measured."""
    return has_half_tokens(args) and args.matrix.ndim == 2 and args.weight.ndim == 1


class _PromptPool(Op):
    name = "prompt_pool"
    num_results = 3
    # PyTorch's times are of an earlier run; that with the backward is the difference of whole steps.
    measured = (
        Measurement(
            "triton",
            2.8,
            "forward 49 µs against 165, with the backward 200 against about 570",
            fits=_is_shared,
        ),
    )
    signature = Signature(Arguments, Outputs, Saved, Gradients)
    differentiable = ("x", "branch", "matrix", "weight", "bias")

    def check(self, args: Arguments) -> Arguments:
        x, branch, layer_scale, matrix, weight, bias, norm_weight, norm_bias, *_ = args
        check_shape("x", x, "(B, T, C)", None, None, None)
        batch, num_tokens, dim = x.shape
        num_prefix = check_integer("num_prefix", args.num_prefix, least=0)
        if num_prefix >= num_tokens:
            raise ValueError(f"num_prefix must leave at least one of {num_tokens} tokens, got {num_prefix}")
        check_by_image("matrix", matrix, "(R, N)", batch, None, num_tokens - num_prefix)
        check_by_image("weight", weight, "(C,)", batch, dim)
        check_by_image("bias", bias, "(C,)", batch, dim, like=weight)
        check_affine(dim, norm_weight=norm_weight, norm_bias=norm_bias)
        check_residual(x, branch, layer_scale)
        eps, prompt_eps = (
            check_number(name, getattr(args, name), "a finite number of at least 0", least=0)
            for name in ("eps", "prompt_eps")
        )
        tensors = {name: getattr(args, name) for name in _TENSORS}
        check_float(**tensors)
        check_same_device(**tensors)
        affine = (weight.to(matrix.dtype), bias.to(matrix.dtype), norm_weight, norm_bias)
        dtype = autocast_dtype(total_dtype(x, branch), x.device)
        return Arguments(x, branch, layer_scale, matrix, *affine, num_prefix, eps, prompt_eps, dtype)

    def allocate(self, args: Arguments) -> Outputs:
        x, matrix = args.x, args.matrix
        batch, num_tokens, dim = x.shape
        pooled, mean = matrix.new_empty(batch, matrix.shape[-2], dim), matrix.new_empty(batch, num_tokens)
        tokens = empty_total(x, args.branch), empty_like(x, args.dtype)
        return Outputs(*tokens, pooled, mean, empty_like(mean), empty_like(pooled))

    def save(self, args: Arguments, out: Outputs) -> Saved:
        x, branch = args.x, args.branch
        total, branch_dtype = (x, None) if branch is None else (out.total, branch.dtype)
        learned = (args.layer_scale, args.matrix, args.weight, args.bias, args.norm_weight)
        numbers = (args.num_prefix, args.eps, args.prompt_eps, args.dtype)
        return Saved(total, *learned, out.mean, out.rstd, out.raw, *numbers, x.dtype, branch_dtype)

    def allocate_gradients(self, saved: Saved, needed: Collection[str]) -> Gradients:
        total, matrix = saved.total, saved.matrix
        of_tokens = empty_residual_gradients(
            total, saved.layer_scale, saved.x_dtype, saved.branch_dtype, needed
        )
        if not any(name in needed for name in ("matrix", "weight", "bias")):
            return Gradients(*of_tokens, None, None)
        affine = matrix.new_empty((*saved.weight.shape[:-1], 2, total.shape[-1]))
        return Gradients(*of_tokens, empty_like(matrix), affine)

    def gradients_of_arguments(
        self, saved: Saved, grads: Gradients, needed: Collection[str]
    ) -> dict[str, Tensor | None]:
        weight, bias = (None, None) if grads.affine is None else grads.affine.unbind(dim=-2)
        learned = {"matrix": grads.matrix, "weight": weight, "bias": bias}
        return residual_gradients(grads.x, grads.branch) | learned


_OP = _PromptPool()
