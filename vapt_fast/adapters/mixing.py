"""A batch in which each image has an adapter of its own.

The frozen products are the same for all images. What differs between adapters is small, so it is stacked, one
row an adapter, and each image takes its own row: no loop over adapters, and one call of each op. See
vapt_fast.prompts.mixed. Adapters that rows can't tell (prompts that travel or are pooled, kinds without
``plain``, modules with hooks), and the literal method, are computed adapter by adapter instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..backbones import normed_tokens
from ..backbones.blocks import standard_block
from ..modules import has_global_hooks, has_hooks, is_plain
from ..ops.plan import is_watched
from ..prompts import Masks
from ..prompts.layout import Layout, flatten, small_tensor, unflatten
from ..prompts.mixed import MixedPrompts, cut_masks
from ..prompts.plain import PlainPrompts
from .module import BASE, Adapter, MissingHead, mean_logits

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = [
    "Heads",
    "assert_range",
    "check_index",
    "check_names",
    "features",
    "has_plain_heads",
    "head_fields",
    "head_row",
    "logits",
    "plain_adapter",
]


def logits(model: AdaptiveViT, images: Tensor, adapter_names: Sequence[str] | Tensor, backend: str) -> Tensor:
    """Return the logits (B, K) as AdaptiveViT.forward does, K the classes of the largest head.

    That is of those in use with names, of all with integers.
    """
    has_base = not any(isinstance(head, MissingHead) for head in model.find_adapter(BASE).heads())
    known = Batch.of(model, images, adapter_names, has_base=has_base)
    width = max(_num_outputs(model, adapter) for adapter in known.adapters)

    def compute(images: Tensor, prompts: Any, masks: list[Any] | None, batch: Batch) -> Tensor:
        inputs, adapters = model._head_inputs(images, backend, prompts, masks=masks), batch.adapters
        if len(adapters) == 1:
            return adapters[0](inputs)
        if (heads := Heads.of(adapters)) is not None:
            return heads(inputs, batch.places)
        parts = []
        for i, adapter in enumerate(adapters):
            rows = batch.rows_of([i])
            parts.append((rows, adapter(tuple(x[rows] for x in inputs))))
        return _together(parts)

    return _widened(_run(model, images, known.used(), compute, mixed=backend != "reference"), width)


def features(
    model: AdaptiveViT, images: Tensor, adapter_names: Sequence[str] | Tensor, backend: str
) -> Tensor:
    """Return all tokens (B, T, C) as AdaptiveViT.forward_features does."""

    def compute(images: Tensor, prompts: Any, masks: list[Any] | None, batch: Batch) -> Tensor:
        return model._run(images, normed_tokens, backend, prompts=prompts, masks=masks)

    batch = Batch.of(model, images, adapter_names).used()
    return _run(model, images, batch, compute, mixed=backend != "reference")


def _run(
    model: AdaptiveViT,
    images: Tensor,
    batch: Batch,
    compute: Callable[[Tensor, Any, list[Any] | None, Batch], Tensor],
    *,
    mixed: bool,
) -> Tensor:
    """Return what the adapters give of their images: of those that rows can tell at once, if ``mixed``.

    Args:
        model: the model.
        images: of the batch.
        batch: whose adapters they have.
        compute: of images, their prompts, masks (None to draw them), and the batch that they are.
        mixed: whether there may be several at once.
    """
    adapters = batch.adapters
    if len(adapters) == 1:
        return compute(images, adapters[0].prompts, None, batch)
    stacked, known = _stack(model, images, batch)
    masks: list[Masks] = []
    if stacked is not None:  # before the images are parted: every backend sees the same numbers
        dtype = torch.promote_types(images.dtype, torch.float32)
        masks = stacked.draw_masks(images.shape[0], dtype=dtype, device=images.device)
    together = [*known] if mixed and len(known) > 1 else []
    if len(together) == len(adapters):
        return compute(images, stacked, masks, batch)
    groups = [[i] for i in range(len(adapters)) if i not in together]
    parts = []
    for group in [*groups, together] if together else groups:
        rows = batch.rows_of(group)
        if not len(rows) and len(images):
            continue
        prompts: Any = adapters[group[0]].prompts
        own: list[Masks] | None = None
        if stacked is not None and group is together:
            prompts, own = stacked.take(rows), [mask.take(rows) for mask in masks]
        elif group[0] in known:
            own = cut_masks(masks, rows, known[group[0]])
        parts.append((rows, compute(images[rows], prompts, own, batch.take(group, rows))))
    return _together(parts)


def _together(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the outputs of some images each, in the images' order, filled up with -inf to the widest."""
    order, outputs = torch.cat([rows for rows, _ in parts]).argsort(), [output for _, output in parts]
    width = max(output.shape[-1] for output in outputs)
    return torch.cat([_widened(output, width) for output in outputs])[order]


def _widened(output: Tensor, width: int) -> Tensor:
    """Return an output of ``width`` columns at least, filled up with -inf."""
    missing = width - output.shape[-1]
    return nn.functional.pad(output, (0, missing), value=-torch.inf) if missing > 0 else output


def _num_outputs(model: AdaptiveViT, adapter: Adapter) -> int:
    """Return how many columns an adapter's logits have; 0 if its head does not say."""
    try:
        return adapter.num_classes or model.head_hidden_size  # features, without a classifier
    except ValueError:
        return 0


class Batch(NamedTuple):
    """Which adapter each image has: ``places`` (B,) in ``adapters``.

    ``rows`` are the images of each, None where only the device knows them.
    """

    adapters: list[Adapter]
    places: Tensor
    rows: list[list[int]] | None

    def rows_of(self, group: Sequence[int]) -> Tensor:
        """Return the images, in order, of some adapters, by place."""
        device = self.places.device
        if self.rows is None:
            return torch.isin(self.places, small_tensor(list(group), device)).nonzero().squeeze(1)
        rows = sorted(row for place in group for row in self.rows[place])
        return small_tensor(rows, device)

    def used(self) -> Batch:
        """Return the batch of the adapters that its images have, where they can be read off the integers."""
        if self.rows is not None or _is_asserted(self.places) or is_watched():
            return self
        group = self.places.unique().tolist() or [0]
        return self.take(group, torch.arange(len(self.places)))

    def take(self, group: Sequence[int], rows: Tensor) -> Batch:
        """Return the batch of some adapters, by place in ascending order, and of all their images."""
        places = torch.searchsorted(small_tensor(list(group), rows.device), self.places[rows])
        return Batch([self.adapters[i] for i in group], places, None)

    @classmethod
    def of(
        cls,
        model: AdaptiveViT,
        images: Tensor,
        adapter_names: Sequence[str] | Tensor,
        *,
        has_base: bool = True,
    ) -> Batch:
        """Return the batch of AdaptiveViT.forward's arguments; without ``has_base``, -1 is out of range.

        Raises:
            TypeError, ValueError: not one adapter an image, or one that is unknown.
        """
        if isinstance(adapter_names, Tensor):
            least = -1 if has_base else 0
            hint = "" if has_base else "; the bare backbone, -1, has no classifier that was trained"
            index = check_index(adapter_names, images, least, len(model.adapters), hint)
            assert_range(index, least, len(model.adapters))
            names = [*((BASE,) if has_base else ()), *model.adapters.keys()]
            return cls([*map(model.find_adapter, names)], index - least, None)
        given = check_names(adapter_names, len(images), (BASE, *model.adapters))
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(given):
            rows.setdefault(name, []).append(i)
        names = [name for name in (BASE, *model.adapters) if name in rows] or [model.active_adapter]
        numbers = {name: i for i, name in enumerate(names)}
        places = small_tensor([numbers[name] for name in given], images.device)
        return cls([*map(model.find_adapter, names)], places, [rows.get(name, []) for name in names])


def check_names(adapter_names: Any, batch: int, known: Sequence[str]) -> list[str]:
    """Return one name for each image.

    Raises:
        TypeError: not a sequence of str.
        ValueError: another number than ``batch``, or names that are not among ``known``.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(
            f"adapter_names must be a sequence of names or a tensor of integers, got {adapter_names!r}"
        )
    names = list(adapter_names)
    if len(names) != batch:
        raise ValueError(f"adapter_names must be {batch}, one an image, got {len(names)}")
    hashed = frozenset(known)
    unknown = sorted({repr(name) for name in names if not isinstance(name, str) or name not in hashed})
    if unknown:
        raise ValueError(
            f"adapter_names must be among {tuple(known)}, or integers in a tensor, got {', '.join(unknown)}"
        )
    return names


def check_index(index: Tensor, images: Tensor, least: int, end: int, hint: str = "") -> Tensor:
    """Return the integers (B,) as int64; that they are in [least, end), ``assert_range`` may have to check.

    ``hint`` ends the message for one out of range.

    Raises:
        TypeError: not integers.
        ValueError: another shape or device than the images', or one out of range.
    """
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"adapter_names must be integers, got a tensor of {index.dtype}")
    if index.shape != images.shape[:1]:
        raise ValueError(f"adapter_names must be ({len(images)},), one an image, got {tuple(index.shape)}")
    if index.device != images.device:
        raise ValueError(f"adapter_names must be on the images' device {images.device}, got {index.device}")
    index = index.long()
    if not _is_asserted(index) and not _is_within(index, least, end):
        raise ValueError(f"adapter_names must be in [{least}, {end}), got {index.tolist()}{hint}")
    return index


def assert_range(index: Tensor, least: int, end: int) -> None:
    """Have the device check that integers are in [least, end), where looking at them would wait for it.

    That is on a GPU and in compiled code. One out of range is a failed assertion, after which a process
    can't use the GPU any more.
    """
    if _is_asserted(index):
        expected = f"adapter_names must be in [{least}, {end})"
        torch._assert_async(_is_within(index, least, end), expected)


def _is_asserted(index: Tensor) -> bool:
    return torch.compiler.is_compiling() or index.device.type in ("cuda", "meta")


def _is_within(index: Tensor, least: int, end: int) -> Tensor:
    return ((index >= least) & (index < end)).all()


def plain_adapter(model: AdaptiveViT, adapter: Adapter, dtype: torch.dtype) -> list[PlainPrompts] | None:
    """Return the prompts as plain tensors; None if rows can't tell them, or the blocks not be rewritten."""
    plain = adapter.prompts.plain(dtype)
    blocks = list(model.backbone.blocks)[: 0 if plain is None else len(plain)]
    return None if any(standard_block(block) is None for block in blocks) else plain


def _stack(
    model: AdaptiveViT, images: Tensor, batch: Batch
) -> tuple[MixedPrompts | None, dict[int, list[PlainPrompts]]]:
    """Return the prompts of the batch, and the plain tensors, by place, of the adapters that rows can tell.

    The prompts are None where they can tell none.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    found = [plain_adapter(model, adapter, dtype) for adapter in batch.adapters]
    plain = {i: blocks for i, blocks in enumerate(found) if blocks is not None}
    if not plain:
        return None, plain
    for i in plain:
        for parameter in batch.adapters[i].prompts.parameters():
            dtype = torch.promote_types(dtype, parameter.dtype)
    layout = Layout.of(list(plain.values()), model.embed_dim, math.prod(model.grid))
    like = torch.empty(0, dtype=dtype, device=images.device)
    rows = torch.stack([layout.row(plain.get(i, []), like) for i in range(len(found))])
    facts = layout.facts([plain.get(i, []) for i in range(len(found))], images.device)
    return MixedPrompts(layout, rows, facts, batch.places), plain


class Heads:
    """The classifiers of several adapters as one row each, of which every image takes its own.

    Args:
        num_classes: K, those of the largest.
        fields: the shape of each tensor of a row.
        rows: (A, F); differentiable.
        counts: (A,), the numbers of classes.
        varying: whether they differ.
    """

    def __init__(
        self, num_classes: int, fields: dict[Any, Any], rows: Tensor, counts: Tensor, varying: bool
    ) -> None:
        self.num_classes, self.fields, self.rows = num_classes, fields, rows
        self.counts, self.varying = counts, varying

    @classmethod
    def of(cls, adapters: Sequence[Adapter]) -> Heads | None:
        """Return the heads of ``adapters``; None if one is more than a Linear whose weights may be read."""
        if not all(map(has_plain_heads, adapters)):
            return None
        dtypes = {cast(Any, head).weight.dtype for adapter in adapters for head in adapter.heads()}
        if len(dtypes) > 1:  # each is called, and refuses features of another dtype as it does by itself
            return None
        num_classes = max(adapter.num_classes for adapter in adapters)
        fields = head_fields(adapters[0], num_classes)
        like = cast(Tensor, adapters[0].heads()[0].weight)
        rows = torch.stack([head_row(adapter, fields, like) for adapter in adapters])
        counts = [adapter.num_classes for adapter in adapters]
        differ = len(set(counts)) > 1
        return cls(num_classes, fields, rows, small_tensor(counts, like.device), differ)

    def __call__(self, inputs: tuple[Tensor, ...], index: Tensor) -> Tensor:
        """Return the logits (B, K) of what the heads read, each (B, C), by the adapters at ``index`` (B,)."""
        tensors = unflatten(self.rows, index, self.fields)
        logits = []
        for j, x in enumerate(inputs):
            weight, bias = tensors["weight", j], tensors["bias", j]
            logits.append(torch.baddbmm(bias.unsqueeze(2), weight, x.unsqueeze(2)).squeeze(2))
        out = mean_logits(logits)
        if not self.varying:
            return out
        classes = torch.arange(self.num_classes, device=out.device)
        return out.masked_fill(classes >= self.counts[index].unsqueeze(1), -torch.inf)


def has_plain_heads(adapter: Adapter) -> bool:
    """Return whether the adapter's logits are those of Linears of one size, whose weights may be read."""
    heads: list[Any] = adapter.heads()
    if has_global_hooks() or has_hooks(adapter) or not all(is_plain(head, nn.Linear) for head in heads):
        return False
    return len({head.out_features for head in heads}) == 1


def head_fields(adapter: Adapter, num_classes: int) -> dict[Any, tuple[int, ...]]:
    """Return the shape of each tensor of the heads, with room for ``num_classes``."""
    fields: dict[Any, tuple[int, ...]] = {}
    heads: list[Any] = adapter.heads()
    for j, head in enumerate(heads):
        fields["weight", j] = (num_classes, head.in_features)
        fields["bias", j] = (num_classes,)
    return fields


def head_row(adapter: Adapter, fields: dict[Any, tuple[int, ...]], like: Tensor) -> Tensor:
    """Return the heads end to end, differentiable."""
    tensors: dict[Any, Any] = {}
    for j, head in enumerate(adapter.heads()):
        tensors["weight", j], tensors["bias", j] = head.weight, head.bias
    return flatten(tensors, fields, like)
