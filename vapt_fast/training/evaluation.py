"""Accuracy and loss of a model on labelled images, in all and class by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from . import parallel
from .errors import UserError
from .loader import LabelledImages, make_loader
from .trainer import autocast

__all__ = ["Evaluation", "Score", "classify", "evaluate", "evaluate_by_class"]


@dataclass(frozen=True)
class Score:
    """The accuracy and the loss of a model on a data set.

    Attributes:
        accuracy: share of the images whose class is named right, 0 to 1; of the pixels in segmentation.
        loss: mean cross-entropy, nats.
        mean_iou: of segmentation, the mean intersection over union of the classes, 0 to 1.
    """

    accuracy: float
    loss: float
    mean_iou: float | None = None

    @property
    def merit(self) -> float:
        """What validation chooses by: ``mean_iou`` where there is one, else ``accuracy``."""
        return self.accuracy if self.mean_iou is None else self.mean_iou

    def entries(self, split: str) -> dict[str, float]:
        """Return what files of a run keep: ``validation_accuracy``, ``validation_loss``, ..."""
        return {f"{split}_{name}": value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a model on labelled images, counted.

    Attributes:
        class_names: of the model, by index.
        confusion: (C, C), int64: how many images of the row's class were taken for the column's.
        loss: mean cross-entropy, nats.
        unit: what is counted.
    """

    class_names: tuple[str, ...]
    confusion: Tensor
    loss: float
    unit: ClassVar[str] = "images"

    @property
    def num_images(self) -> int:
        """The number of images, or whatever else the unit is."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """The share of the images that were classified right, 0 to 1."""
        return int(self.confusion.trace()) / self.num_images

    @property
    def by_class(self) -> list[tuple[str, int, float | None]]:
        """Each class with its number of images and the accuracy on them, None without images."""
        totals, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        accuracies = (hit / total if total else None for hit, total in zip(right, totals, strict=True))
        return list(zip(self.class_names, totals, accuracies, strict=True))

    @property
    def mean_class_accuracy(self) -> float:
        """The mean accuracy of the classes that have images."""
        known = [accuracy for _, _, accuracy in self.by_class if accuracy is not None]
        return sum(known) / len(known)

    def largest_confusions(self, count: int) -> list[tuple[str, str, int]]:
        """Return the most frequent mistakes: the true class, the predicted one, the number of images."""
        mistakes = self.confusion - self.confusion.diag().diag()
        numbers, places = mistakes.flatten().sort(descending=True, stable=True)
        size = len(self.class_names)
        return [
            (self.class_names[place // size], self.class_names[place % size], number)
            for number, place in zip(numbers[:count].tolist(), places[:count].tolist(), strict=True)
            if number
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        return {
            self.unit: self.num_images,
            "accuracy": self.accuracy,
            "mean_class_accuracy": self.mean_class_accuracy,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "classes": [
                {"class": name, self.unit: count, "accuracy": accuracy}
                for name, count, accuracy in self.by_class
            ],
            "confusion": self.confusion.tolist(),
        }


@torch.no_grad()
def classify(
    model: nn.Module,
    dataset: LabelledImages,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    amp: str | None = None,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (B, C), float32, and labels (B,) of a data set, batch by batch, both on ``device``.

    Args:
        model: gives logits, and is on ``device``; it is left in eval mode.
        dataset: of (image, index of its class).
        batch_size, device: images a step, and where to compute.
        amp: compute in "bfloat16" or "float16" where that is safe (autocast); None for float32.
        workers: processes that read images.

    Raises:
        UserError: an image that can't be read.
    """
    device = torch.device(device)
    model.eval()
    for images, labels in make_loader(dataset, batch_size, workers=workers, device=device):
        with autocast(device, amp):
            logits = model(images)
        yield logits.float(), labels


def evaluate(model: nn.Module, dataset: LabelledImages, **options: Any) -> Score:
    """Return the accuracy and the loss of a model on a data set; arguments as for ``classify``.

    Of several processes that train together, each takes a part of the images, and all return the same.
    """
    part, left = dataset, len(dataset)
    if parallel.world_size() > 1:
        part, left = _part(dataset)
    totals = torch.zeros(2, dtype=torch.float64, device=options.get("device", "cpu"))  # images right, loss
    for logits, labels in classify(model, part, **options):
        logits, labels = logits[:left], labels[:left]
        left -= len(labels)
        right = ((logits.argmax(1) == labels) & ~logits.isnan().any(1)).sum()  # NaN names no class
        totals += torch.stack([right.double(), _total_loss(logits, labels)])
    parallel.add_up(totals)
    accuracy, loss = (totals / len(dataset)).tolist()
    return Score(accuracy, loss)


def evaluate_by_class(
    model: nn.Module,
    dataset: LabelledImages,
    class_names: Sequence[str],
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Count the predictions of a model on labelled images by class.

    Args:
        model: gives logits (B, C); it is left in eval mode.
        dataset: of (image, index of its class); at least one.
        class_names: C names, by index.
        progress: told how many images are done, of how many.
        **options: as for ``classify``.

    Raises:
        UserError: another number of class names than of logits, logits that are NaN, or an image that can't
            be read.
    """
    size = len(class_names)
    confusion = torch.zeros(size, size, dtype=torch.int64)
    loss, done = 0.0, 0
    for logits, labels in classify(model, dataset, **options):
        if logits.shape[1] != size:
            raise UserError(f"the model tells {logits.shape[1]} classes apart, but has {size} class names")
        if unknown := int(logits.isnan().any(1).sum()):
            raise UserError(
                f"the model gives NaN for {unknown} of {len(labels)} images, which names no class"
            )
        loss += _total_loss(logits, labels).item()
        cells = (labels * size + logits.argmax(1)).cpu()
        confusion += torch.bincount(cells, minlength=size * size).view(size, size)
        done += len(labels)
        if progress is not None:
            progress(done, len(dataset))
    return Evaluation(tuple(class_names), confusion, loss / done)


def _part(dataset: LabelledImages) -> tuple[LabelledImages, int]:
    """Return this process's images, and how many of them count: the first one fills in for one too few.

    With as many images all processes call the model as often, as they must where its weights are spread.
    """
    size = parallel.world_size()
    indices = list(range(parallel.rank(), len(dataset), size))
    fills = [0] * (-(-len(dataset) // size) - len(indices))
    return Subset(cast(Any, dataset), indices + fills), len(indices)


def _total_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum").double()
