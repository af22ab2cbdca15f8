"""Metrics as JSON lines: one object a line, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["MetricsLog"]


class MetricsLog:
    """A log that appends objects to a file, each on the disk before ``write`` returns.

    Args:
        path: the file; None to keep nothing.
        keep: bytes of an earlier run to keep, the rest is cut off; 0 starts anew.
    """

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, min(keep, path.stat().st_size))

    @property
    def size(self) -> int:
        """The number of bytes written so far."""
        return 0 if self._path is None else self._path.stat().st_size

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one object. Numbers that are not finite become null, for which JSON has a name."""
        if self._path is None:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
