"""Batches of images and labels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from .errors import UserError

__all__ = ["LabelledImages", "in_memory", "make_loader", "seed_cpu"]


class LabelledImages(Protocol):
    """A data set of known size, of (image (3, H, W), index of its class, or of each pixel's (H, W))."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def in_memory(dataset: LabelledImages) -> TensorDataset:
    """Return a data set with all images decoded and transformed once, by transforms that draw nothing."""
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return TensorDataset(torch.stack(images), default_collate(list(labels)))


class Batches:
    """The batches of a DataLoader on a device, which raise the UserError that names an unreadable image.

    A worker hands errors over as values: raised, they would arrive wrapped in its traceback.
    """

    def __init__(self, loader: DataLoader, device: torch.device | str) -> None:
        self._loader, self._device = loader, device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            images, labels = (part.to(self._device, non_blocking=True) for part in batch)
            yield images, labels


def seed_cpu(seed: int, index: int) -> int:
    """Seed Python's, NumPy's and PyTorch's generators of the CPU by (seed, index), and return their seed."""
    mixed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.default_generator.manual_seed(mixed)
    return mixed


def _read(dataset: LabelledImages, seed: int, indices: list[int]) -> Any:
    """Return a batch, or the error of the first image in it that can't be read.

    What is drawn for an image depends on (seed, index), and not on which process reads it, and after which.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    items = []
    try:
        for index in indices:
            seed_cpu(seed, index)
            items.append(dataset[index])
    except UserError as error:
        return error
    finally:  # dropout goes on with what it would have drawn
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
    return default_collate(items)


class _Parts(Sampler[list[int]]):
    """The part of each batch that a process takes; of a batch that is too small for that, its first image."""

    def __init__(self, batches: BatchSampler, index: int, count: int) -> None:
        self._batches, self._index, self._count = batches, index, count

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield batch[self._index :: self._count] or batch[:1]


def make_loader(
    dataset: LabelledImages,
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> Batches:
    """Return batches of (images (B, 3, H, W), labels (B,)).

    Args:
        dataset: of (image, label).
        batch_size: images a batch; the last batch may have fewer.
        shuffle_seed: of the order, and of what is drawn for each image; None for the stored order.
        workers: processes that read images; 0 reads in this one. Data in memory needs none.
        part: (i, n) for the images i, i + n, ... of each batch; its first, where there is none of these.
        device: where to put the batches; a GPU gets the next one behind what it is still computing.

    Raises:
        UserError: while iterating, an image that can't be read; the message names it.
    """
    sampler: Sampler[int] = SequentialSampler(dataset)
    if shuffle_seed is not None:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(shuffle_seed))
    generator = torch.Generator()  # of its own: the global one stays out of it
    batches: Sampler[list[int]] = BatchSampler(sampler, batch_size, drop_last=False)
    if part[1] > 1:
        batches = _Parts(cast(BatchSampler, batches), *part)
    if isinstance(dataset, TensorDataset):
        # One indexing a batch instead of one an image.
        return Batches(DataLoader(dataset, batch_size=None, sampler=batches, generator=generator), device)
    loader = DataLoader(
        cast(Any, range(len(dataset))),
        batch_sampler=batches,
        generator=generator,
        num_workers=workers,
        collate_fn=partial(_read, dataset, shuffle_seed or 0),
        pin_memory=torch.cuda.is_available(),
    )
    return Batches(loader, device)
