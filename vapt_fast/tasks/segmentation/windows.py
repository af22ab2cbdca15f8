"""Sliding windows: a model of fixed image size on larger images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...arguments import integer, size_pair

__all__ = ["sliding_window"]


def sliding_window(
    model: nn.Module,
    images: Tensor,
    size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    batch_size: int = 8,
) -> Tensor:
    """Return the mean logits of overlapping windows at every pixel.

    Windows start every ``stride`` pixels; the last along each side ends with the image. Differentiable as
    the model is.

    Args:
        model: gives logits (B, K, height, width) of images of ``size``, such as a Segmenter.
        images: (B, C, H, W), at least of ``size``.
        size: (height, width) of a window, pixels, or one number for both.
        stride: (vertical, horizontal) distance of windows, at most ``size``; None for two thirds of it.
        batch_size: how many windows the model gets at once.

    Returns:
        Logits (B, K, H, W), in the dtype of the model's.

    Raises:
        TypeError, ValueError: sizes that are none, images smaller than a window, or a stride that leaves
            pixels out.
    """
    height, width = size_pair("size", size)
    steps = (-(-2 * height // 3), -(-2 * width // 3)) if stride is None else size_pair("stride", stride)
    integer("batch_size", batch_size, minimum=1)
    if images.shape[-2] < height or images.shape[-1] < width:
        raise ValueError(
            f"images must be at least {height}x{width} pixels, the size of a window, got "
            f"{images.shape[-2]}x{images.shape[-1]}; resize or pad them"
        )
    if steps[0] > height or steps[1] > width:
        raise ValueError(f"stride must be at most the window's size {(height, width)}, got {steps}")
    tops, lefts = _starts(images.shape[-2], height, steps[0]), _starts(images.shape[-1], width, steps[1])
    places = [(image, top, left) for image in range(len(images)) for top in tops for left in lefts]
    total: Tensor | None = None
    for first in range(0, len(places), batch_size):
        chosen = places[first : first + batch_size]
        windows = torch.stack([images[b, :, y : y + height, x : x + width] for b, y, x in chosen])
        logits = model(windows)
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[-2:])
            counts = logits.new_zeros(images.shape[-2:])
        for (b, y, x), window in zip(chosen, logits, strict=True):
            total[b, :, y : y + height, x : x + width] += window
            counts[y : y + height, x : x + width] += b == 0
    if total is None:
        raise ValueError("images must be at least one, got none")
    return total / counts


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows start along a side: every ``stride``, the last as late as possible."""
    return [*range(0, length - window, stride), length - window]
