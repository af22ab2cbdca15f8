"""prompt_matrices: the convolution and the projection over positions as one matrix (P, N)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import boolean
from .checks import check_float, check_grid, check_integer, check_same_device, check_shape

__all__ = ["prompt_matrices"]


def prompt_matrices(
    weight: Tensor,
    kernel: Tensor | None,
    grid: tuple[int, int],
    *,
    padding: int = 0,
    depthwise: bool = False,
) -> Tensor:
    """Fold a convolution with the linear projection that follows it, for A blocks at once.

    A convolution (stride 1) with one kernel k for all channels, followed by t = W z', is linear in space, so
    t = M z with M = conv_transpose2d(W, k). With one kernel a channel the matrix differs by channel, as a
    weighted sum of K*K matrices that don't: M_c = sum_s k_c[s] M_s, with M_s the projection shifted by s.

    Args:
        weight: (A, P, H'W'), floating, the projections over the positions of the convolved grid.
        kernel: (A, K, K) shared kernels; (A, C, K, K) where ``depthwise``; None without convolution.
        grid: (H, W), patches along each side; H' = H + 2 * padding - K + 1, likewise W'.
        padding: zero padding on each side, in patches.
        depthwise: one kernel a channel.

    Returns:
        M of (A, P, H*W), in ``weight``'s dtype; where ``depthwise`` the shifted M_s, (A, K*K*P, H*W), rows
        ordered by shift, then prompt. Differentiable in ``weight`` and (not depthwise) ``kernel``.

    Raises:
        TypeError, ValueError: an argument of a wrong type or shape.
    """
    grid, padding = check_grid(grid), check_integer("padding", padding, least=0)
    depthwise = boolean("depthwise", depthwise)
    check_shape("weight", weight, "(A, P, H'W')", None, None, None)
    if kernel is None:
        check_shape("weight", weight, "(A, P, H*W)", None, None, math.prod(grid))
        check_float(weight=weight)
        return weight
    blocks = weight.shape[0]
    # -1 for what has no last dimension: no shape fits it.
    size = kernel.shape[-1] if isinstance(kernel, Tensor) and kernel.ndim else -1
    if depthwise:
        check_shape("kernel", kernel, "(A, C, K, K)", blocks, None, size, size)
    else:
        check_shape("kernel", kernel, "(A, K, K)", blocks, size, size)
    out = [side + 2 * padding - size + 1 for side in grid]
    if min(out) < 1:
        raise ValueError(
            f"kernel must fit into grid {grid} with padding {padding}, got {tuple(kernel.shape)}"
        )
    check_shape("weight", weight, "(A, P, H'W')", blocks, None, math.prod(out))
    check_float(weight=weight, kernel=kernel)
    check_same_device(weight=weight, kernel=kernel)
    prompts = weight.shape[1]
    maps = torch.unflatten(weight, -1, out)
    if not depthwise:
        # Blocks as groups, prompts as the batch: one call for all blocks.
        matrices = F.conv_transpose2d(
            maps.transpose(0, 1), kernel.to(weight.dtype).unsqueeze(1), padding=padding, groups=blocks
        )
        return matrices.transpose(0, 1).flatten(2)
    shifts = torch.eye(size * size, dtype=weight.dtype, device=weight.device).view(1, -1, size, size)
    matrices = F.conv_transpose2d(maps.reshape(-1, 1, *out), shifts, padding=padding)
    matrices = matrices.view(blocks, prompts, size * size, -1).transpose(1, 2)
    return matrices.reshape(blocks, size * size * prompts, -1)
