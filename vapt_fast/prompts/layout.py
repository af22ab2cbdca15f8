"""Where the numbers of several adapters' prompts stand: an adapter is a row of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain import PlainProjector, PlainPrompts

__all__ = ["Facts", "Layout", "flatten", "small_tensor", "unflatten"]

Shape = tuple[int, ...]
Key = tuple[str, int]


@dataclass(frozen=True)
class BlockLayout:
    """What the adapters' prompts of one block hold, the sizes being the largest of any.

    Attributes:
        num_prompts: P.
        matrices: S of the pooling; 0 where none pools.
        kernel: whether there are depthwise kernels.
        table: whether there are tables.
        width: of keys and values; 0 where there are none.
        projector: which of the projectors; None for none.
        varying: whether the adapters have different numbers of prompts.
        pools, given: whether all adapters with prompts pool; have keys and values.
        drops: which dropouts are on, as in PlainPrompts.
    """

    num_prompts: int
    matrices: int
    kernel: bool
    table: bool
    width: int
    projector: int | None
    varying: bool
    pools: bool
    given: bool
    drops: tuple[bool, ...]


@dataclass(frozen=True)
class ProjectorLayout:
    """The widest projector, and the activations of all; ``varying``: their softmax has different widths."""

    width: int
    activations: tuple[str, ...]
    varying: bool

    @property
    def is_simple(self) -> bool:
        """Whether one formula does for all."""
        return len(self.activations) == 1 and not self.varying


@dataclass(frozen=True)
class Layout:
    """Where the numbers of an adapter's prompts stand in its row.

    Attributes:
        dim: C, channels of a token.
        num_patches: N.
        blocks: what each block holds.
        projectors: one for all blocks, or one a block.
    """

    dim: int
    num_patches: int
    blocks: tuple[BlockLayout, ...]
    projectors: tuple[ProjectorLayout, ...]

    @classmethod
    def of(
        cls, adapters: Sequence[Sequence[PlainPrompts]], dim: int, num_patches: int, *, varying: bool = False
    ) -> Layout:
        """Return the layout that has room for all ``adapters``.

        Args:
            adapters: the blocks of each.
            dim: C.
            num_patches: N.
            varying: whether adapters with fewer or narrower prompts may take the place of these.
        """
        depth = max([len(blocks) for blocks in adapters], default=0)
        blocks = [[_at(adapter, i) for adapter in adapters] for i in range(depth)]
        every = [plain for block in blocks for plain in block]
        own = any(plain.pooling is not None and plain.pooling.own_projector for plain in every)
        projectors = [] if own else _projector_layout(every, varying)
        layouts = []
        for block in blocks:
            new = _projector_layout(block, varying)
            if own:
                projectors += new
            layouts.append(_block_layout(block, len(projectors) - 1 if new else None, varying))
        return cls(dim, num_patches, tuple(layouts), tuple(projectors))

    def fields(self) -> dict[Key, Shape]:
        """Return the shape of each tensor of a row, by its name and its block or projector."""
        dim = self.dim
        fields: dict[Key, Shape] = {}
        for i, block in enumerate(self.blocks):
            count, matrices = block.num_prompts, block.matrices
            if matrices:
                fields["matrix", i] = (matrices, count, self.num_patches)
                fields["offset", i] = (count,)
                fields["weight", i] = fields["bias", i] = (dim,)
            if block.kernel:
                fields["kernel", i] = (matrices, dim)
            if block.table:
                fields["table", i] = (count, dim)
            if block.width:
                fields["keys", i] = fields["values", i] = (count, block.width)
        for j, projector in enumerate(self.projectors):
            fields["down", j] = fields["up", j] = (projector.width, dim)
        return fields

    def row(self, adapter: Sequence[PlainPrompts], like: Tensor) -> Tensor:
        """Return the row of an adapter, differentiable in its tensors, in the dtype of ``like``."""
        tensors: dict[Key, Tensor | None] = {}
        for i, plain in enumerate(adapter):
            pooling = plain.pooling
            tensors["table", i] = plain.table
            if plain.keys_values is not None:
                tensors["keys", i], tensors["values", i] = plain.keys_values
            if pooling is not None:
                tensors["matrix", i], tensors["offset", i] = pooling.matrix, pooling.offset
                tensors["weight", i], tensors["bias", i] = pooling.weight, pooling.bias
                tensors["kernel", i] = pooling.kernel
                if pooling.kernel is None and self.blocks[i].kernel:
                    tensors["kernel", i] = torch.ones_like(pooling.weight).unsqueeze(0)
                j = self.blocks[i].projector
                if pooling.projector is not None and j is not None:
                    tensors["down", j], tensors["up", j] = pooling.projector.down, pooling.projector.up
        return flatten(tensors, self.fields(), like)

    def facts(self, adapters: Sequence[Sequence[PlainPrompts]], device: Any) -> Facts:
        """Return what else is told apart of each adapter."""
        blocks = [[_at(adapter, i) for i in range(len(self.blocks))] for adapter in adapters]
        numbers = [[plain.num_prompts for plain in adapter] for adapter in blocks]
        kinds = [
            [[plain.pooling is not None, plain.keys_values is not None] for plain in adapter]
            for adapter in blocks
        ]
        shape = len(adapters), len(self.blocks)
        activations, widths = [], []
        for adapter in blocks:
            slots: list[PlainProjector | None] = [None] * len(self.projectors)
            for plain, layout in zip(adapter, self.blocks, strict=True):
                if plain.pooling is not None and layout.projector is not None:
                    slots[layout.projector] = plain.pooling.projector
            own = list(zip(slots, self.projectors, strict=True))
            activations.append([0 if p is None else it.activations.index(p.activation) for p, it in own])
            widths.append([it.width if p is None else len(p.down) for p, it in own])
        return Facts(
            lengths=small_tensor(numbers, device).view(*shape),
            kinds=small_tensor(kinds, device, torch.bool).view(*shape, 2),
            activations=small_tensor(activations, device).view(shape[0], -1),
            widths=small_tensor(widths, device).view(shape[0], -1),
            rates=small_tensor([[p.rates for p in b] for b in blocks], device, torch.float32).view(*shape, 3),
        )

    def problems(self, adapter: Sequence[PlainPrompts]) -> Iterator[str]:
        """Yield why the layout has no room for ``adapter``."""
        for i in range(max(len(self.blocks), len(adapter))):
            plain = _at(adapter, i)
            if not plain.num_prompts:
                continue
            if i >= len(self.blocks):
                yield f"block {i}: {plain.num_prompts} prompts, reserved are none"
                continue
            block = self.blocks[i]
            if plain.num_prompts > block.num_prompts:
                yield f"block {i}: {plain.num_prompts} prompts, reserved are {block.num_prompts}"
            yield from (f"block {i}: {problem}" for problem in self._kind_problems(block, plain))

    def _kind_problems(self, block: BlockLayout, plain: PlainPrompts) -> Iterator[str]:
        pooling = plain.pooling
        if plain.table is not None and not block.table:
            yield "a table, reserved is none"
        if (pooling is None and block.pools) or (plain.keys_values is None and block.given):
            yield "prompts of another kind than all that are reserved"
        if plain.keys_values is not None and not block.width:
            yield "keys and values, reserved are none"
        if pooling is None:
            return
        if len(pooling.matrix) > block.matrices or (pooling.kernel is not None and not block.kernel):
            yield f"a convolution of {len(pooling.matrix)} matrices, reserved are {block.matrices}"
        if (projector := pooling.projector) is None:
            return
        sharers = sum(other.projector == block.projector for other in self.blocks)
        if block.projector is None or (pooling.own_projector and sharers > 1):
            yield "a projector of its own, reserved is none"
            return
        reserved = self.projectors[block.projector]
        if len(projector.down) > reserved.width or projector.activation not in reserved.activations:
            yield (
                f"a projector with {len(projector.down)} features and {projector.activation}, reserved are "
                f"{reserved.width} with {', '.join(reserved.activations)}"
            )


def _at(adapter: Sequence[PlainPrompts], index: int) -> PlainPrompts:
    return adapter[index] if index < len(adapter) else PlainPrompts(0)


def _projector_layout(block: Sequence[PlainPrompts], varying: bool) -> list[ProjectorLayout]:
    """Return that of the projectors of one block, or of all; nothing where there is none."""
    found = [p.pooling.projector for p in block if p.pooling is not None and p.pooling.projector is not None]
    if not found:
        return []
    widths, activations = {len(p.down) for p in found}, sorted({p.activation for p in found})
    differ = "softmax" in activations and (varying or len(widths) > 1)
    return [ProjectorLayout(max(widths), tuple(activations), differ)]


def _block_layout(block: Sequence[PlainPrompts], projector: int | None, varying: bool) -> BlockLayout:
    poolings = [plain.pooling for plain in block if plain.pooling is not None]
    given = [plain.keys_values.keys for plain in block if plain.keys_values is not None]
    numbers = {plain.num_prompts for plain in block}
    count = sum(plain.num_prompts > 0 for plain in block)
    return BlockLayout(
        num_prompts=max(numbers),
        matrices=max([len(pooling.matrix) for pooling in poolings], default=0),
        kernel=any(pooling.kernel is not None for pooling in poolings),
        table=any(plain.table is not None for plain in block),
        width=max([keys.shape[1] for keys in given], default=0),
        projector=projector,
        varying=varying or len(numbers) > 1,
        pools=len(poolings) == count > 0,
        given=len(given) == count > 0,
        drops=tuple(any(rates) for rates in zip(*(plain.rates for plain in block), strict=True)),
    )


class Facts(NamedTuple):
    """What is told apart of A adapters beside their rows.

    lengths (A, L): the number of prompts of each block; kinds (A, L, 2): whether it pools, and whether it
    gives keys and values; activations and widths (A, J) of the projectors; rates (A, L, 3) of dropouts.
    """

    lengths: Tensor
    kinds: Tensor
    activations: Tensor
    widths: Tensor
    rates: Tensor


def flatten(tensors: Mapping[Key, Tensor | None], fields: Mapping[Key, Shape], like: Tensor) -> Tensor:
    """Return the tensors of ``fields`` end to end, each filled up with zeros to its shape there.

    Raises:
        ValueError: a tensor that is larger, or of another last dimension, which counts patches or channels.
    """
    parts = []
    for key, shape in fields.items():
        tensor = tensors.get(key)
        if tensor is None:
            parts.append(like.new_zeros(torch.Size(shape).numel()))
            continue
        tensor = tensor.to(like.dtype)
        if tensor.shape != shape:
            missing = [n - m for n, m in zip(shape, tensor.shape, strict=True)]
            if min(missing) < 0 or (len(shape) > 1 and missing[-1]):
                raise ValueError(
                    f"adapters in one batch must be of one backbone, but {key[0]} {key[1]} of one is "
                    f"{tuple(tensor.shape)}, which does not fit {shape}"
                )
            tensor = F.pad(tensor, [side for n in reversed(missing) for side in (0, n)])
        parts.append(tensor.reshape(-1))
    return torch.cat(parts) if parts else like.new_zeros(0)


def unflatten(rows: Tensor, index: Tensor, fields: Mapping[Key, Shape]) -> dict[Key, Tensor]:
    """Return the tensors of ``fields``, each (B, *shape), of the rows (A, F) at ``index`` (B,)."""
    # An embedding's backward adds up in a fixed order, that of other gathers does not.
    parts = F.embedding(index, rows).split([torch.Size(shape).numel() for shape in fields.values()], 1)
    return {key: part.unflatten(1, shape) for (key, shape), part in zip(fields.items(), parts, strict=True)}


def small_tensor(values: Any, device: Any, dtype: torch.dtype = torch.long) -> Tensor:
    """Return Python's numbers as a tensor on a device, without waiting for what a GPU has yet to compute."""
    # ``torch.tensor(values, device=...)`` waits. CUDA keeps a copy of memory that is not pinned.
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
