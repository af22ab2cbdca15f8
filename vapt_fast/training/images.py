"""Image files, read as a person sees them; see vapt_fast.pixels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..arguments import listing
from ..pixels import as_seen
from .errors import UserError, printable

__all__ = [
    "IMAGE_EXTENSIONS",
    "check_folders",
    "check_images",
    "images_in",
    "is_image",
    "open_image",
    "read_image",
]

IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
"""Endings, in lower case, of the files in a folder that are taken for images."""

_SHOWN = 20


def is_image(path: str | Path, folder: str | Path) -> bool:
    """Whether a file in a folder is taken for an image: by its ending, unless it or a folder is hidden.

    Jupyter keeps copies of images in .ipynb_checkpoints, macOS writes ._NAME.jpg beside NAME.jpg.
    """
    inside = Path(path).relative_to(folder)
    hidden = any(part.startswith(".") for part in inside.parts)
    return inside.suffix.lower() in IMAGE_EXTENSIONS and not hidden


def check_folders(root: Path) -> None:
    """Raise a UserError if a folder in ``root``, or linked to from there, can't be listed."""
    for _ in _files_by_folder(root, follow_links=True):
        pass


def images_in(folder: Path) -> list[Path]:
    """Return the images in a folder and those below it, sorted; links to folders are not followed.

    Raises:
        UserError: one of the folders can't be listed.
    """
    listed = _files_by_folder(folder, follow_links=False)
    return sorted(path for files in listed for path in files if is_image(path, folder))


def _files_by_folder(root: Path, follow_links: bool) -> Iterator[list[Path]]:
    """Yield the files of each folder that is not hidden; os.walk and glob pass over what they can't list."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{printable(error.filename)} can't be read: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=follow_links):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield [Path(folder, name) for name in files]


def open_image(path: str | Path) -> Image.Image:
    """Read the image in a file, as RGB; see ``vapt_fast.pixels``.

    Raises:
        UserError: the file is missing, is no image, is damaged or is too large; the message names it.
    """
    try:
        # Not by its name: Pillow 13 maps a file that it knows the name of into memory, and gets an
        # uncompressed gray TIFF whose orientation swaps width and height wrong.
        file = open(path, "rb")  # noqa: SIM115, closed below
    except FileNotFoundError as error:
        raise UserError(f"{printable(path)} does not exist") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{printable(path)} can't be read as an image: {printable(reason)}") from error
    with file:
        return read_image(file, printable(path))


def read_image(file: IO[bytes], name: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Read an image from a file that is open, as RGB; see ``vapt_fast.pixels``.

    Args:
        file: the file.
        name: what messages call it.
        formats: the formats to try, by Pillow's names; None for all.

    Raises:
        UserError: it is no image, is damaged or is too large.
    """
    try:
        with warnings.catch_warnings():
            # Of Pillow, about tags that don't matter here and about sizes below its limit.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=formats) as image:
                image.load()
                return as_seen(image)
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(
            f"{name} is too large, it has more than {most:,} pixels: make it smaller first"
        ) from error
    except Exception as error:  # for damaged files, Pillow's decoders raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{name} can't be read as an image: {printable(reason)}") from error


def check_images(
    sources: Sequence[Any],
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    read: Callable[[Any], object] = open_image,
) -> None:
    """Read every image once.

    Args:
        sources: the files, or whatever ``read`` takes.
        workers: processes that read them; 0 reads in this one.
        progress: told after each image how many were read, of how many.
        read: reads one, or raises a UserError.

    Raises:
        UserError: some can't be read; the message names the first 20, each in a line, and how many more.
    """
    errors, data = [], cast(Any, sources)  # a data set, of which collate_fn is given one at a time
    loader = DataLoader(data, batch_size=None, num_workers=workers, collate_fn=partial(_error_of, read))
    for index, error in enumerate(loader):
        if error:
            errors.append(error)
        if progress is not None:
            progress(index + 1, len(sources))
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        more = len(errors) - _SHOWN
        lines = [*errors[:_SHOWN], *([f"and {more:,} more"] if more > 0 else [])]
        raise UserError(listing(f"{len(errors):,} of {len(sources):,} images can't be read", lines))


def _error_of(read: Callable[[Any], object], source: Any) -> str:
    """Return why an image can't be read; empty if it can."""
    try:
        read(source)
    except UserError as error:
        return str(error)
    return ""
