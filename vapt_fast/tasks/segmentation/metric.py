"""Mean intersection over union of a whole data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...training.evaluation import Evaluation
from ...training.loss import IGNORED

__all__ = ["IGNORED", "PixelEvaluation", "confusion_matrix"]


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int, ignored: int = IGNORED) -> Tensor:
    """Count pixels by their class and the class that they were taken for.

    Args:
        predicted: classes, integers of any shape.
        labels: classes, integers of the same shape.
        num_classes: K, how many there are.
        ignored: a label whose pixels don't count.

    Returns:
        (K, K), int64, on the device of the labels: the row is the true class.

    Raises:
        ValueError: another shape, or a class out of range.
    """
    if predicted.shape != labels.shape:
        raise ValueError(
            f"predicted must be of the labels' shape {tuple(labels.shape)}, got {tuple(predicted.shape)}"
        )
    counted = labels != ignored
    true, taken = labels[counted].long(), predicted[counted].long()
    for name, classes in (("labels", true), ("predicted", taken)):
        if classes.numel() and not (int(classes.min()) >= 0 and int(classes.max()) < num_classes):
            raise ValueError(
                f"{name} must be classes from 0 to {num_classes - 1}, or {ignored} (ignored) in labels, got "
                f"some from {int(classes.min())} to {int(classes.max())}"
            )
    cells = torch.bincount(true * num_classes + taken, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


@dataclass(frozen=True)
class PixelEvaluation(Evaluation):
    """The predictions of a model for the pixels of a data set, counted over all images.

    Attributes:
        class_names: of the model, by index.
        confusion: (K, K), int64: how many pixels of the row's class were taken for the column's.
        loss: mean cross-entropy, nats.
    """

    unit = "pixels"

    @property
    def ious(self) -> list[float | None]:
        """The intersection over union TP / (TP + FP + FN) of each class; None of one that appears nowhere."""
        hits = self.confusion.diagonal()
        unions = self.confusion.sum(0) + self.confusion.sum(1) - hits
        return [
            hit / union if union else None for hit, union in zip(hits.tolist(), unions.tolist(), strict=True)
        ]

    @property
    def mean_iou(self) -> float:
        """The mean of ``ious`` over the classes that appear, in labels or predictions."""
        known = [iou for iou in self.ious if iou is not None]
        return sum(known) / len(known) if known else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        content = {"mean_iou": self.mean_iou, **super().as_dict()}
        classes = zip(content["classes"], self.ious, strict=True)
        return content | {"classes": [entry | {"iou": iou} for entry, iou in classes]}
