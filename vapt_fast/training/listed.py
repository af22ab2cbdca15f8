"""Images that a list names: one file of paths and labels for each split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError, printable
from .images import open_image

__all__ = ["ImageList", "ListedImages", "check_disjoint", "check_present", "read_list_file"]

_SHOWN = 3  # of the paths that are wrong, how many a message names


@dataclass(frozen=True)
class ImageList:
    """The images of one split, as a list names them.

    Attributes:
        file: the list.
        sha256: of that file, in hex.
        paths: of the images, absolute.
        labels: the class of each, by index.
    """

    file: Path
    sha256: str
    paths: list[str] = field(repr=False)
    labels: list[int] = field(repr=False)


class ListedImages:
    """A data set of the images in a list: (what the transform makes of the image, index of its class).

    Args:
        paths, labels: of the images, in order.
        transform: of a PIL image, applied whenever an image is read.

    Attributes:
        paths, labels: as given.
    """

    def __init__(self, paths: Sequence[str], labels: Sequence[int], transform: Any) -> None:
        self.paths, self.labels = list(paths), list(labels)
        self._transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Read one image.

        Raises:
            UserError: it is missing or damaged.
        """
        return self._transform(open_image(self.paths[index])), self.labels[index]


def read_list_file(file: Path, expected: str) -> tuple[str, str]:
    """Return the text of a list and its sha256.

    Args:
        file: the list.
        expected: the layout that it belongs to, for the message.

    Raises:
        UserError: it is missing or no text.
    """
    try:
        content = file.read_bytes()
        return content.decode("utf-8"), hashlib.sha256(content).hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"{printable(file)} does not exist; expected {expected}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(file)} is no text: {error}; expected {expected}") from error


def check_present(images: ImageList) -> None:
    """Check that every image of a list exists, folder by folder, which is quick on a network's disk too.

    Raises:
        UserError: some don't; the message names the first.
    """
    found: dict[str, set[str]] = {}
    missing = []
    for path in images.paths:
        folder, name = os.path.split(path)
        if folder not in found:
            found[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in found[folder]:
            missing.append(path)
    if missing:
        raise UserError(
            f"{len(missing):,} of the {len(images.paths):,} images in {printable(images.file)} do not exist: "
            f"{_some(missing)}"
        )


def check_disjoint(lists: Sequence[ImageList]) -> None:
    """Check that no image is listed twice, in one list or in two.

    Raises:
        UserError: one is; the message names it.
    """
    seen: dict[str, ImageList] = {}
    for images in lists:
        for path in images.paths:
            if path in seen:
                where = printable(images.file)
                also = "twice" if seen[path] is images else f"and in {printable(seen[path].file)}"
                raise UserError(f"{printable(path)} is listed in {where} {also}: every image belongs once")
            seen[path] = images


def _some(paths: list[str]) -> str:
    more = "" if len(paths) <= _SHOWN else f" and {len(paths) - _SHOWN:,} more"
    return ", ".join(map(printable, paths[:_SHOWN])) + more
