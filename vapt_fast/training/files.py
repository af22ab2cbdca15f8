"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside ``path`` and move it there when it is safely on the disk.

    Whatever interrupts this, ``path`` has its old content or the new one, and nothing else stays behind
    (short of a crash of the whole process, which can leave the file beside it).

    Raises:
        OSError: the file system's own refusals, a full disk among them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
