"""Prompts of several adapters in one batch: an adapter is a row of numbers, and each image takes its own.

All that differs between adapters are these rows, so a batch is computed as one, without a loop over adapters.
Where one adapter has fewer prompts than another, its row is padded, and attention leaves the rest out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..config import PromptConfig
from ..functional import prompt_pool, prompt_projector
from .adaptive import PROMPT_NORM_EPS
from .base import Masks, affine, layer_norm
from .layout import Facts, Layout, unflatten
from .plain import KeysValues, PlainPrompts

__all__ = ["MixedPrompts", "cut_masks"]


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
        self.tensors = unflatten(rows, index, layout.fields())
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
    for plain, whole in zip(adapter, masks, strict=False):
        mask = whole.take(rows)
        table, channels, features = mask.table, mask.channels, mask.features
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
