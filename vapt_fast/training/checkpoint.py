"""Checkpoints: tensors, numbers, texts, lists and dicts in one file that is never half-written.

The file begins with one line, ``vapt_fast checkpoint, version 0.1.0, sha256 ...``; what torch.save
writes follows, and the sha256 is of that.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..files import write_atomically
from .errors import UserError

__all__ = ["load_checkpoint", "save_checkpoint"]

_HEADER = "vapt_fast checkpoint, version {}, sha256 {}\n"
_PATTERN = re.compile(_HEADER.format(r"(\S+)", "([0-9a-f]{64})").encode())


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``; an earlier checkpoint stays whole until this one takes its place.

    Raises:
        OSError: the file system's own refusals.
    """
    # In memory first: torch.save on a full disk raises a RuntimeError that doesn't say so.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    header = _HEADER.format(__version__, hashlib.sha256(content).hexdigest())
    write_atomically(path, header.encode() + content)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what ``save_checkpoint`` of this version wrote, on the CPU. Nothing in the file can run code.

    Raises:
        UserError: there is no such file, it is damaged, or another version of this library wrote it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: there is nothing to resume") from error
    header = _PATTERN.match(content)
    if header is None:
        raise UserError(f"{path} is damaged or no checkpoint; remove it, and the run starts anew")
    version, digest = (part.decode() for part in header.groups())
    if version != __version__:
        raise UserError(
            f"{path} was written by vapt_fast {version}, and this is {__version__}: go on with that "
            "version, or remove it, and the run starts anew"
        )
    content = content[header.end() :]
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path} is damaged (its sha256 differs); remove it, and the run starts anew")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
