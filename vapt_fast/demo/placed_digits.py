"""Pictures with real digits at random places and exact masks, for localisation and segmentation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .digits import NEW_DIGITS, OLD_DIGITS, digit_images

__all__ = ["PlacedDigits", "digit_canvases", "placed_digits", "write_canvases"]

_INK = 100  # brightness from which on a pixel belongs to the digit
_CELL = 32  # pixels; a picture for localisation has 2 x 2 of them, and no two digits in one
_SIDES = (26, 32)  # of a digit there, smallest and largest
_CANVAS_SIDES = (20, 32)  # of one for segmentation
_TRIES = 40  # places that are tried for such a digit before it is left out
_PARTS = {"train": (0.0, 0.5), "val": (0.5, 0.7), "test": (0.7, 1.0)}


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
    known, labels, drawn = list(digits), list[int](), []
    for chosen in (known, list(others)):
        if chosen:
            images, shown = _part_of(chosen, part)
            indices = generator.integers(len(images), size=count)
            drawn.append([images[index] for index in indices])
            labels = labels or [known.index(shown[index]) for index in indices]
    pictures, masks = [], torch.zeros(count, 2 * _CELL, 2 * _CELL, dtype=torch.bool)
    for index, pair in enumerate(zip(*drawn, strict=True)):
        canvas = np.zeros((2 * _CELL, 2 * _CELL), np.uint8)
        for digit, quarter in zip(pair, generator.choice(4, 2, replace=False), strict=False):
            pixels = _resized(digit, _SIDES, generator)
            top, left = _CELL * np.array(divmod(quarter, 2)) + generator.integers(
                _CELL - len(pixels) + 1, size=2
            )
            place = np.s_[top : top + len(pixels), left : left + len(pixels)]
            if digit is pair[0]:
                masks[index][place] = torch.from_numpy(pixels >= _INK)
            canvas[place] = pixels
        pictures.append(Image.fromarray(canvas).convert("RGB"))
    return PlacedDigits(pictures, labels, masks)


def digit_canvases(
    count: int,
    digits: Iterable[int] = NEW_DIGITS,
    *,
    size: tuple[int, int] = (64, 64),
    part: str = "train",
    seed: int = 0,
) -> list[tuple[Image.Image, Image.Image]]:
    """Return pictures of one to four digits that don't overlap, and their masks, for segmentation.

    Args:
        count: how many.
        digits: which of 0 to 9, distinct; the k-th of them has class k + 1, the background 0.
        size: (height, width), at least 32.
        part: "train", "val" or "test", which show different images of scikit-learn's.
        seed: of the choice of digits, their sizes and places, and of the noise.

    Returns:
        Pairs of an RGB picture and a gray mask whose values are the classes.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; the message says how to install it.
    """
    known = list(digits)
    images, shown = _part_of(known, _PARTS[part])
    classes = [known.index(digit) + 1 for digit in shown]
    generator = np.random.default_rng([seed, *part.encode()])
    return [_canvas(images, classes, size, generator) for _ in range(count)]


def write_canvases(folder: Path, counts: dict[str, int], *, seed: int = 0) -> None:
    """Write pictures and masks of the digits 5 to 9 in the layout of ``vapt-fast train --task segmentation``.

    Args:
        folder: where to.
        counts: how many for each of "train", "val" and "test".
        seed: as for ``digit_canvases``.
    """
    for part, count in counts.items():
        for index, pair in enumerate(digit_canvases(count, part=part, seed=seed)):
            for kind, picture in zip(("images", "masks"), pair, strict=True):
                path = folder / part / kind / f"{index:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
    names = ["background", *map(str, NEW_DIGITS)]
    (folder / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def _canvas(
    images: list[Image.Image], classes: list[int], size: tuple[int, int], generator: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    height, width = size
    picture = generator.integers(0, 40, (height, width)).astype(np.uint8)
    mask, taken = np.zeros(size, np.uint8), np.zeros(size, bool)
    for _ in range(generator.integers(1, 5)):
        chosen = generator.integers(len(images))
        digit = _resized(images[chosen], _CANVAS_SIDES, generator)
        side = len(digit)
        for _ in range(_TRIES):
            top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
            place = np.s_[top : top + side, left : left + side]
            if not taken[place].any():
                picture[place] = np.maximum(picture[place], digit)
                mask[place][digit >= _INK] = classes[chosen]
                taken[place] = True
                break
    return Image.fromarray(picture).convert("RGB"), Image.fromarray(mask)


def _part_of(digits: list[int], part: tuple[float, float]) -> tuple[list[Image.Image], list[int]]:
    """Return a share of the images of some digits, from where to where, and what they show."""
    images, shown = digit_images(digits)
    first, last = (round(share * len(images)) for share in part)
    return images[first:last], shown[first:last]


def _resized(digit: Image.Image, sides: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Return the brightness of a digit as a square of a random side."""
    side = int(generator.integers(sides[0], sides[1] + 1))
    return np.asarray(digit.convert("L").resize((side, side), Image.Resampling.BICUBIC))
