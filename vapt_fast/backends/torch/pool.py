"""prompt_pool: one LayerNorm statistic for the block and for the prompts, and its backward in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autocast import autocast_dtype
from .._autograd import differentiable_once
from .norm import add_residual

__all__ = ["prompt_pool"]


def prompt_pool(
    x: Tensor,
    matrix: Tensor,
    weight: Tensor,
    bias: Tensor,
    delta: Tensor | None,
    gain: Tensor | None,
    num_prefix: int,
    eps: float,
    prompt_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See vapt_fast.functional.prompt_pool."""
    if torch.compiler.is_compiling():
        # With dynamic=True PyTorch 2.14 loses numbers that it meets first within _PromptPool: use them here.
        x.new_full((), eps + prompt_eps)
    total, dtype = add_residual(x, delta, gain), matrix.dtype
    arguments = (matrix, weight.to(dtype), bias.to(dtype), num_prefix, eps, prompt_eps)
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_exporting():  # PyTorch 2.8 exports no autograd.Function with dynamic sizes
            normed, pooled, *_ = _pool(total.to(dtype), *arguments)
        else:
            normed, pooled = _PromptPool.apply(total.to(dtype), *arguments)
    return total, normed.to(autocast_dtype(total.dtype, total.device)), pooled


def _pool(
    x: Tensor, matrix: Tensor, weight: Tensor, bias: Tensor, num_prefix: int, eps: float, prompt_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """normed = (x - mu) * r, pooled = weight * raw + bias * rowsum(M); r, s and raw = (M * s) normed.

    r = rstd(eps) and s = rstd(prompt_eps) / r. All tensors are of one dtype.
    """
    normed, _, r = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    # s from r itself: r is a small number where the variance is large, so nothing cancels.
    s = torch.rsqrt(1 + (prompt_eps - eps) * r[:, num_prefix:].square()).squeeze(-1)
    raw = (matrix * s.unsqueeze(1)) @ normed[:, num_prefix:]
    return normed, weight * raw + bias * matrix.sum(dim=1, keepdim=True), r, s, raw


class _PromptPool(torch.autograd.Function):
    """``_pool``, which of the tokens keeps only the normalised rows for the backward."""

    @staticmethod
    def forward(ctx, x, matrix, weight, bias, num_prefix, eps, prompt_eps):
        normed, pooled, r, s, raw = _pool(x, matrix, weight, bias, num_prefix, eps, prompt_eps)
        ctx.save_for_backward(normed, r, s, matrix, weight, bias, raw)
        ctx.num_prefix = num_prefix
        return normed, pooled

    @staticmethod
    def backward(ctx, grad_normed, grad_pooled):
        normed, r, s, matrix, weight, bias, raw = ctx.saved_tensors
        patches = normed[:, ctx.num_prefix :]
        scaled = grad_pooled * weight
        # Inner products over the channels: they give dM, and the mean of b * normed below.
        products = scaled @ patches.transpose(1, 2)
        grad_x = grad_matrix = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            weighted = matrix * s.unsqueeze(1)
            total = grad_normed.clone(memory_format=torch.contiguous_format)
            total[:, ctx.num_prefix :].baddbmm_(weighted.transpose(1, 2), scaled)
            # With total = a + b: the rewritten backward is that of one LayerNorm, less its term in
            # (1 - s^2) mean(b * normed), which only patch tokens have.
            pooled_part = (weighted * products).sum(dim=1) * ((1 - s.square()) / normed.shape[-1])
            correction = F.pad(pooled_part, (ctx.num_prefix, 0)).unsqueeze(-1)
            centred = _centre(total, normed)
            grad_x = centred.addcmul_(normed, correction).mul_(r)
        if ctx.needs_input_grad[1]:
            grad_matrix = (products * s.unsqueeze(1)).sum(dim=0)
            grad_matrix = grad_matrix + (grad_pooled * bias).sum(dim=(0, 2)).unsqueeze(-1)
        if ctx.needs_input_grad[2]:
            grad_weight = (grad_pooled * raw).sum(dim=(0, 1))
        if ctx.needs_input_grad[3]:
            grad_bias = (grad_pooled * matrix.sum(dim=1, keepdim=True)).sum(dim=(0, 1))
        grads = differentiable_once("prompt_pool", grad_x, grad_matrix, grad_weight, grad_bias)
        return *grads, None, None, None


def _centre(grad: Tensor, normed: Tensor) -> Tensor:
    """grad - mean(grad) - normed * mean(grad * normed), over the channels, in one pass."""
    one = normed.new_ones(*normed.shape[:-1], 1)
    return torch.ops.aten.native_layer_norm_backward(
        grad, normed, normed.shape[-1:], torch.zeros_like(one), one, None, None, [True, False, False]
    )[0]
