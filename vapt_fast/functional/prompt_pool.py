"""Normalise the tokens once, for the block and for the prompts, and pool the patch tokens into prompts."""

from __future__ import annotations

from torch import Tensor

from ._checks import (
    check_affine,
    check_float,
    check_integer,
    check_number,
    check_residual,
    check_same_device,
    check_shape,
)
from ._implementation import run

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
    """Two LayerNorms of the same rows with one statistic, the second one pooled over the positions.

    total = x + layer_scale * branch: the tokens after the branch before, as in add_norm.
    normed = (total - mean) * rstd(eps) * norm_weight + norm_bias, over C: what the block's projections read.
    pooled = M z, z = weight * (total - mean) * rstd(prompt_eps) + bias over the patch tokens (VAPT, arXiv
    2501.18936, section 4.1), computed as weight * ((M * s) xhat) + bias * rowsum(M), with
    xhat = (total - mean) * rstd(eps) and s = rstd(prompt_eps) / rstd(eps) for each row.

    Args:
        x: tokens (B, S + N, C), the S = ``num_prefix`` prefix tokens first; any floating dtype.
        matrix: M of (R, N), float32 (float64 for float64 tokens); see prompt_matrices.
        weight, bias: (C,), the affine of the prompts' LayerNorm.
        num_prefix: prefix tokens, which are normalised but not pooled.
        norm_weight, norm_bias: (C,), the affine of the block's LayerNorm, any floating dtype; both or none.
        branch: (B, S + N, C), what a branch of a block adds to the tokens; None: nothing.
        layer_scale: (C,), the branch's LayerScale; None for 1.
        eps: of the block's LayerNorm.
        prompt_eps: of the prompts' LayerNorm.
        backend: "auto", "torch", "triton" or "cuda"; None for the current one, see use_backend.

    Returns:
        total (B, S + N, C), in the dtype of x + branch (``x`` itself without branch); normed (B, S + N, C), in
        total's dtype or in that of autocast where it is on, as in add_norm; pooled (B, R, C) in ``matrix``'s
        dtype. Statistics and sums are in ``matrix``'s dtype, also under autocast; the kernels round the
        factors of products to tf32 where normed is of 16 bits, and those of "cuda" are for nothing else.
        Differentiable in all tensors, once: the backward is written by hand. The kernels have no gradient of
        norm_weight, norm_bias and layer_scale: where gradients are on, these must not require one there.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device; no patch token.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    check_shape("x", x, "(B, T, C)", None, None, None)
    _, num_tokens, dim = x.shape
    num_prefix = check_integer("num_prefix", num_prefix, least=0)
    if num_prefix >= num_tokens:
        raise ValueError(f"num_prefix must leave at least one of {num_tokens} tokens, got {num_prefix}")
    check_shape("matrix", matrix, "(R, N)", None, num_tokens - num_prefix)
    check_shape("weight", weight, "(C,)", dim)
    check_shape("bias", bias, "(C,)", dim)
    check_affine(dim, norm_weight=norm_weight, norm_bias=norm_bias)
    check_residual(x, branch, layer_scale)
    eps = check_number("eps", eps, "a finite number of at least 0", least=0)
    prompt_eps = check_number("prompt_eps", prompt_eps, "a finite number of at least 0", least=0)
    tensors = {
        "x": x,
        "matrix": matrix,
        "weight": weight,
        "bias": bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "branch": branch,
        "layer_scale": layer_scale,
    }
    check_float(**tensors)
    check_same_device(**tensors)
    return run("prompt_pool", backend, *tensors.values(), num_prefix, eps, prompt_eps)
