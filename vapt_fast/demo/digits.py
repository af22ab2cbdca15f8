"""The 1,797 real handwritten digits of scikit-learn as RGB images."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image

__all__ = ["NEW_DIGITS", "OLD_DIGITS", "digit_images"]

OLD_DIGITS = range(5)  # those that the backbone was pre-trained on
NEW_DIGITS = range(5, 10)  # those that the methods adapt it to
_WHITE = 16  # brightest value in the data


def digit_images(digits: Iterable[int] = range(10)) -> tuple[list[Image.Image], list[int]]:
    """Return images of some of the ten digits, in the order in which scikit-learn stores them.

    Args:
        digits: which of 0 to 9.

    Returns:
        The images (RGB, 8 x 8 pixels, white on black) and for each the digit that it shows.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; the message says how to install it.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digit images come with scikit-learn, which is not installed; "
            "install it with: pip install 'vapt_fast[demo]'"
        ) from error
    wanted = set(digits)
    data = load_digits()
    brightness = (data.images * (255 / _WHITE)).round().astype("uint8")
    chosen = [index for index, digit in enumerate(data.target) if digit in wanted]
    images = [Image.fromarray(brightness[index]).convert("RGB") for index in chosen]
    return images, [int(data.target[index]) for index in chosen]
