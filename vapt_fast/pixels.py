"""Pictures as a person sees them, in 8 bits and three colours.

How numbers become brightness, the same in training, evaluation and prediction:

- 16-bit gray pictures are divided by the largest number of the smallest depth, of 8, 10, 12, 14 and 16
  bits, that holds their brightest pixel: 12-bit data in a 16-bit file by 4095. So are 32-bit integers of
  which none is negative or needs more than 16 bits.
- Floats within [0, 1] are multiplied by 255.
- Other floats and integers are stretched from their minimum to their maximum; a constant picture is black.
- NaN and infinities are refused.

The depth and the range are a picture's own. Where brightness has to be comparable between pictures that
differ in these, convert them to 8 bits first.

Transparent pixels are composed on white, an EXIF orientation is applied, and of several frames the first is
read.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from PIL import Image, ImageCms, ImageOps

__all__ = ["as_seen"]

_DEPTHS = (8, 10, 12, 14, 16)
_SAMPLE_FORMAT = 339  # TIFF tag: 1 is unsigned, 2 signed


def as_seen(image: Image.Image) -> Image.Image:
    """Return the picture as RGB; one that is RGB already, upright and opaque, stays as it is.

    Raises:
        ValueError: it has numbers that are no brightness.
    """
    return _as_rgb(_upright(image), _is_unsigned(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are read already: only the EXIF data are damaged, which viewers ignore
        return image


def _as_rgb(image: Image.Image, unsigned: bool) -> Image.Image:
    if image.mode[0] in "IF":  # "I", "I;16", "I;16B", ..., "F"
        return Image.fromarray(_brightness(image, unsigned)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return cast(Image.Image, ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _brightness(image: Image.Image, unsigned: bool) -> np.ndarray:
    """Return the pixels (H, W), uint8, of a gray picture with more than 8 bits."""
    numbers = np.asarray(image)
    if image.mode == "I" and unsigned:
        numbers = numbers.view(np.uint32)
    values = numbers.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are NaN or infinite")
    low, high = values.min(), values.max()
    if image.mode == "F":
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    elif low >= 0 and high < 2 ** _DEPTHS[-1]:
        low, high = 0.0, next(2.0**depth - 1 for depth in _DEPTHS if high < 2**depth)
    # Halves, so that the range of the largest floats is no overflow.
    share = (values / 2 - low / 2) / (high / 2 - low / 2) if high > low else np.zeros_like(values)
    gray = (255 * share).round().astype(np.uint8)
    if "transparency" in image.info:  # a number, of the one brightness that is transparent
        gray[values == image.info["transparency"]] = 255
    return gray


def _is_unsigned(image: Image.Image) -> bool:
    """Whether 32-bit integers, which Pillow takes for signed ones, are unsigned."""
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(_SAMPLE_FORMAT, (1,)) in (1, (1,))
