"""The forward pass, rewritten: the same function as vapt_fast.forward.reference for a fraction of the work.

None of it is an approximation. The pooling (convolution, then projection over positions) is one matrix,
built for all blocks at once. Prompts are thrown away after a block, so they are only ever keys and values.
The head of a CLS-pooled model reads one row, so the last block computes one row, and its keys and values are
absorbed into that row's query. One LayerNorm statistic serves the block and its prompts. A block, or prompts,
that can't be taken apart (see vapt_fast.backbones.blocks) are called as they are. No number outlives a call.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import backbones
from ..backbones import Positions, TimmViT
from ..backbones.blocks import StandardBlock, fallback_reason, split_block, standard_block
from ..backbones.patches import embed_patches
from ..functional import (
    absorbed_attention,
    add_norm,
    mlp,
    prompt_attention,
    prompt_attention_packed,
)
from ..modules import call_within
from ..prompts import KeysValues, Prompts
from ..prompts.base import layer_norm
from .reference import add_branch, insert, rotate, score_bias

__all__ = ["forward_tokens"]

_log = logging.getLogger("vapt_fast")


def forward_tokens(
    model: TimmViT,
    prompts: Prompts,
    images: Tensor,
    masks: list[Any],
    *,
    backend: str | None = None,
    num_rows: int | None = None,
    num_blocks: int | None = None,
    taps: dict[int, Tensor] | None = None,
    checkpointing: bool = False,
) -> tuple[Tensor, int]:
    """All tokens after the last block, before the final norm; or only the first ``num_rows`` of them.

    Args:
        model: the timm backbone.
        prompts: the learnable parameters.
        images: (B, in_chans, height, width).
        masks: of the dropouts, one for each entry of ``prompts.blocks``.
        backend: of the ops. It is handed down rather than read from the context by each op, because
            checkpointing runs them again in the backward pass, in another context.
        num_rows: compute no more than this many first tokens (prefix tokens) in the last block.
        num_blocks: run only this many first blocks.
        taps: the tokens (B, T, C) after block i, without prompts, are stored under each key i that is there.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Returns:
        tokens (B, S + Q + N, C) and Q, the number of prompt tokens they hold after the S prefix tokens; or
        (B, num_rows, C) and 0.
    """
    # On a CPU the convolution is the faster of the two.
    call = nn.Module.__call__ if images.device.type == "cpu" else embed_patches
    tokens, positions = backbones.embed(model, images, call)
    num_prefix = model.num_prefix_tokens
    depth = len(model.blocks)
    num_blocks = depth if num_blocks is None else num_blocks
    sources = prompts.sources(masks[:num_blocks], tokens.dtype, backend)
    travelling = 0

    def run_blocks(blocks: Any, tokens: Tensor) -> Tensor:
        nonlocal travelling
        stream = _Stream(tokens)
        for index, block in enumerate(list(blocks)[:num_blocks]):
            last = index == depth - 1
            source = sources[index] if index < len(sources) else None
            if source is not None and prompts.travels(index, depth):
                # These prompts are needed after the block: from here on they are tokens like any other, a
                # longer prefix without positions.
                tokens, start = stream.total(), num_prefix + travelling
                new = source.make(tokens, start)
                stream = _Stream(insert(tokens, new, start))
                travelling, source = travelling + new.shape[1], None
            options: dict[str, Any] = {
                "block": block,
                "source": source,
                "positions": positions.with_extra(travelling),
                "num_prefix": num_prefix + travelling,
                "backend": backend,
                "num_rows": num_rows if last else None,
            }
            if checkpointing:
                run = partial(_run_block, model, index, **options)
                stream = checkpoint(run, stream, use_reentrant=False)
            else:
                stream = _run_block(model, index, stream, **options)
            if taps is not None and index in taps:
                stream = _Stream(stream.total())
                taps[index] = backbones.remove_prompts(stream.tokens, num_prefix, travelling)
        return stream.total()

    tokens = call_within(model.blocks, run_blocks, tokens)
    return tokens, 0 if num_rows is not None else travelling


class _Stream(NamedTuple):
    """The tokens (B, T, C) between two blocks: ``tokens`` + ``layer_scale`` * ``branch``, not added up yet.

    The norm that comes next adds them in its own pass over the tokens.
    """

    tokens: Tensor
    branch: Tensor | None = None
    layer_scale: Tensor | None = None

    def total(self) -> Tensor:
        """The sum."""
        if self.branch is None:
            return self.tokens
        return add_branch(self.tokens, self.branch, self.layer_scale)

    def normalised(self, norm: nn.LayerNorm | None, module: nn.Module, backend: str | None) -> tuple:
        """The sum, and it normalised by ``norm``; by a call of ``module`` where that is None."""
        if norm is None:
            total = self.total()
            return total, module(total)
        return add_norm(
            self.tokens,
            self.branch,
            norm.weight,
            norm.bias,
            layer_scale=self.layer_scale,
            eps=norm.eps,
            backend=backend,
        )


class _Keys(NamedTuple):
    """The prompts of a block, of which attention has keys and values.

    Attributes:
        normed: (B or 1, P, C), prompts after the block's norm, whose keys and values are projected.
        given: keys and values that take their place.
        is_given: (B,), the images where they do; None for all.
        lengths: (B,), how many of the P prompts each image has; None for all.
    """

    normed: Tensor
    given: KeysValues | None = None
    is_given: Tensor | None = None
    lengths: Tensor | None = None

    def choose(self, given: Tensor, projected: Tensor) -> Tensor:
        """Return what is given, or for the other images what was projected."""
        if self.is_given is None:
            return given
        return torch.where(self.is_given.view(-1, *[1] * (given.ndim - 1)), given, projected)


# ---- one block


def _run_block(
    model: TimmViT,
    index: int,
    stream: _Stream,
    *,
    block: Any,
    source: Any,
    positions: Positions,
    num_prefix: int,
    backend: str | None,
    num_rows: int | None,
) -> _Stream:
    """The tokens through block ``index`` with the prompts of ``source``; all rows or the first ones."""
    parts = standard_block(block)
    if parts is None:
        if not torch.compiler.is_compiling() and _log.isEnabledFor(logging.DEBUG):
            _log.debug("block %d is called as it is, without rewrites: %s", index, fallback_reason(block))
        tokens, count = stream.total(), 0
        if source is not None:
            prompts = source.make(tokens, num_prefix)
            if isinstance(prompts, KeysValues):
                split_block(block)  # raises
            tokens, count = insert(tokens, prompts, num_prefix), prompts.shape[1]
        tokens = backbones.call_block(model, index, tokens, positions.with_extra(count))
        return _Stream(backbones.remove_prompts(tokens, num_prefix, count)[:, :num_rows])
    tokens, normed, prompts = _normalise(parts, stream, source, num_prefix, backend)
    bias = score_bias(parts, positions, num_prefix - positions.num_extra, num_rows)
    rope = positions.patch_rope(index)
    out = _attention(parts, normed, prompts, rope, bias, num_prefix, num_rows, backend)
    branch, layer_scale = parts.finish_attention(out)
    stream = _Stream(tokens if num_rows is None else tokens[:, :num_rows], branch, layer_scale)
    tokens, normed = stream.normalised(parts.norm2, block.norm2, backend)
    return _Stream(tokens, *parts.scaled(_mlp(parts, normed, backend), 2))


def _mlp(parts: StandardBlock, normed: Tensor, backend: str | None) -> Tensor:
    """Return the MLP of the normalised tokens (B, T, C), in one op where its kind and precision allow."""
    if parts.gelu_mlp is None:
        out: Tensor = parts.block.mlp(normed)
        return out
    fc1, fc2 = parts.gelu_mlp
    if fc1.fp8 or fc2.fp8:
        return fc2(fc1(normed), gelu=True)
    return mlp(normed, fc1.weight, fc1.bias, fc2.weight, fc2.bias, backend=backend)


def _normalise(
    parts: StandardBlock,
    stream: _Stream,
    source: Any,
    num_prefix: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, _Keys]:
    """Normalise the tokens, and the prompts of ``source``, by the block's norm1.

    Returns:
        the tokens (B, T, C) before the norm; they and the prompts after it.
    """
    norm, module = parts.norm1, parts.block.norm1
    mixed = {name: getattr(source, name, None) for name in ("given", "is_given", "lengths")}
    if norm is not None and hasattr(source, "pool"):
        branch = {"branch": stream.branch, "layer_scale": stream.layer_scale}
        tokens, normed, prompts = source.pool(stream.tokens, num_prefix, norm, **branch)
        return tokens, normed, _Keys(prompts, **mixed)
    tokens, normed = stream.normalised(norm, module, backend)
    made = None if source is None else source.make(tokens, num_prefix)
    if made is None or isinstance(made, KeysValues):
        return tokens, normed, _Keys(normed.new_zeros(1, 0, normed.shape[-1]), **mixed | {"given": made})
    prompts = module(made.to(tokens.dtype)) if norm is None else layer_norm(made, norm)
    return tokens, normed, _Keys(prompts.to(normed.dtype), **mixed)


def _attention(
    parts: StandardBlock,
    normed: Tensor,
    prompts: _Keys,
    rope: Tensor | None,
    bias: Tensor | None,
    num_prefix: int,
    num_rows: int | None,
    backend: str | None,
) -> Tensor:
    """Return what the heads give for the first ``num_rows`` tokens (None: all), (B, rows, h * d).

    The prompts are projected to keys and values; those that are given already join as they are.
    """
    heads, kv_heads, given = parts.num_heads, parts.num_kv_heads, prompts.given
    as_projected = rope is None and parts.k_norm is None  # whether keys are what the projection gives
    options: dict[str, Any] = {"bias": bias, "prompt_lengths": prompts.lengths, "backend": backend}
    if num_rows is None and as_projected and parts.q_norm is None and parts.qkv is not None:
        scale = parts.softmax_scale(parts.qkv.weight.shape[0] // (heads + 2 * kv_heads))
        qkv = parts.qkv(normed)
        of_kv = parts.q_and_kv()[1]
        if given is None:
            prompt_kv = of_kv(prompts.normed)
        else:
            prompt_kv = torch.cat(given, dim=-1).to(qkv.dtype)
            if prompts.is_given is not None:
                prompt_kv = prompts.choose(prompt_kv, of_kv(prompts.normed))
        out = prompt_attention_packed(
            qkv, prompt_kv, num_heads=heads, num_kv_heads=kv_heads, scale=scale, **options
        )
    elif num_rows is not None and as_projected and heads == kv_heads and parts.qkv and given is None:
        out = _absorbed_attention(parts, normed, prompts.normed, num_rows, options)
    else:
        q, k, v, prompt_k, prompt_v = parts.project(normed, prompts.normed, num_rows)
        if parts.q_norm is not None:
            q = parts.q_norm(q)
        if parts.k_norm is not None:
            k, prompt_k = parts.k_norm(k), parts.k_norm(prompt_k)
        if rope is not None:
            q, k = (rotate(parts, x, rope, num_prefix).type_as(v) for x in (q, k))
        if given is not None:
            keys, values = (torch.unflatten(x, -1, (kv_heads, -1)).type_as(v) for x in given)
            prompt_k, prompt_v = prompts.choose(keys, prompt_k), prompts.choose(values, prompt_v)
        scale = parts.softmax_scale(q.shape[-1])
        out = prompt_attention(q, k, v, prompt_k, prompt_v, scale=scale, **options)
    return out.flatten(2)


def _absorbed_attention(
    parts: StandardBlock, normed: Tensor, prompts: Tensor, num_rows: int, options: dict
) -> Tensor:
    """The attention of a few rows without ever making the keys and values: (B, rows, h, d).

    A key's bias shifts all scores of a query alike, which softmax does not see; the weights of the values sum
    to 1, so their bias is added to what comes out.
    """
    of_q, of_kv = parts.q_and_kv()
    heads = parts.num_heads
    q = torch.unflatten(of_q(normed[:, :num_rows]), -1, (heads, -1))
    if parts.q_norm is not None:
        q = parts.q_norm(q)
    key_weight, value_weight = torch.unflatten(of_kv.weight, 0, (2, heads, -1)).unbind(0)
    scale = parts.softmax_scale(q.shape[-1])
    out = absorbed_attention(q, normed, prompts, key_weight, value_weight, scale=scale, **options)
    return out if of_kv.bias is None else out + torch.unflatten(of_kv.bias, 0, (2, heads, -1))[1]
