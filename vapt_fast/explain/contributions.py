"""Which patches shape which prompt: exact linear attribution through the pooling matrix of adaptive prompts.

Before the projector a prompt is linear in the normalised patch tokens, t[p] = sum_n M[p, n] z[n] + b[p], with
the convolution and the projection over positions in one matrix M. What patch n contributes is its summand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prompts import AdaptivePrompts
from .tracing import BlockInputs, block_index, trace

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = ["Contributions", "pooled_contributions", "prompt_maps"]


class Contributions(NamedTuple):
    """The summands of the pooled prompts of one block: ``patches.sum(2) + rest`` are the prompts.

    Attributes:
        patches: (B, P, N, C), what each patch contributes to each prompt.
        rest: (1, P, 1), the bias; or (B, P, C), the bias and what the average patch would give everywhere.
    """

    patches: Tensor
    rest: Tensor

    @property
    def pooled(self) -> Tensor:
        """The prompts before the projector, (B, P, C)."""
        return self.patches.sum(2) + self.rest


def pooled_contributions(
    model: AdaptiveViT, images: Tensor, block: int, *, centred: bool = False
) -> Contributions:
    """Return what each patch contributes to each prompt of a block, exactly.

    Args:
        model: with adaptive prompts in that block.
        images: (B, in_chans, height, width), as the model takes them.
        block: its number; negative ones count from the end.
        centred: count from the average patch token of the image, whose share then belongs to ``rest``: a
            patch contributes what changes if it becomes the average patch. Else count from zero.

    Returns:
        Contributions in float32 at least, differentiable as the logits are. They take B * P * N * C numbers.

    Raises:
        ValueError: the block has no adaptive prompts.
        NotImplementedError: their weights may not be read, because of hooks, LoRA and the like.
    """
    index = block_index(model, block)
    prompts = _adaptive_blocks(model).get(index)
    if prompts is None:
        raise ValueError(
            f"block must be one with prompts of kind 'adaptive', computed from patches, got {block}; those "
            f"are {sorted(_adaptive_blocks(model))}"
        )
    matrix, z = _linear_parts(index, prompts, trace(model, images)[index])
    rest = prompts.token_projection.bias.to(z.dtype).view(1, -1, 1)
    if centred:
        mean = z.mean(1, keepdim=True)
        z, rest = z - mean, rest + matrix.sum(1) * mean
    return Contributions(matrix * z.unsqueeze(1), rest)


def prompt_maps(model: AdaptiveViT, images: Tensor, *, centred: bool = True) -> dict[int, Tensor]:
    """Measure how much each patch of each image shapes each prompt: the norms of ``pooled_contributions``.

    Args:
        model: any.
        images: (B, in_chans, height, width), as the model takes them.
        centred: as for ``pooled_contributions``. The norm is then how far the prompt moves if the patch
            becomes the average patch of its image.

    Returns:
        By the number of each block with adaptive prompts, maps (B, P, H, W) over the patch grid, in float32
        at least; empty where there are none. Differentiable as the logits are.

    Raises:
        NotImplementedError: as ``pooled_contributions`` raises it.
    """
    adaptive = _adaptive_blocks(model)
    maps = {}
    for index, inputs in enumerate(trace(model, images) if adaptive else ()):
        if index not in adaptive:
            continue
        matrix, z = _linear_parts(index, adaptive[index], inputs)
        z = z - z.mean(1, keepdim=True) if centred else z
        squares = torch.einsum("pnc,bnc->bpn", matrix.square(), z.square())
        maps[index] = squares.sqrt().unflatten(2, model.grid)
    return maps


def _adaptive_blocks(model: AdaptiveViT) -> dict[int, AdaptivePrompts]:
    blocks = enumerate(model.prompts.blocks)
    return {index: block for index, block in blocks if isinstance(block, AdaptivePrompts)}


def _linear_parts(index: int, prompts: AdaptivePrompts, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
    """Return M, (P, N, 1 or C), and the normalised patch tokens z, (B, N, C)."""
    if not prompts.can_pool(None):
        raise NotImplementedError(
            f"model.prompts.blocks[{index}] has hooks, another forward, or weights of another kind: its "
            "prompts may be another function than the one that is explained; remove these first"
        )
    matrix = prompts.pooling_matrix()
    dtype = torch.promote_types(matrix.dtype, inputs.tokens.dtype)
    patches = inputs.tokens[:, -matrix.shape[1] :].to(dtype)
    with torch.autocast(patches.device.type, enabled=False):
        weight, bias = prompts.norm.weight.to(dtype), prompts.norm.bias.to(dtype)
        return matrix.to(dtype), F.layer_norm(patches, patches.shape[-1:], weight, bias, prompts.norm.eps)
