"""Batches of images and labels."""

from __future__ import annotations

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

__all__ = ["in_memory", "make_loader"]


def in_memory(dataset: Dataset) -> TensorDataset:
    """All images of a data set, decoded and transformed once. For transforms without anything random."""
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


def make_loader(
    dataset: Dataset, batch_size: int, *, shuffle_seed: int | None = None, workers: int = 0
) -> DataLoader:
    """Batches of (images (B, 3, H, W), labels (B,)).

    Args:
        dataset: of (image, label).
        batch_size: images a batch; the last batch may have fewer.
        shuffle_seed: of the order and of the workers' own randomness; None for the stored order.
        workers: processes that read images; 0 reads in this one. Data in memory needs none.
    """
    if shuffle_seed is None:
        sampler = SequentialSampler(dataset)
    else:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(shuffle_seed))
    # A generator of its own, for the workers: the order and the global generator stay out of it.
    generator = torch.Generator().manual_seed(shuffle_seed or 0)
    if isinstance(dataset, TensorDataset):
        # One indexing a batch instead of one an image.
        batches = BatchSampler(sampler, batch_size, drop_last=False)
        return DataLoader(dataset, batch_size=None, sampler=batches, generator=generator)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        generator=generator,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
