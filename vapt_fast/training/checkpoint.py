"""Checkpoints: tensors, numbers, texts, lists and dicts in one file that is never half-written."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .files import write_atomically

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``; an earlier checkpoint stays whole until this one takes its place.

    Raises:
        OSError: the file system's own refusals.
    """
    # In memory first: torch.save on a full disk raises a RuntimeError that doesn't say so.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` wrote, on the CPU. Nothing in the file can run code.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: there is nothing to resume") from error
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or no checkpoint; start again without --resume") from error
