"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_atomically", "write_files"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write one file, as ``write_files`` does."""
    write_files(path.parent, {path.name: content})


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files beside their places and move them there, in order, when all are safely on the disk.

    Whatever interrupts this, each file has its old content or the new one, and nothing else stays behind
    (short of a crash of the whole process, which can leave the files beside them).

    Raises:
        OSError: the file system's own refusals, a full disk among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = {folder / f"{name}.{uuid.uuid4().hex}.tmp": folder / name for name in contents}
    try:
        for path, content in zip(beside, contents.values(), strict=True):
            with open(path, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, place in beside.items():
            os.replace(path, place)
    finally:
        for path in beside:
            path.unlink(missing_ok=True)
