"""How well a model does, class by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from .errors import UserError
from .trainer import classify

__all__ = ["Evaluation", "evaluate_by_class"]


@dataclass(frozen=True)
class Evaluation:
    """What a model said about labelled images.

    Attributes:
        class_names: of the model, by index.
        confusion: (C, C), int64: how many images of the row's class were said to be of the column's.
        loss: mean cross-entropy, nats.
    """

    class_names: tuple[str, ...]
    confusion: Tensor
    loss: float

    @property
    def num_images(self) -> int:
        """Images of all classes."""
        return int(self.confusion.sum())

    @property
    def class_counts(self) -> list[int]:
        """Images of each class."""
        return self.confusion.sum(1).tolist()

    @property
    def accuracy(self) -> float:
        """The share of the images whose class was said, 0 to 1."""
        return int(self.confusion.trace()) / self.num_images

    @property
    def class_accuracy(self) -> list[float | None]:
        """The same for the images of each class, None for a class without images."""
        right = self.confusion.diagonal().tolist()
        return [hit / total if total else None for hit, total in zip(right, self.class_counts, strict=True)]

    @property
    def mean_class_accuracy(self) -> float:
        """The mean of ``class_accuracy`` over the classes that have images."""
        known = [accuracy for accuracy in self.class_accuracy if accuracy is not None]
        return sum(known) / len(known)

    def largest_confusions(self, count: int) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: the true class, the class that was said, how many images."""
        mistakes = self.confusion - self.confusion.diag().diag()
        numbers, places = mistakes.flatten().sort(descending=True, stable=True)
        size = len(self.class_names)
        return [
            (self.class_names[place // size], self.class_names[place % size], number)
            for number, place in zip(numbers[:count].tolist(), places[:count].tolist(), strict=True)
            if number
        ]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can express it."""
        by_class = zip(self.class_names, self.class_counts, self.class_accuracy, strict=True)
        return {
            "images": self.num_images,
            "accuracy": self.accuracy,
            "mean_class_accuracy": self.mean_class_accuracy,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "classes": [
                {"class": name, "images": count, "accuracy": accuracy} for name, count, accuracy in by_class
            ],
            "confusion": self.confusion.tolist(),
        }


def evaluate_by_class(
    model: nn.Module,
    dataset: Dataset,
    class_names: Sequence[str],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run a model, which is left in eval mode, on labelled images.

    Args:
        model: gives logits (B, C).
        dataset: of (image, index of its class); at least one.
        class_names: C names, by index.
        batch_size: images a step.
        device: where to compute; the model is on it.
        workers: processes that read images.
        progress: told how many images are done, of how many.

    Raises:
        UserError: another number of class names than of logits, or an image that can't be read.
    """
    size = len(class_names)
    confusion = torch.zeros(size, size, dtype=torch.int64)
    loss, done = 0.0, 0
    for logits, labels in classify(model, dataset, batch_size=batch_size, device=device, workers=workers):
        if logits.shape[1] != size:
            raise UserError(f"the model tells {logits.shape[1]} classes apart, but has {size} class names")
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        places = (labels * size + logits.argmax(1)).cpu()
        confusion += torch.bincount(places, minlength=size * size).view(size, size)
        done += len(labels)
        if progress is not None:
            progress(done, len(dataset))
    return Evaluation(tuple(class_names), confusion, loss / done)
