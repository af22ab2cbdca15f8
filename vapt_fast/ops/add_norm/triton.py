"""add_norm on Triton: the launches of vapt_fast.kernels.add_norm."""

from __future__ import annotations

from torch import Tensor

from ...kernels import add_norm as kernels
from ..base import or_zeros
from ..checks import unsupported_dtypes
from ..triton_launch import launch, num_blocks, strided
from . import tuning
from .op import Arguments, Gradients, Outputs, Saved

__all__ = ["backward", "forward", "launch_forward", "unsupported_reasons"]


def unsupported_reasons(args: Arguments) -> list[str]:
    """Every reason why the kernels can't take ``args``."""
    return unsupported_dtypes(
        x=args.x, branch=args.branch, weight=args.weight, bias=args.bias, layer_scale=args.layer_scale
    )


def forward(args: Arguments, out: Outputs) -> None:
    """Write total (where there is a branch), normed, mean and rstd."""
    launch_forward(args.x, args.branch, args.layer_scale, args.weight, args.bias, args.eps, *out)


def launch_forward(
    x: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    total: Tensor,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Run the forward kernel; prompt_pool does so too."""
    batch, num_tokens, dim = x.shape
    config = tuning.config("fwd", mean.dtype, dim)
    launch(
        kernels.add_norm_fwd_kernel,
        config,
        num_blocks(config, BLOCK_T=batch * num_tokens),
        *map(strided, (x, branch, layer_scale, weight, bias)),
        *(total, normed, mean, rstd, batch * num_tokens, num_tokens, dim),
        EPS=eps,
        CHUNKS=num_blocks(config, BLOCK_C=dim),
    )


def backward(saved: Saved, grad_results: tuple[Tensor | None, ...], grads: Gradients) -> None:
    """Write the gradients of x and branch."""
    total = saved.total
    batch, num_tokens, dim = total.shape
    config = tuning.config("bwd", saved.mean.dtype, dim)
    grad_total, grad_normed = grad_results
    grad_total = None if saved.branch_dtype is None else grad_total
    launch(
        kernels.add_norm_bwd_kernel,
        config,
        num_blocks(config, BLOCK_T=batch * num_tokens),
        *map(strided, (total, grad_total, or_zeros(grad_normed, total), saved.layer_scale, saved.weight)),
        *(saved.mean, saved.rstd, *grads, batch * num_tokens, num_tokens, dim),
        CHUNKS=num_blocks(config, BLOCK_C=dim),
    )
