"""The literal forward pass: the paper, word for word, in plain PyTorch. The oracle of every other backend.

Before block i the P prompt tokens are placed after the prefix tokens; after it they are thrown away, unless
they travel on (VPT-shallow). How prompts are computed is in vapt_fast.prompts; vapt_fast.forward.fused is the
same function, rewritten to be cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import backbones
from ..backbones import Positions, TimmViT
from ..backbones.blocks import StandardBlock, split_block
from ..backbones.positions import pad_bias
from ..modules import call_within
from ..prompts import KeysValues, Prompts

__all__ = ["add_branch", "attention_inputs", "forward_tokens", "insert", "rotate", "score_bias"]


def forward_tokens(
    model: TimmViT,
    prompts: Prompts,
    images: Tensor,
    masks: list[Any],
    *,
    num_blocks: int | None = None,
    taps: dict[int, Tensor] | None = None,
    checkpointing: bool = False,
    observe: Callable[[int, Tensor, Positions, Any], None] | None = None,
) -> tuple[Tensor, int]:
    """All tokens after the last block, before the final norm.

    Args:
        model: the timm backbone.
        prompts: the learnable parameters.
        images: (B, in_chans, height, width).
        masks: of the dropouts, one for each entry of ``prompts.blocks``.
        num_blocks: run only this many first blocks.
        taps: the tokens (B, T, C) after block i, without prompts, are stored under each key i that is there.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        observe: called before each block with its index, the tokens that enter it (prompts among them), their
            positions, and its own prompts: tokens, KeysValues or None.

    Returns:
        tokens (B, S + Q + N, C) and Q, the number of prompt tokens they hold after the S prefix tokens.
    """
    tokens, positions = backbones.embed(model, images)
    num_prefix, depth = model.num_prefix_tokens, len(model.blocks)
    num_blocks = depth if num_blocks is None else num_blocks
    travelling = 0

    def run_blocks(blocks: nn.Module, tokens: Tensor) -> Tensor:
        nonlocal travelling
        for index in range(num_blocks):
            start, count = num_prefix + travelling, 0
            given = prompts.compute(index, tokens[:, start:], masks[index]) if index < len(masks) else None
            call = backbones.call_block
            if isinstance(given, KeysValues):
                call = partial(_call_block_with, given)
            elif given is not None:
                tokens, count = insert(tokens, given, start), given.shape[1]
            arguments = (model, index, tokens, positions.with_extra(travelling + count))
            if observe is not None:
                observe(*arguments[1:], given)
            tokens = checkpoint(call, *arguments, use_reentrant=False) if checkpointing else call(*arguments)
            if count and prompts.travels(index, depth):
                travelling += count
            else:
                tokens = backbones.remove_prompts(tokens, start, count)
            if taps is not None and index in taps:
                taps[index] = backbones.remove_prompts(tokens, num_prefix, travelling)
        return tokens

    return call_within(model.blocks, run_blocks, tokens), travelling


def insert(tokens: Tensor, prompts: Tensor, at: int) -> Tensor:
    """Return the tokens (B, T, C) with ``prompts`` (B or 1, P, C) placed before token ``at``."""
    before, after = tokens.tensor_split([at], dim=1)
    prompts = prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
    return torch.cat([before, prompts, after], dim=1)


def _call_block_with(
    given: KeysValues, model: TimmViT, index: int, tokens: Tensor, positions: Positions
) -> Tensor:
    """Return block ``index`` of the tokens with more keys and values in its attention (prefix tuning).

    They are appended head by head just before the softmax: no norm, projection or position is theirs, and the
    attention's bias is zero for them.
    """
    parts = split_block(model.blocks[index])
    block = parts.block
    inputs = attention_inputs(parts, index, block.norm1(tokens), positions, model.num_prefix_tokens, given)
    q, k, v, bias, scale = inputs
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    tokens = add_branch(tokens, *parts.finish_attention(out.transpose(1, 2).flatten(2)))
    return add_branch(tokens, *parts.scaled(block.mlp(block.norm2(tokens)), 2))


def attention_inputs(
    parts: StandardBlock,
    index: int,
    normed: Tensor,
    positions: Positions,
    num_prefix: int,
    given: KeysValues | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Return what the attention of block ``index`` computes with, for softmax(scale * q k^T + bias) v.

    Args:
        parts: the block.
        index: its number.
        normed: (B, T, C), all tokens after norm1, prompts among them.
        positions: where they are.
        num_prefix: the number of prefix tokens, without prompts.
        given: K further keys and values.

    Returns:
        q (B, h, T, d), k and v (B, h, T + K, d); bias (1, h, T, T + K) or None; scale.
    """
    q, k, v, *_ = parts.project(normed, normed[:1, :0], None)
    q = q if parts.q_norm is None else parts.q_norm(q)
    k = k if parts.k_norm is None else parts.k_norm(k)
    rope = positions.patch_rope(index)
    if rope is not None:
        q, k = (rotate(parts, x, rope, num_prefix + positions.num_extra).type_as(v) for x in (q, k))
    bias = score_bias(parts, positions, num_prefix, None)
    if given is not None:
        new = [torch.unflatten(x, -1, (parts.num_kv_heads, -1)).type_as(v) for x in given]
        k, v = (torch.cat([x, y.expand(len(x), -1, -1, -1)], dim=1) for x, y in zip((k, v), new, strict=True))
        bias = None if bias is None else F.pad(bias, (0, new[0].shape[1]))
    repeats = parts.num_heads // parts.num_kv_heads
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return q, k, v, None if bias is None else bias.type_as(v), parts.softmax_scale(q.shape[-1])


def add_branch(tokens: Tensor, branch: Tensor, layer_scale: Tensor | None) -> Tensor:
    """Return tokens + layer_scale * branch; None for 1."""
    return tokens + (branch if layer_scale is None else layer_scale * branch)


def score_bias(
    parts: StandardBlock, positions: Positions, num_prefix: int, num_rows: int | None
) -> Tensor | None:
    """Return (1, h, rows, T), what is added to the scores of the tokens, or None."""
    biases = [bias for bias in (parts.bias, positions.bias) if bias is not None]
    if not biases:
        return None
    bias = pad_bias(sum(biases[1:], biases[0]), positions.num_extra, num_prefix)
    bias = bias if bias.ndim == 4 else bias.unsqueeze(0)
    return bias[:, :, :num_rows]


def rotate(parts: StandardBlock, x: Tensor, rope: Tensor, num_prefix: int) -> Tensor:
    """Return x (B, T, h, d) with rotary embeddings of the patch tokens; prefix tokens stay as they are."""
    if x.shape[1] <= num_prefix:
        return x
    prefix, patches = x.transpose(1, 2).tensor_split([num_prefix], dim=2)
    patches = apply_rot_embed_cat(patches, rope, half=getattr(parts.attn, "rotate_half", False))
    return torch.cat([prefix, patches], dim=2).transpose(1, 2)
