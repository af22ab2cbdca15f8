"""What attends to what: the attention weights of each block, prompts among the keys, and their rollout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..arguments import choice
from ..backbones.base import family_of
from ..backbones.blocks import StandardBlock, fallback_reason, standard_block
from ..forward.reference import attention_inputs
from ..prompts import KeysValues
from .contributions import prompt_maps
from .tracing import BlockInputs, block_index, trace

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = ["Attention", "attention_weights", "rollout"]


class Attention(NamedTuple):
    """The attention weights of one block; the rows of both together sum to 1.

    Attributes:
        to_prompts: (B, h, T, P), from each of the T = S + N prefix and patch tokens to each prompt.
        to_tokens: (B, h, T, T), from each of them to each.
    """

    to_prompts: Tensor
    to_tokens: Tensor


def attention_weights(
    model: AdaptiveViT, images: Tensor, blocks: Iterable[int] | None = None
) -> dict[int, Attention]:
    """Return the attention weights of blocks, head by head.

    Args:
        model: any whose blocks are standard ones (x + attention(norm1(x)), then x + mlp(norm2(x))).
        images: (B, in_chans, height, width), as the model takes them.
        blocks: which; None for all. Negative numbers count from the end.

    Returns:
        By the block's number its Attention, in float32 at least, differentiable as the logits are. Its
        prompts are all that the block attends to: its own, and those of an earlier one that travel
        (VPT-shallow).

    Raises:
        ValueError: there is no such block.
        NotImplementedError: a block that can't be taken apart; the message says why.
    """
    chosen = range(len(model.backbone.blocks)) if blocks is None else blocks
    indices = sorted({block_index(model, block) for block in chosen})
    taken_apart = {}
    for index in indices:
        parts = standard_block(model.backbone.blocks[index])
        if parts is None:
            reason = fallback_reason(model.backbone.blocks[index])
            raise NotImplementedError(
                f"the attention of block {index} can't be taken apart: {reason}; expected a standard block "
                "of timm without hooks"
            )
        taken_apart[index] = parts
    inputs = trace(model, images)
    num_prefix = model.num_prefix_tokens
    return {
        index: _attention(parts, index, inputs[index], num_prefix) for index, parts in taken_apart.items()
    }


def _attention(parts: StandardBlock, index: int, inputs: BlockInputs, num_prefix: int) -> Attention:
    tokens, positions, prompts = inputs
    given = prompts if isinstance(prompts, KeysValues) else None
    normed = parts.block.norm1(tokens)
    q, k, _, bias, scale = attention_inputs(parts, index, normed, positions, num_prefix, given)
    scores = scale * (q @ k.transpose(-2, -1))
    scores = scores if bias is None else scores + bias
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    extra, patches = positions.num_extra, tokens.shape[1] - num_prefix - positions.num_extra
    rows = torch.cat([weights[:, :, :num_prefix], weights[:, :, tokens.shape[1] - patches :]], dim=2)
    prefix, own, rest, added = rows.split([num_prefix, extra, patches, rows.shape[-1] - tokens.shape[1]], -1)
    return Attention(torch.cat([own, added], dim=-1), torch.cat([prefix, rest], dim=-1))


def rollout(model: AdaptiveViT, images: Tensor, *, prompts: str = "spread") -> Tensor:
    """Return how much of each patch arrives in what the head reads (attention rollout, Abnar & Zuidema 2020).

    The rows of 0.5 * (mean of the heads' attention) + 0.5 * identity are multiplied up through all blocks.

    Args:
        model: as for ``attention_weights``.
        images: (B, in_chans, height, width), as the model takes them.
        prompts: what becomes of the attention to prompts. "spread": it goes to the patches that the prompt
            was computed from, in the proportions of ``prompt_maps``; prompts that are computed from no
            patches get none. "drop": no prompt gets any. Where prompts get none, the rest of a row is scaled
            to a sum of 1.

    Returns:
        (B, H, W) over the patch grid, in float32 at least: shares, without those of the prefix tokens. They
        are the first token's where the model pools that (of a distilled one, the mean of both), else the
        mean of the patches'.

    Raises:
        ValueError: another word for ``prompts``.
        NotImplementedError: as ``attention_weights`` and, with "spread", ``prompt_maps`` raise it.
    """
    choice("prompts", prompts, ("spread", "drop"))
    num_prefix = model.num_prefix_tokens
    maps = prompt_maps(model, images) if prompts == "spread" else {}
    shares = None
    for index, attention in attention_weights(model, images).items():
        mixing = attention.to_tokens.mean(1)
        if index in maps:
            by_patch = maps[index].flatten(2).to(mixing.dtype)
            by_patch = by_patch / by_patch.sum(-1, keepdim=True).clamp_min(torch.finfo(mixing.dtype).tiny)
            given = attention.to_prompts.mean(1) @ by_patch
            mixing = torch.cat([mixing[..., :num_prefix], mixing[..., num_prefix:] + given], dim=-1)
        mixing = mixing / mixing.sum(-1, keepdim=True)
        mixing = 0.5 * mixing + 0.5 * torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device)
        shares = mixing if shares is None else mixing @ shares
    assert shares is not None  # a backbone has blocks
    pooled = family_of(model.backbone).num_pooled_rows(model.backbone)
    rows = shares[:, num_prefix:] if pooled is None else shares[:, :pooled]
    return rows.mean(1)[:, num_prefix:].unflatten(1, model.grid)
