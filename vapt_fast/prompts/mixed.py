"""Prompts of several adapters in one batch: an adapter is a row of numbers, and each image takes its own.

All that differs between adapters are these rows, so a batch is computed as one, without a loop over adapters.
Where one adapter has fewer prompts than another, its row is padded, and attention leaves the rest out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..config import PromptConfig
from ..functional import prompt_pool, prompt_projector
from .adaptive import PROMPT_NORM_EPS
from .base import Masks, affine, layer_norm
from .plain import KeysValues, PlainProjector, PlainPrompts

__all__ = ["Facts", "Layout", "MixedPrompts", "cut_masks", "flatten"]

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
        depth = max(map(len, adapters), default=0)
        blocks = [[_at(adapter, i) for adapter in adapters] for i in range(depth)]
        own = any(plain.pooling is not None and plain.pooling.own_projector for plain in _each(adapters))
        projectors: list[ProjectorLayout] = []
        layouts = []
        for block in [list(_each(adapters))] if not own and blocks else []:
            projectors += _projector_layout(block, varying)
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
            lengths=torch.tensor(numbers, device=device, dtype=torch.long).view(*shape),
            kinds=torch.tensor(kinds, device=device, dtype=torch.bool).view(*shape, 2),
            activations=torch.tensor(activations, device=device, dtype=torch.long).view(shape[0], -1),
            widths=torch.tensor(widths, device=device, dtype=torch.long).view(shape[0], -1),
            rates=torch.tensor([[p.rates for p in b] for b in blocks], device=device).view(*shape, 3),
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
        if block.projector is None or (pooling.own_projector and len(self.projectors) == 1):
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


def _each(adapters: Sequence[Sequence[PlainPrompts]]) -> Iterator[PlainPrompts]:
    return (plain for adapter in adapters for plain in adapter)


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
        matrices=max((len(pooling.matrix) for pooling in poolings), default=0),
        kernel=any(pooling.kernel is not None for pooling in poolings),
        table=any(plain.table is not None for plain in block),
        width=max((keys.shape[1] for keys in given), default=0),
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


class MixedPrompts:
    """The prompts of a batch in which each image has an adapter of its own; used as Prompts are.

    Args:
        layout: of the rows.
        rows: (A, F), a row for each adapter; differentiable.
        facts: of the adapters.
        index: (B,), the adapter of each image.
    """

    config = PromptConfig()  # prompts that are pooled with the tokens can't be mixed

    def __init__(self, layout: Layout, rows: Tensor, facts: Facts, index: Tensor) -> None:
        self.layout = layout
        self._rows, self._facts, self._index = rows, facts, index
        fields = layout.fields()
        # An embedding's backward adds up in a fixed order, that of other gathers does not.
        parts = F.embedding(index, rows).split([torch.Size(shape).numel() for shape in fields.values()], 1)
        self.tensors = {
            key: part.unflatten(1, shape) if len(shape) > 1 else part
            for (key, shape), part in zip(fields.items(), parts, strict=True)
        }
        self.facts = Facts(*(fact[index] for fact in facts))

    def __call__(self, images: Tensor, within: Callable[[Any, Tensor], Any]) -> Any:
        """Return ``within(self, images)``."""
        return within(self, images)

    def travels(self, index: int, depth: int) -> bool:
        """Whether the prompts of block ``index`` stay in the sequence after it: they don't."""
        return False

    def draw_masks(self, batch: int, **options: Any) -> list[Masks]:
        """Return masks for the batch, by the rates of each image's adapter."""
        masks = []
        for i, block in enumerate(self.layout.blocks):
            rates = self.facts.rates[:, i].to(**options).view(batch, 3, 1, 1)
            width = 0 if block.projector is None else self.layout.projectors[block.projector].width
            shapes = (
                (block.num_prompts, max(self.layout.dim, 2 * block.width)),
                (1, self.layout.dim),
                (block.num_prompts, width),
            )
            drawn: list[Tensor | None] = [None, None, None]
            for j, (shape, drops) in enumerate(zip(shapes, block.drops, strict=True)):
                if drops and shape[-1]:
                    rate = rates[:, j]
                    drawn[j] = (torch.rand(batch, *shape, **options) >= rate) / (1 - rate)
            masks.append(Masks(*drawn))
        return masks

    def take(self, rows: Tensor) -> MixedPrompts:
        """Return the prompts of some images."""
        return MixedPrompts(self.layout, self._rows, self._facts, self._index[rows])

    def sources(self, masks: list[Masks], dtype: torch.dtype, backend: str | None) -> list[Any]:
        """Return where the rewritten pass gets the prompts of each block; None for a block without."""
        sources: list[Any] = []
        for i, block in enumerate(self.layout.blocks[: len(masks)]):
            make = _PooledSource if block.matrices else _Source
            sources.append(make(self, i, masks[i], backend) if block.num_prompts else None)
        return sources


def cut_masks(masks: Sequence[Masks], rows: Tensor, adapter: Sequence[PlainPrompts]) -> list[Masks]:
    """Return the masks of the images ``rows`` as ``adapter`` draws its own, from those of a mixed batch."""
    cut = []
    for plain, mask in zip(adapter, masks, strict=False):
        whole = (mask.table, mask.channels, mask.features)
        table, channels, features = (t if t is None else t[rows] for t in whole)
        pooling, count = plain.pooling, plain.num_prompts
        if table is not None and plain.keys_values is not None:
            table = table[:, :count, : 2 * plain.keys_values.keys.shape[1]]
        elif table is not None:
            table = None if plain.table is None else table[:, :count, : plain.table.shape[1]]
        if features is not None:
            projector = None if pooling is None else pooling.projector
            features = None if projector is None else features[:, :count, : len(projector.down)]
        cut.append(Masks(table, None if pooling is None else channels, features))
    return cut


class _Source:
    """The prompts of one block that are learned tables, or keys and values.

    Attributes:
        lengths: (B,), how many prompts each image has; None where all have the same.
        given: keys and values that take the place of those made of prompts.
        is_given: (B,), for which images; None for all.
    """

    def __init__(self, prompts: MixedPrompts, index: int, masks: Masks, backend: str | None) -> None:
        self.layout = prompts.layout
        self.block = block = prompts.layout.blocks[index]
        self.masks, self.backend = masks, backend
        self.tensors = {name: t for (name, i), t in prompts.tensors.items() if i == index}
        self.lengths = prompts.facts.lengths[:, index] if block.varying else None
        self.pools = None if block.pools else prompts.facts.kinds[:, index, 0].view(-1, 1, 1)
        self.given, self.is_given = None, None
        if block.width:
            self.given = self._keys_values()
            self.is_given = None if block.given else prompts.facts.kinds[:, index, 1]
        self.projector = None
        j = block.projector
        if j is not None:
            self.projector = prompts.layout.projectors[j]
            self.down, self.up = prompts.tensors["down", j], prompts.tensors["up", j]
            self.activations, self.widths = prompts.facts.activations[:, j], prompts.facts.widths[:, j]

    def _keys_values(self) -> KeysValues:
        both = torch.cat([self.tensors["keys"], self.tensors["values"]], dim=-1)
        if self.masks.table is not None:
            both = both * self.masks.table[..., : both.shape[-1]]
        return KeysValues(*both.chunk(2, dim=-1))

    def make(self, tokens: Tensor, num_prefix: int) -> Tensor | KeysValues:
        """Return the prompts (B, P, C) for ``tokens`` (B, S + N, C), S = ``num_prefix``."""
        if self.block.given and self.given is not None:
            return self.given
        nothing = tokens.new_zeros(1, 1, 1, dtype=next(iter(self.tensors.values())).dtype)
        return self.add_table(nothing)

    def add_table(self, prompts: Tensor) -> Tensor:
        """Return the prompts and the learned tables added up."""
        if not self.block.table:
            return prompts
        table = self.tensors["table"]
        mask = self.masks.table
        return prompts + (table if mask is None else table * mask[..., : table.shape[-1]])


class _PooledSource(_Source):
    """The prompts of one block that are pooled from the tokens, of some adapters at least."""

    def make(self, tokens: Tensor, num_prefix: int) -> Tensor:
        """Return the prompts (B, P, C) alone, as they are."""
        _, _, prompts = self.pool(tokens, num_prefix, None, branch=None, layer_scale=None)
        return prompts

    def pool(
        self, tokens: Tensor, num_prefix: int, norm: nn.LayerNorm | None, **residual: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens; they and the prompts (B, P, C) normalised by ``norm``."""
        total, normed, pooled = prompt_pool(
            tokens,
            self.tensors["matrix"].flatten(1, 2),
            self.tensors["weight"],
            self.tensors["bias"],
            num_prefix=num_prefix,
            prompt_eps=PROMPT_NORM_EPS,
            backend=self.backend,
            **residual,
            **affine(norm, otherwise=PROMPT_NORM_EPS),
        )
        return total, normed, self._project(pooled, norm, normed.dtype)

    def _project(self, pooled: Tensor, norm: nn.LayerNorm | None, dtype: torch.dtype) -> Tensor:
        block, projector = self.block, self.projector
        if block.kernel:
            by_matrix = pooled.unflatten(1, (-1, block.num_prompts))
            pooled = (by_matrix * self.tensors["kernel"].unsqueeze(2)).sum(dim=1)
        simple = projector is None or projector.is_simple
        fused = simple and self.pools is None and not block.table
        if simple:
            prompts = prompt_projector(
                pooled,
                self.tensors["offset"],
                down=None if projector is None else self.down,
                up=None if projector is None else self.up.transpose(1, 2),
                channel_mask=self.masks.channels,
                feature_mask=self.masks.features,
                activation="identity" if projector is None else projector.activations[0],
                dtype=dtype if fused else pooled.dtype,
                backend=self.backend,
                **affine(norm if fused else None, otherwise=None),
            )
        else:
            prompts = self._project_variously(pooled)
        if fused:
            return prompts
        if self.pools is not None:
            prompts = torch.where(self.pools, prompts, 0)
        prompts = self.add_table(prompts)
        return (prompts if norm is None else layer_norm(prompts, norm)).to(dtype)

    def _project_variously(self, pooled: Tensor) -> Tensor:
        """Return the prompts by projectors with various activations, each image by its own."""
        assert self.projector is not None
        with torch.autocast(pooled.device.type, enabled=False):
            channels, mask = self.masks.channels, self.masks.features
            t = (pooled if channels is None else pooled * channels) + self.tensors["offset"].unsqueeze(-1)
            hidden = t @ self.down.transpose(1, 2)
            is_own = torch.arange(hidden.shape[-1], device=t.device) < self.widths.view(-1, 1, 1)
            features = torch.zeros_like(hidden)
            for i, name in enumerate(self.projector.activations):
                inputs = hidden if name != "softmax" else hidden.masked_fill(~is_own, -torch.inf)
                chosen = (self.activations == i).view(-1, 1, 1)
                features = torch.where(chosen, ACTIVATIONS[name](inputs), features)
            return t + (features if mask is None else features * mask) @ self.up
