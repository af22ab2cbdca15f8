"""The loss of classification and segmentation, and how many labels were hit."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "cross_entropy", "num_right"]

IGNORED = -100
"""The label of what doesn't count; PyTorch's default."""


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of the labels that count, nats; 0 where none does.

    Args:
        logits: (B, K), or (B, K, H, W) for every pixel.
        labels: (B), or (B, H, W), int64, IGNORED ones among them.
        label_smoothing: share of the target spread over all classes.
    """
    total = F.cross_entropy(
        logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


def num_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many labels have the largest logit, float64; shapes as above.

    Of maps of labels: the share of the pixels that count, times the number of images.
    """
    right = (logits.argmax(1) == labels).sum().double()
    return right * (len(labels) / (labels != IGNORED).sum().clamp(min=1))
