"""Frozen weights prepared once: norms, biases and scales folded into the projections of attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import StandardBlock

__all__ = ["FoldedAttention", "FoldedWeights", "fold"]


@dataclass(frozen=True)
class FoldedAttention:
    """The projections of one block's attention, for tokens normalised without affine.

    Exact, because: the LayerNorm's affine is linear; a key's bias shifts all scores of a query alike, which
    softmax does not see (unless keys are normalised or rotated after it); the weights of attention sum to 1,
    so a value's bias goes through to the projection (unless a norm stands between).

    Attributes:
        weight: ((h + 2g) * d, C), rows of queries, keys and values, g the number of key heads.
        bias: ((h + 2g) * d,), or None where nothing is left of it.
        proj_bias: (C,) or None, of the projection after attention.
        scale: what is left of the softmax scale.
    """

    weight: Tensor
    bias: Tensor | None
    proj_bias: Tensor | None
    scale: float


def fold(block: StandardBlock, rotary: bool) -> FoldedAttention:
    """``block``'s projections, prepared; ``rotary``: queries and keys are rotated after them."""
    attn = block.attn
    weight = torch.cat(block.weights) if len(block.weights) > 1 else block.weights[0]
    proj_bias, dtype = attn.proj.bias, weight.dtype
    # One rounding to a low precision, at the end.
    weight = weight.to(torch.promote_types(dtype, torch.float32))
    num_queries, num_keys = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
    sections = (num_queries, num_keys, num_keys)

    bias = weight.new_zeros(weight.shape[0])
    if any(part is not None for part in block.biases):
        parts = block.biases
        if len(parts) > 1:
            split = weight.split(sections)
            parts = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(split, parts, strict=True)]
        bias = bias + torch.cat([part.to(weight.dtype) for part in parts])
    norm = block.foldable_norm
    if norm is not None:
        bias = bias + weight @ norm.bias.to(weight.dtype)
        weight = weight * norm.weight.to(weight.dtype)

    scale = attn.scale
    q_bias, k_bias, v_bias = bias.split(sections)
    if block.q_norm is None:
        q_weight, kv_weight = weight.tensor_split([num_queries])
        weight = torch.cat([q_weight * scale, kv_weight])
        q_bias, scale = q_bias * scale, 1.0
    if block.k_norm is None and not rotary:
        k_bias = torch.zeros_like(k_bias)
    if block.out_norm is None:
        v_heads = v_bias.view(block.num_kv_heads, block.head_dim)
        values = v_heads.repeat_interleave(block.num_heads // block.num_kv_heads, dim=0).flatten()
        folded = attn.proj.weight.to(weight.dtype) @ values
        proj_bias = (folded if proj_bias is None else folded + proj_bias.to(weight.dtype)).to(dtype)
        v_bias = torch.zeros_like(v_bias)
    bias = torch.cat([q_bias, k_bias, v_bias])
    return FoldedAttention(weight.to(dtype), bias.to(dtype), proj_bias, scale)


class FoldedWeights:
    """The FoldedAttention of every block, made when first asked for and again when its sources change.

    It is no part of the model: it is in no state dict, and copies and pickles of the model start without it.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple, FoldedAttention]] = {}

    def __deepcopy__(self, memo: dict) -> FoldedWeights:
        return FoldedWeights()

    def __reduce__(self) -> tuple:
        return FoldedWeights, ()

    def clear(self) -> None:
        """Forget everything; for changes that leave no trace on the tensors themselves."""
        self._entries.clear()

    def of_block(self, index: int, block: StandardBlock, rotary: bool) -> FoldedAttention:
        """The prepared projections of block ``index``."""
        sources = [*block.weights, *block.biases, block.attn.proj.weight, block.attn.proj.bias]
        if block.foldable_norm is not None:
            sources += [block.foldable_norm.weight, block.foldable_norm.bias]
        sources = [source for source in sources if source is not None]
        if not _can_keep(sources):
            return fold(block, rotary)
        key = (rotary, *((s.data_ptr(), s._version, s.dtype, s.device) for s in sources))
        entry = self._entries.get(index)
        if entry is None or entry[0] != key:
            # What is made under inference_mode can't be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                entry = self._entries[index] = key, fold(block, rotary)
        return entry[1]


def _can_keep(sources: list[Tensor]) -> bool:
    """Whether a fold of ``sources`` may outlive this call.

    Not while a compiler traces (it folds within the graph), not where someone trains the weights, and not for
    subclasses such as fake or distributed tensors, whose data is elsewhere.
    """
    if torch.compiler.is_compiling():
        return False
    plain = all(type(source) in (Tensor, torch.nn.Parameter) for source in sources)
    return plain and not (torch.is_grad_enabled() and any(source.requires_grad for source in sources))
