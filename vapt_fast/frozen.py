"""Frozen weights prepared once: norms, biases and scales folded into attention's projections, and casts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import StandardBlock
from .backends._autocast import autocast_dtype

__all__ = ["PreparedBlock", "PreparedWeights", "prepare"]


@dataclass(frozen=True)
class PreparedBlock:
    """The weights of one block's matrix products, attention's for tokens normalised without affine.

    The folds are exact, because: the LayerNorm's affine is linear; a key's bias shifts all scores of a query
    alike, which softmax does not see (unless keys are normalised or rotated after it); the weights of
    attention sum to 1, so a value's bias goes through to the projection (unless a norm stands between).

    Attributes:
        qkv_weight: ((h + 2g) * d, C), rows of queries, keys and values, g the number of key heads.
        qkv_bias: ((h + 2g) * d,).
        scale: what is left of the softmax scale.
        proj_weight, proj_bias: (C, h * d) and (C,) or None, of the projection after attention.
        mlp: weight and bias (or None) of both Linears, where the MLP is nothing but them and a GELU.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    scale: float
    proj_weight: Tensor
    proj_bias: Tensor | None
    mlp: tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None


def prepare(block: StandardBlock, rotary: bool, dtype: torch.dtype | None = None) -> PreparedBlock:
    """``block``'s weights, prepared.

    Args:
        block: the block.
        rotary: whether queries and keys are rotated after the projection.
        dtype: to cast to, None for their own. What need not change is not copied.
    """
    attn = block.attn
    weight = torch.cat(block.weights) if len(block.weights) > 1 else block.weights[0]
    dtype = weight.dtype if dtype is None else dtype
    # One rounding to a low precision, at the end.
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
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
    proj_weight, proj_bias = attn.proj.weight, attn.proj.bias
    if block.out_norm is None:
        v_heads = v_bias.view(block.num_kv_heads, block.head_dim)
        values = v_heads.repeat_interleave(block.num_heads // block.num_kv_heads, dim=0).flatten()
        folded = proj_weight.to(weight.dtype) @ values
        proj_bias = folded if proj_bias is None else folded + proj_bias.to(weight.dtype)
        v_bias = torch.zeros_like(v_bias)
    bias = torch.cat([q_bias, k_bias, v_bias])
    mlp = None
    if block.gelu_mlp is not None:
        mlp = tuple(_cast(t, dtype) for linear in block.gelu_mlp for t in (linear.weight, linear.bias))
    return PreparedBlock(
        weight.to(dtype), bias.to(dtype), scale, proj_weight.to(dtype), _cast(proj_bias, dtype), mlp
    )


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class PreparedWeights:
    """The PreparedBlock of every block, made when first asked for and again when its sources change.

    It is no part of the model: it is in no state dict, and copies and pickles of the model start without it.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple, PreparedBlock]] = {}

    def __deepcopy__(self, memo: dict) -> PreparedWeights:
        return PreparedWeights()

    def __reduce__(self) -> tuple:
        return PreparedWeights, ()

    def clear(self) -> None:
        """Forget everything; for changes that leave no trace on the tensors themselves."""
        self._entries.clear()

    def of_block(self, index: int, block: StandardBlock, rotary: bool) -> PreparedBlock:
        """The prepared weights of block ``index``, under autocast in its dtype.

        Autocast itself would cast them in every step: it remembers no cast of a weight that is not trained.
        """
        sources = _sources(block)
        if not _can_keep(sources):
            return prepare(block, rotary)  # here autocast's own casts have the right gradients
        dtype = autocast_dtype(block.weights[0].dtype, block.weights[0].device)
        key = (rotary, dtype, *((s.data_ptr(), s._version, s.dtype, s.device) for s in sources))
        entry = self._entries.get(index)
        if entry is None or entry[0] != key:
            # What is made under inference_mode can't be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                entry = self._entries[index] = key, prepare(block, rotary, dtype)
        return entry[1]


def _sources(block: StandardBlock) -> list[Tensor]:
    """The parameters that ``prepare`` reads."""
    sources = [*block.weights, *block.biases, block.attn.proj.weight, block.attn.proj.bias]
    modules = [block.foldable_norm] if block.foldable_norm is not None else []
    if block.gelu_mlp is not None:
        modules += block.gelu_mlp
    sources += [parameter for module in modules for parameter in (module.weight, module.bias)]
    return [source for source in sources if source is not None]


def _can_keep(sources: list[Tensor]) -> bool:
    """Whether what is made of ``sources`` may outlive this call.

    Not while a compiler traces (it prepares within the graph), not where someone trains the weights, and not
    for subclasses such as fake or distributed tensors, whose data is elsewhere.
    """
    if torch.compiler.is_compiling():
        return False
    plain = all(type(source) in (Tensor, torch.nn.Parameter) for source in sources)
    return plain and not (torch.is_grad_enabled() and any(source.requires_grad for source in sources))
