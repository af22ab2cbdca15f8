"""Pictures for localisation: a real digit to name at a random place, a digit to ignore, and exact masks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .digits import NEW_DIGITS, OLD_DIGITS, digit_images

__all__ = ["PlacedDigits", "placed_digits"]

_CELL = 32  # pixels; a picture has 2 x 2 of them, and no two digits in one
_SIDES = (26, 32)  # of a digit, smallest and largest
_INK = 100  # brightness from which on a pixel belongs to the digit


class PlacedDigits(NamedTuple):
    """Pictures of two digits each.

    Attributes:
        images: RGB, 64 x 64 pixels, white on black.
        labels: the class of each, the place of its digit among those to name.
        masks: (count, 64, 64), bool, the pixels of the digit to name.
    """

    images: list[Image.Image]
    labels: list[int]
    masks: Tensor


def placed_digits(
    count: int,
    digits: Iterable[int] = NEW_DIGITS,
    others: Iterable[int] = OLD_DIGITS,
    *,
    part: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> PlacedDigits:
    """Return pictures with a digit to name and one to ignore, each in a quarter of its own.

    Args:
        count: how many.
        digits: those to name, distinct numbers from 0 to 9.
        others: those to ignore, none of ``digits``; empty for pictures of one digit.
        part: the share of scikit-learn's images that is used, from where to where. Pictures of parts that
            don't overlap have no digit in common.
        seed: of the choice of images, sizes and places.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; the message says how to install it.
    """
    generator = np.random.default_rng(seed)
    known, unnamed = list(digits), list(others)
    drawn = [_drawn(chosen, count, part, generator) for chosen in (known, unnamed) if chosen]
    images, masks = [], torch.zeros(count, 2 * _CELL, 2 * _CELL, dtype=torch.bool)
    for index, pair in enumerate(zip(*(pictures for pictures, _ in drawn), strict=True)):
        canvas = np.zeros((2 * _CELL, 2 * _CELL), np.uint8)
        for digit, quarter in zip(pair, generator.choice(4, 2, replace=False), strict=False):
            side = int(generator.integers(_SIDES[0], _SIDES[1] + 1))
            top, left = _CELL * np.array(divmod(quarter, 2)) + generator.integers(_CELL - side + 1, size=2)
            pixels = np.asarray(digit.convert("L").resize((side, side), Image.Resampling.BICUBIC))
            if digit is pair[0]:
                masks[index, top : top + side, left : left + side] = torch.from_numpy(pixels >= _INK)
            canvas[top : top + side, left : left + side] = pixels
        images.append(Image.fromarray(canvas).convert("RGB"))
    labels = [known.index(digit) for digit in drawn[0][1]]
    return PlacedDigits(images, labels, masks)


def _drawn(
    digits: list[int], count: int, part: tuple[float, float], generator: np.random.Generator
) -> tuple[list[Image.Image], list[int]]:
    """Return ``count`` images of some digits and what they show, drawn with replacement."""
    images, shown = digit_images(digits)
    first, last = (round(share * len(images)) for share in part)
    chosen = generator.integers(first, last, size=count).tolist()
    return [images[index] for index in chosen], [shown[index] for index in chosen]
