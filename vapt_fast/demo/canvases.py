"""Pictures for segmentation: real digits at random places, with exact masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .digits import NEW_DIGITS, digit_images

__all__ = ["digit_canvases", "write_canvases"]

_LEAST = 100  # brightness of a digit's own pixels; darker ones belong to the background
_SIDES = (20, 32)  # of a digit, pixels
_TRIES = 40  # places that are tried for a digit before it is left out
_PARTS = {"train": (0.0, 0.5), "val": (0.5, 0.7), "test": (0.7, 1.0)}


def digit_canvases(
    count: int,
    digits: Iterable[int] = NEW_DIGITS,
    *,
    size: tuple[int, int] = (64, 64),
    part: str = "train",
    seed: int = 0,
) -> list[tuple[Image.Image, Image.Image]]:
    """Return pictures of one to four digits that don't overlap, and their masks.

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
    images, shown = digit_images(known)
    first, last = (round(share * len(images)) for share in _PARTS[part])
    generator = np.random.default_rng([seed, *part.encode()])
    return [
        _canvas(images[first:last], [known.index(digit) + 1 for digit in shown[first:last]], size, generator)
        for _ in range(count)
    ]


def write_canvases(folder: Path, counts: dict[str, int], *, seed: int = 0) -> None:
    """Write pictures and masks of the digits 5 to 9 in the layout of ``vapt-fast train --task segmentation``.

    Args:
        folder: where to.
        counts: how many for each of "train", "val" and "test".
        seed: as for ``digit_canvases``.
    """
    for part, count in counts.items():
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
        for index, (image, mask) in enumerate(digit_canvases(count, part=part, seed=seed)):
            image.save(folder / part / "images" / f"{index:04}.png")
            mask.save(folder / part / "masks" / f"{index:04}.png")
    names = ["background", *map(str, NEW_DIGITS)]
    (folder / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def _canvas(
    images: list[Image.Image], classes: list[int], size: tuple[int, int], generator: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    height, width = size
    picture = generator.integers(0, 40, (height, width)).astype(np.uint8)
    mask, taken = np.zeros(size, np.uint8), np.zeros(size, bool)
    for _ in range(generator.integers(1, 5)):
        chosen, side = generator.integers(len(images)), int(generator.integers(_SIDES[0], _SIDES[1] + 1))
        digit = np.asarray(images[chosen].convert("L").resize((side, side), Image.Resampling.BICUBIC))
        for _ in range(_TRIES):
            top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
            place = np.s_[top : top + side, left : left + side]
            if not taken[place].any():
                picture[place] = np.maximum(picture[place], digit)
                mask[place][digit >= _LEAST] = classes[chosen]
                taken[place] = True
                break
    return Image.fromarray(picture).convert("RGB"), Image.fromarray(mask)
