"""prompt_pool in PyTorch operations, with a backward that makes one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import differentiable_once
from ..plan import is_watched
from ..residual import add_residual
from .op import Arguments

__all__ = ["compute"]


class _Inputs(NamedTuple):
    """What is computed from, all tensors of one dtype; x is the total."""

    x: Tensor
    matrix: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    num_prefix: int
    eps: float
    prompt_eps: float


def compute(args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """total, normed and pooled; see vapt_fast.ops.prompt_pool."""
    if torch.compiler.is_compiling():
        # With dynamic=True PyTorch 2.14 loses numbers that it meets first within _PromptPool: use them here.
        args.x.new_full((), args.eps + args.prompt_eps)
    total, dtype = add_residual(args.x, args.branch, args.layer_scale), args.matrix.dtype
    norm_weight, norm_bias = (None if t is None else t.to(dtype) for t in (args.norm_weight, args.norm_bias))
    affine = (args.weight, args.bias, norm_weight, norm_bias)
    numbers = (args.num_prefix, args.eps, args.prompt_eps)
    inputs = _Inputs(total.to(dtype), args.matrix, *affine, *numbers)
    # PyTorch 2.8 exports no autograd.Function with dynamic sizes, and torch.jit.save knows none.
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        normed, pooled = _literal(inputs)
    elif torch.is_grad_enabled() or is_watched():
        normed, pooled, *_ = _PromptPool.apply(*inputs)
    else:  # without what autograd.Function does in each call
        normed, pooled, *_ = _pool(inputs)
    return total, normed.to(args.dtype), pooled


def _pool(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """normed = xhat * norm_weight + norm_bias and pooled = weight * raw + bias * rowsum(M).

    Here xhat = (x - mean) * r and raw = (M * s) xhat, with r = rstd(eps) and s = rstd(prompt_eps) / r.

    Returns:
        normed, pooled, xhat, r, s and raw; None for xhat where normed is the same.
    """
    x, matrix, weight, bias, norm_weight, norm_bias, num_prefix, eps, prompt_eps = inputs
    xhat, _, r = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    # s from r itself: r is a small number where the variance is large, so nothing cancels.
    s = torch.rsqrt(1 + (prompt_eps - eps) * r[:, num_prefix:].square()).squeeze(-1)
    raw = (matrix * s.unsqueeze(1)) @ xhat[:, num_prefix:]
    pooled = weight.unsqueeze(-2) * raw + bias.unsqueeze(-2) * matrix.sum(dim=-1, keepdim=True)
    if norm_weight is None or norm_bias is None:
        return xhat, pooled, None, r, s, raw
    return torch.addcmul(norm_bias, xhat, norm_weight), pooled, xhat, r, s, raw


def _literal(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """normed and pooled by operations that autograd knows; it would take r of ``_pool`` for a constant."""
    x, matrix, weight, bias, norm_weight, norm_bias, num_prefix, eps, prompt_eps = inputs
    patches, channels = x[:, num_prefix:], x.shape[-1:]
    if weight.ndim == 1:
        z = F.layer_norm(patches, channels, weight, bias, prompt_eps)
    else:
        z = weight.unsqueeze(1) * F.layer_norm(patches, channels, eps=prompt_eps) + bias.unsqueeze(1)
    return F.layer_norm(x, channels, norm_weight, norm_bias, eps), matrix @ z


class _PromptPool(torch.autograd.Function):
    """``_pool``, which of the tokens keeps only the normalised rows for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        matrix: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        num_prefix: int,
        eps: float,
        prompt_eps: float,
    ) -> tuple[Tensor | None, ...]:
        # By name: without gradients torch.compile counts the parameters, to see whether one is a context.
        return _pool(_Inputs(x, matrix, weight, bias, norm_weight, norm_bias, num_prefix, eps, prompt_eps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, matrix, weight, bias, norm_weight, _, ctx.num_prefix, _, _ = inputs
        normed, _, xhat, r, s, raw = output
        ctx.mark_non_differentiable(*(t for t in (xhat, r, s, raw) if t is not None))
        ctx.set_materialize_grads(False)
        xhat = normed if xhat is None else xhat
        ctx.save_for_backward(xhat, r, s, matrix, weight, bias, norm_weight, raw)

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor | None, grad_pooled: Tensor | None, *_: Any) -> tuple:
        saved = ctx.saved_tensors  # once: checkpointing recomputes them
        # Within autocast, too: the forward's products were not cast.
        with torch.autocast(saved[0].device.type, enabled=False):
            grads = _gradients(ctx, saved, grad_normed, grad_pooled)
        return *differentiable_once("prompt_pool", grads), None, None, None


def _gradients(
    ctx: Any, saved: tuple, grad_normed: Tensor | None, grad_pooled: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors that _PromptPool takes, None where not needed.

    ``sum_to_size`` sums over the images what all of them share.
    """
    xhat, r, s, matrix, weight, bias, norm_weight, raw = saved
    weight, bias = weight.unsqueeze(-2), bias.unsqueeze(-2)
    needed = ctx.needs_input_grad
    grad_x = grad_matrix = grad_weight = grad_bias = grad_norm_weight = grad_norm_bias = None
    weighted = scaled = products = None
    if grad_pooled is not None:
        weighted, scaled = matrix * s.unsqueeze(1), grad_pooled * weight
        # Inner products over the channels: they give dM, and the mean of b * xhat in _grad_x.
        products = scaled @ xhat[:, ctx.num_prefix :].transpose(1, 2)
        if needed[1]:
            grad_matrix = (products * s.unsqueeze(1)).sum_to_size(matrix.shape)
            grad_matrix = grad_matrix + (grad_pooled * bias).sum_to_size((*matrix.shape[:-1], 1))
        if needed[2]:
            grad_weight = (grad_pooled * raw).sum_to_size(weight.shape).squeeze(-2)
        if needed[3]:
            of_rows = grad_pooled * matrix.sum(dim=-1, keepdim=True)
            grad_bias = of_rows.sum_to_size(bias.shape).squeeze(-2)
    if grad_normed is not None:
        if needed[4]:
            grad_norm_weight = (grad_normed * xhat).sum(dim=(0, 1))
        if needed[5]:
            grad_norm_bias = grad_normed.sum(dim=(0, 1))
    if needed[0]:
        grad_x = _grad_x(grad_normed, norm_weight, weighted, scaled, products, xhat, r, s, ctx.num_prefix)
    return (grad_x, grad_matrix, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias)


def _grad_x(
    grad_normed: Tensor | None,
    norm_weight: Tensor | None,
    weighted: Tensor | None,
    scaled: Tensor | None,
    products: Tensor | None,
    xhat: Tensor,
    r: Tensor,
    s: Tensor,
    num_prefix: int,
) -> Tensor | None:
    """The gradient of x: what xhat gets from normed, a, and from pooled, b, through the statistics.

    ``grad_normed`` is None where normed is unused; ``weighted``, ``scaled`` and ``products`` where pooled is.
    Nothing is changed in place that vmap might not have batched.
    """
    if weighted is None or scaled is None or products is None:
        if grad_normed is None:
            return None
        total = grad_normed if norm_weight is None else grad_normed * norm_weight
        return _centre(total, xhat).mul_(r)
    # The prefix has no part in b.
    by_token = F.pad(weighted, (num_prefix, 0)).transpose(1, 2)
    if grad_normed is None:
        total = by_token @ scaled
    elif norm_weight is None:
        total = torch.baddbmm(grad_normed, by_token, scaled)
    else:
        total = torch.addcmul(by_token @ scaled, grad_normed, norm_weight)
    # With total = a + b: the rewritten backward is that of one LayerNorm, less its term in
    # (1 - s^2) mean(b * xhat), which only patch tokens have.
    pooled_part = (weighted * products).sum(dim=1) * ((1 - s.square()) / xhat.shape[-1])
    correction = F.pad(pooled_part, (num_prefix, 0)).unsqueeze(-1)
    return torch.addcmul(_centre(total, xhat), xhat, correction).mul_(r)


def _centre(grad: Tensor, xhat: Tensor) -> Tensor:
    """grad - mean(grad) - xhat * mean(grad * xhat), over the channels, in one pass."""
    one = xhat.new_ones(*xhat.shape[:-1], 1)
    return torch.ops.aten.native_layer_norm_backward(
        grad, xhat, xhat.shape[-1:], torch.zeros_like(one), one, None, None, [True, False, False]
    )[0]
