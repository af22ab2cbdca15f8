"""The forward pass, rewritten: the same function as vapt_fast.reference for a fraction of the work.

None of it is an approximation. The pooling (convolution, then projection over positions) is one matrix,
built for all blocks at once. Prompts are thrown away after a block, so they are only ever keys and values.
The head of a CLS-pooled model reads one row, so the last block computes one row, and its keys and values are
absorbed into that row's query. One LayerNorm statistic serves the block and its prompts. What is frozen is
folded beforehand. A block of an unknown kind is called as it is, with the prompts concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import backbone
from .backbone import Positions, StandardBlock
from .config import PromptConfig
from .dropout import BlockMasks
from .frozen import PreparedBlock, PreparedWeights
from .functional import (
    add_norm,
    cls_attention,
    mlp,
    prompt_attention,
    prompt_attention_packed,
    prompt_matrices,
    prompt_pool,
    prompt_projector,
)
from .prompts import AdaptivePrompts, Projector, Prompts, StaticPrompts

__all__ = ["forward_tokens"]


def forward_tokens(
    model: nn.Module,
    prompts: Prompts,
    images: Tensor,
    masks: list[BlockMasks],
    prepared: PreparedWeights,
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
        masks: one BlockMasks for each entry of ``prompts.blocks``.
        prepared: where the prepared frozen weights are kept.
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
    tokens, positions = backbone.embed(model, images)
    num_prefix = model.num_prefix_tokens
    depth = len(model.blocks)
    config = prompts.config
    sources = _prompt_sources(
        prompts, masks, backbone.grid_size(model, images.shape[-2:]), tokens.dtype, backend
    )
    stream = _Stream(tokens)
    travelling = 0
    for index in range(depth if num_blocks is None else num_blocks):
        last = index == depth - 1
        source = sources[index] if index < len(sources) else None
        if source is not None and (config.kind == "shallow" or (last and config.pool_prompts)):
            # These prompts are needed after the block: from here on they are tokens like any other, a longer
            # prefix without positions.
            tokens = stream.total()
            stream = _Stream(_insert(tokens, source.make(tokens, num_prefix), num_prefix))
            travelling, source = config.num_prompts, None
        run = partial(
            _run_block,
            model,
            index,
            source=source,
            positions=positions.with_extra(travelling),
            num_prefix=num_prefix + travelling,
            prepared=prepared,
            backend=backend,
            num_rows=num_rows if last else None,
        )
        stream = checkpoint(run, stream, use_reentrant=False) if checkpointing else run(stream)
        if taps is not None and index in taps:
            stream = _Stream(stream.total())
            taps[index] = backbone.remove_prompts(stream.tokens, num_prefix, travelling)
    return stream.total(), 0 if num_rows is not None else travelling


@dataclass(frozen=True)
class _Stream:
    """The tokens (B, T, C) between two blocks: ``tokens`` + ``gain`` * ``delta``, not added up yet.

    The norm that comes next adds them in its own pass over the tokens.
    """

    tokens: Tensor
    delta: Tensor | None = None
    gain: Tensor | None = None

    def total(self) -> Tensor:
        """The sum."""
        if self.delta is None:
            return self.tokens
        return self.tokens + (self.delta if self.gain is None else self.gain * self.delta)


def _insert(tokens: Tensor, prompts: Tensor, at: int) -> Tensor:
    """``prompts`` (B or 1, P, C) placed before token ``at``."""
    prompts = prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
    return torch.cat([tokens[:, :at], prompts, tokens[:, at:]], dim=1)


# ---- where a block's prompts come from


@dataclass(frozen=True)
class _StaticSource:
    """A learned table."""

    parameters: StaticPrompts
    masks: BlockMasks

    def make(self, tokens: Tensor, num_prefix: int) -> Tensor:
        """The prompts (1, P, C), or (B, P, C) where dropout makes them differ by image."""
        table = self.parameters.table.unsqueeze(0)
        return table if self.masks.table is None else table * self.masks.table


@dataclass(frozen=True)
class _AdaptiveSource:
    """Prompts computed from the tokens: ``matrix`` (R, N) is the block's convolution and projection."""

    parameters: AdaptivePrompts
    masks: BlockMasks
    matrix: Tensor
    projector: Projector | None
    config: PromptConfig
    backend: str | None

    def pool(self, stream: _Stream, num_prefix: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens; they and the prompts (B, P, C) normalised with ``eps`` for the block."""
        tokens, normed, pooled = self._pool(stream, num_prefix, eps)
        return tokens, normed, self._project(pooled, eps, normed.dtype)

    def make(self, tokens: Tensor, num_prefix: int) -> Tensor:
        """The prompts (B, P, C) alone, as they are."""
        _, _, pooled = self._pool(_Stream(tokens), num_prefix, self.parameters.norm.eps)
        return self._project(pooled, None, tokens.dtype)

    def _pool(self, stream: _Stream, num_prefix: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        norm = self.parameters.norm
        return prompt_pool(
            stream.tokens,
            self.matrix,
            norm.weight,
            norm.bias,
            num_prefix=num_prefix,
            delta=stream.delta,
            gain=stream.gain,
            eps=eps,
            prompt_eps=norm.eps,
            backend=self.backend,
        )

    def _project(self, pooled: Tensor, eps: float | None, dtype: torch.dtype) -> Tensor:
        config, kernel = self.config, self.parameters.kernel
        if kernel is not None and not config.conv_shared:
            by_shift = pooled.unflatten(1, (-1, config.num_prompts))
            pooled = (by_shift * kernel.to(pooled.dtype).flatten(1).t().unsqueeze(1)).sum(dim=1)
        projector = self.projector
        return prompt_projector(
            pooled,
            self.parameters.token_projection.bias,
            down=None if projector is None else projector.down.weight,
            up=None if projector is None else projector.up.weight,
            scale=1.0 if projector is None else projector.scale,
            channel_mask=self.masks.channels,
            feature_mask=self.masks.features,
            activation=config.projector_activation,
            eps=eps,
            dtype=dtype,
            backend=self.backend,
        )


def _prompt_sources(
    prompts: Prompts,
    masks: list[BlockMasks],
    grid: tuple[int, int],
    dtype: torch.dtype,
    backend: str | None,
) -> list[_StaticSource | _AdaptiveSource]:
    """The source of each entry of ``prompts.blocks``; the matrices of all adaptive ones in one call."""
    config = prompts.config
    adaptive = [block for block in prompts.blocks if isinstance(block, AdaptivePrompts)]
    num_static = len(prompts.blocks) - len(adaptive)
    sources: list = [_StaticSource(prompts.blocks[i], masks[i]) for i in range(num_static)]
    if adaptive:
        weights = torch.stack([block.token_projection.weight for block in adaptive])
        weights = weights.to(torch.promote_types(torch.promote_types(dtype, weights.dtype), torch.float32))
        kernels = None
        if config.conv_kernel is not None:
            kernels = torch.stack([block.kernel[:, 0] for block in adaptive])
            kernels = kernels[:, 0] if config.conv_shared else kernels
        with torch.autocast(weights.device.type, enabled=False):
            matrices = prompt_matrices(
                weights, kernels, grid, padding=config.conv_padding, depthwise=not config.conv_shared
            )
        for i, block in enumerate(adaptive):
            projector = block.projector or prompts.projector
            sources.append(
                _AdaptiveSource(block, masks[num_static + i], matrices[i], projector, config, backend)
            )
    return sources


# ---- one block


def _run_block(
    model: nn.Module,
    index: int,
    stream: _Stream,
    *,
    source: _StaticSource | _AdaptiveSource | None,
    positions: Positions,
    num_prefix: int,
    prepared: PreparedWeights,
    backend: str | None,
    num_rows: int | None,
) -> _Stream:
    """The tokens through block ``index`` with the prompts of ``source``; all rows or the first ones."""
    parts = backbone.standard_block(model.blocks[index])
    if parts is None:
        tokens, count = stream.total(), 0
        if source is not None:
            prompts = source.make(tokens, num_prefix)
            tokens, count = _insert(tokens, prompts, num_prefix), prompts.shape[1]
        tokens = backbone.call_block(model, index, tokens, positions.with_extra(count))
        return _Stream(backbone.remove_prompts(tokens, num_prefix, count)[:, :num_rows])
    tokens, normed, prompts = _normalise(parts, stream, source, num_prefix, backend)
    rope = positions.patch_rope(index)
    weights = prepared.of_block(index, parts, rotary=rope is not None)
    bias = _score_bias(parts, positions, num_prefix - positions.num_extra, num_rows)
    branch = _attention(parts, weights, normed, prompts, rope, bias, num_prefix, num_rows, backend)
    stream = _Stream(tokens[:, :num_rows], branch, parts.gain1)
    norm = parts.mlp_norm
    if norm is None:
        tokens = stream.total()
        normed = parts.block.norm2(tokens)
    else:
        tokens, normed = add_norm(
            stream.tokens,
            stream.delta,
            norm.weight,
            norm.bias,
            gain=stream.gain,
            eps=norm.eps,
            backend=backend,
        )
    known = weights.mlp is not None
    branch = mlp(normed, *weights.mlp, backend=backend) if known else parts.block.mlp(normed)
    return _Stream(tokens, branch, parts.gain2)


def _normalise(
    parts: StandardBlock,
    stream: _Stream,
    source: _StaticSource | _AdaptiveSource | None,
    num_prefix: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, T, C) before the block; tokens and prompts (B or 1, P, C) as its projections read them.

    That is after norm1. Where norm1 is a LayerNorm, its affine is folded into the projections and left out.
    """
    norm = parts.foldable_norm
    if norm is not None and isinstance(source, _AdaptiveSource):
        return source.pool(stream, num_prefix, norm.eps)
    if norm is None:
        tokens = stream.total()
        normed = parts.block.norm1(tokens)
    else:
        tokens, normed = add_norm(
            stream.tokens, stream.delta, gain=stream.gain, eps=norm.eps, backend=backend
        )
    if source is None:
        return tokens, normed, normed.new_zeros(1, 0, normed.shape[-1])
    prompts = source.make(tokens, num_prefix)
    if norm is None:
        prompts = parts.block.norm1(prompts.to(tokens.dtype))
    else:
        prompts = F.layer_norm(prompts, prompts.shape[-1:], eps=norm.eps)
    return tokens, normed, prompts.to(normed.dtype)


def _score_bias(
    parts: StandardBlock, positions: Positions, num_prefix: int, num_rows: int | None
) -> Tensor | None:
    """(1, h, rows, T): what is added to the scores of the tokens, or None."""
    biases = [bias for bias in (parts.bias, positions.bias) if bias is not None]
    if not biases:
        return None
    bias = positions.pad_bias(sum(biases[1:], biases[0]), num_prefix)
    bias = bias if bias.ndim == 4 else bias.unsqueeze(0)
    return bias[:, :, :num_rows]


def _attention(
    parts: StandardBlock,
    weights: PreparedBlock,
    normed: Tensor,
    prompts: Tensor,
    rope: Tensor | None,
    bias: Tensor | None,
    num_prefix: int,
    num_rows: int | None,
    backend: str | None,
) -> Tensor:
    """The attention branch for the first ``num_rows`` tokens (None: all): (B, rows, C)."""
    heads, groups, dim = parts.num_heads, parts.num_kv_heads, parts.head_dim
    num_queries, num_keys = heads * dim, groups * dim
    q_weight, kv_weight = weights.qkv_weight.tensor_split([num_queries])
    q_bias, kv_bias = weights.qkv_bias.tensor_split([num_queries])
    as_projected = rope is None and parts.k_norm is None  # keys
    options = {"scale": weights.scale, "bias": bias, "backend": backend}

    if num_rows is None and as_projected and parts.q_norm is None:
        qkv = F.linear(normed, weights.qkv_weight, weights.qkv_bias)
        prompt_kv = F.linear(prompts, kv_weight, kv_bias)
        out = prompt_attention_packed(qkv, prompt_kv, num_heads=heads, num_kv_heads=groups, **options)
    elif num_rows is not None and as_projected and heads == groups:
        q = F.linear(normed[:, :num_rows], q_weight, q_bias).unflatten(-1, (heads, dim))
        if parts.q_norm is not None:
            q = parts.q_norm(q)
        key_weight, value_weight = kv_weight.unflatten(0, (2, heads, dim)).unbind(0)
        out = cls_attention(q, normed, prompts, key_weight, value_weight, **options)
        out = out + kv_bias[num_keys:].unflatten(0, (heads, dim))
    else:
        if num_rows is None:
            qkv = F.linear(normed, weights.qkv_weight, weights.qkv_bias)
            q, k, v = qkv.split((num_queries, num_keys, num_keys), dim=-1)
        else:
            q = F.linear(normed[:, :num_rows], q_weight, q_bias)
            k, v = F.linear(normed, kv_weight, kv_bias).chunk(2, dim=-1)
        prompt_k, prompt_v = F.linear(prompts, kv_weight, kv_bias).chunk(2, dim=-1)
        q = q.unflatten(-1, (heads, dim))
        k, v, prompt_k, prompt_v = (x.unflatten(-1, (groups, dim)) for x in (k, v, prompt_k, prompt_v))
        if parts.q_norm is not None:
            q = parts.q_norm(q)
        if parts.k_norm is not None:
            k, prompt_k = parts.k_norm(k), parts.k_norm(prompt_k)
        if rope is not None:
            q, k = (_rotate(x, rope, num_prefix, parts.rotate_half).type_as(v) for x in (q, k))
        out = prompt_attention(q, k, v, prompt_k, prompt_v, **options)
    out = out.flatten(2)
    if parts.out_norm is not None:
        out = parts.out_norm(out)
    return F.linear(out, weights.proj_weight, weights.proj_bias)


def _rotate(x: Tensor, rope: Tensor, num_prefix: int, half: bool) -> Tensor:
    """Rotary embedding of the patch tokens of x (B, T, h, d); prefix tokens stay as they are."""
    if x.shape[1] <= num_prefix:
        return x
    prefix, patches = x.transpose(1, 2).tensor_split([num_prefix], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=half)], dim=2).transpose(1, 2)
