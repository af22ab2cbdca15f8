"""Images from clients: what is no image, or would fill the memory, is refused before it is decoded."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from ..training.errors import UserError
from ..training.images import read_image
from .refusal import Refusal

__all__ = ["decode"]

MOST_ASPECT = 64

# Those of Pillow's decoders that users need; others run programs (EPS) or are seldom tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode(content: bytes, most_pixels: int) -> Image.Image:
    """Return the image in a file, as RGB, read as ``vapt-fast predict`` reads it.

    Raises:
        Refusal: 415 for what is no image, 413 for more than ``most_pixels``, 422 for one that is damaged
            or far longer than wide.
    """
    if not content:
        raise Refusal(400, "the request has no image")
    too_large = Refusal(413, f"the image has more than {most_pixels:,} pixels")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # reads no pixels
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise too_large from error
    except UnidentifiedImageError as error:
        raise Refusal(415, f"the body is no image; expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # for damaged files, Pillow's decoders raise almost anything
        raise Refusal(422, "the image is damaged") from error
    if width * height > most_pixels:
        raise too_large
    if max(width, height) > MOST_ASPECT * min(width, height):
        # The short side is scaled to the model's, and the long one with it.
        raise Refusal(422, f"the image's sides differ by a factor of more than {MOST_ASPECT}")
    try:
        return read_image(io.BytesIO(content), "the image", FORMATS)
    except UserError as error:
        raise Refusal(422, str(error)) from error
