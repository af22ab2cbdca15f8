"""A batch in which each image has an adapter of its own.

The frozen products are the same for all images. What differs between adapters is small, so it is stacked, one
row an adapter, and each image takes its own row: no loop over adapters, and one call of each op. See
vapt_fast.prompts.mixed. Adapters that rows can't tell (prompts that travel or are pooled, kinds from outside,
modules with hooks), and the literal method, are computed adapter by adapter instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..backbones.blocks import standard_block
from ..modules import has_global_hooks, is_plain
from ..prompts.mixed import Layout, MixedPrompts, flatten
from ..prompts.plain import PlainPrompts
from ..timm_api import normed_tokens
from .module import BASE, Adapter, mean_logits

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = ["Heads", "features", "logits", "plain_adapter"]


def logits(model: AdaptiveViT, images: Tensor, adapter_names: Sequence[str] | Tensor, backend: str) -> Tensor:
    """Return the logits (B, K) as AdaptiveViT.forward does, K the classes of the largest head in use."""
    batch = Batch.of(model, images, adapter_names)
    adapters = batch.adapters
    if len(adapters) == 1:
        return model._logits(images, backend, adapters[0])
    mixed = _mix(model, images, batch)
    if mixed is None or backend == "reference":
        of_one = _of_one(batch, mixed, images, partial(model._logits, backend=backend))
        return _each(batch, of_one, pad=True)
    inputs = model._head_inputs(images, backend, mixed.prompts)
    heads = Heads.of(adapters)
    if heads is not None:
        return heads(inputs, batch.places)
    return _each(batch, lambda i, rows: adapters[i](tuple(x[rows] for x in inputs)), pad=True)


def features(
    model: AdaptiveViT, images: Tensor, adapter_names: Sequence[str] | Tensor, backend: str
) -> Tensor:
    """Return all tokens (B, T, C) as AdaptiveViT.forward_features does."""
    batch = Batch.of(model, images, adapter_names)

    def run(images: Tensor, adapter: Adapter, masks: list[Any] | None) -> Tensor:
        return model._run(images, normed_tokens, backend, prompts=adapter.prompts, masks=masks)

    if len(batch.adapters) == 1:
        return run(images, batch.adapters[0], None)
    mixed = _mix(model, images, batch)
    if mixed is None or backend == "reference":
        return _each(batch, _of_one(batch, mixed, images, run), pad=False)
    return model._run(images, normed_tokens, backend, prompts=mixed.prompts)


def _of_one(
    batch: Batch, mixed: _Mixed | None, images: Tensor, run: Callable[..., Tensor]
) -> Callable[[int, Tensor], Tensor]:
    """Return what runs one adapter on its images, with the masks that the batch as one would draw."""
    masks = None if mixed is None else mixed.draw_masks(images)

    def of_one(i: int, rows: Tensor) -> Tensor:
        own = None
        if mixed is not None and masks is not None:
            own = mixed.prompts.cut_masks(masks, rows, mixed.plain[i])
        return run(images[rows], adapter=batch.adapters[i], masks=own)

    return of_one


class Batch(NamedTuple):
    """Which adapter each image has: ``places`` (B,) in ``names`` and ``adapters``.

    ``rows`` are the images of each, None where only the device knows them.
    """

    names: list[str]
    adapters: list[Adapter]
    places: Tensor
    rows: list[list[int]] | None

    @classmethod
    def of(cls, model: AdaptiveViT, images: Tensor, adapter_names: Sequence[str] | Tensor) -> Batch:
        """Return the batch of AdaptiveViT.forward's arguments.

        Raises:
            TypeError, ValueError: not one adapter an image, or one that is unknown.
        """
        if isinstance(adapter_names, Tensor):
            index = check_index(adapter_names, images, len(model.adapters), least=-1)
            names = [BASE, *model.adapters]
            return cls(names, list(map(model.find_adapter, names)), index + 1, None)
        given = check_names(adapter_names, len(images), (BASE, *model.adapters))
        places: dict[str, list[int]] = {}
        for i, name in enumerate(given):
            places.setdefault(name, []).append(i)
        names = [name for name in (BASE, *model.adapters) if name in places] or [model.active_adapter]
        numbers = {name: i for i, name in enumerate(names)}
        index = torch.tensor([numbers[name] for name in given], dtype=torch.long, device=images.device)
        return cls(
            names, list(map(model.find_adapter, names)), index, [places.get(name, []) for name in names]
        )


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
    unknown = sorted({repr(name) for name in names if name not in known})
    if unknown:
        raise ValueError(f"adapter_names must be among {tuple(known)}, got {', '.join(unknown)}")
    return names


def check_index(index: Tensor, images: Tensor, count: int, *, least: int) -> Tensor:
    """Return the integers (B,) as int64; their values are checked where that needs no synchronisation.

    Raises:
        TypeError: not integers.
        ValueError: another shape or device, or a value out of range.
    """
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"adapter_names must be integers, got a tensor of {index.dtype}")
    if index.shape != images.shape[:1]:
        raise ValueError(f"adapter_names must be ({len(images)},), one an image, got {tuple(index.shape)}")
    if index.device != images.device:
        raise ValueError(f"adapter_names must be on the images' device {images.device}, got {index.device}")
    known = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and len(index) and not (least <= int(index.min()) and int(index.max()) < count):
        raise ValueError(f"adapter_names must be in [{least}, {count}), got {index.tolist()}")
    return index.long()


def plain_adapter(model: AdaptiveViT, adapter: Adapter, dtype: torch.dtype) -> list[PlainPrompts] | None:
    """Return the prompts as plain tensors; None if rows can't tell them, or the blocks not be rewritten."""
    plain = adapter.prompts.plain(dtype)
    blocks = list(model.backbone.blocks)[: 0 if plain is None else len(plain)]
    return None if any(standard_block(block) is None for block in blocks) else plain


class _Mixed(NamedTuple):
    """The prompts of a batch, and those of each adapter."""

    prompts: MixedPrompts
    plain: list[list[PlainPrompts]]

    def draw_masks(self, images: Tensor) -> list[Any]:
        """Return the masks that the batch draws when it is computed as one."""
        dtype = torch.promote_types(images.dtype, torch.float32)
        return self.prompts.draw_masks(len(images), dtype=dtype, device=images.device)


def _mix(model: AdaptiveViT, images: Tensor, batch: Batch) -> _Mixed | None:
    """Return the prompts of the batch; None where rows can't tell them."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    found = [plain_adapter(model, adapter, dtype) for adapter in batch.adapters]
    plain = [blocks for blocks in found if blocks is not None]
    if len(plain) < len(found):
        return None
    for adapter in batch.adapters:
        for parameter in adapter.prompts.parameters():
            dtype = torch.promote_types(dtype, parameter.dtype)
    layout = Layout.of(plain, model.embed_dim, model.grid[0] * model.grid[1])
    like = torch.empty(0, dtype=dtype, device=images.device)
    rows = torch.stack([layout.row(blocks, like) for blocks in plain])
    return _Mixed(MixedPrompts(layout, rows, layout.facts(plain, images.device), batch.places), plain)


def _each(batch: Batch, of_one: Callable[[int, Tensor], Tensor], *, pad: bool) -> Tensor:
    """Return what ``of_one`` gives of each adapter and its images, put together in the batch's order."""
    parts: list[Tensor] = []
    order: list[Tensor] = []
    for i in range(len(batch.names)):
        if batch.rows is None:
            rows = (batch.places == i).nonzero().squeeze(1)
        else:
            rows = torch.tensor(batch.rows[i], dtype=torch.long, device=batch.places.device)
        if len(rows) or (not parts and i == len(batch.names) - 1):
            parts.append(of_one(i, rows))
            order.append(rows)
    if pad:
        width = max(part.shape[-1] for part in parts)
        parts = [nn.functional.pad(part, (0, width - part.shape[-1]), value=-torch.inf) for part in parts]
    return torch.cat(parts)[torch.cat(order).argsort()]


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
        if has_global_hooks() or not all(is_plain(head, nn.Linear) for a in adapters for head in a.heads()):
            return None
        num_classes = max(adapter.num_classes for adapter in adapters)
        fields = head_fields(adapters[0], num_classes)
        like = cast(Tensor, adapters[0].heads()[0].weight)
        rows = torch.stack([head_row(adapter, fields, like) for adapter in adapters])
        counts = [adapter.num_classes for adapter in adapters]
        differ = len(set(counts)) > 1
        return cls(num_classes, fields, rows, torch.tensor(counts, device=like.device), differ)

    def __call__(self, inputs: tuple[Tensor, ...], index: Tensor) -> Tensor:
        """Return the logits (B, K) of what the heads read, each (B, C), by the adapters at ``index`` (B,)."""
        sizes = [torch.Size(shape).numel() for shape in self.fields.values()]
        parts = nn.functional.embedding(index, self.rows).split(sizes, 1)
        logits = []
        for j, x in enumerate(inputs):
            weight, bias = parts[2 * j].unflatten(1, (self.num_classes, -1)), parts[2 * j + 1]
            logits.append(torch.baddbmm(bias.unsqueeze(2), weight, x.unsqueeze(2)).squeeze(2))
        out = mean_logits(logits)
        if not self.varying:
            return out
        classes = torch.arange(self.num_classes, device=out.device)
        return out.masked_fill(classes >= self.counts[index].unsqueeze(1), -torch.inf)


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
