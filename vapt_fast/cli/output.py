"""Where a command may write, checked before it does anything else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..training import UserError

__all__ = ["check_file", "check_folder"]


def check_file(output: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    """Check that a file may be written.

    Raises:
        UserError: it ends in none of ``suffixes``, or as ``check_folder`` raises.
    """
    if output.suffix.lower() not in suffixes:
        raise UserError(f"--output must end in {' or '.join(suffixes)}, got {output}")
    check_folder(output.parent, [output.name], overwrite)


def check_folder(output: Path, names: Iterable[str], overwrite: bool) -> None:
    """Check that files may be written to a folder, which is made if it does not exist.

    Args:
        output: the folder.
        names: of the files, relative to it.
        overwrite: whether they may be there already.

    Raises:
        UserError: they are there, or the folder can't be made or written to.
    """
    folder = output.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--output must be in a folder, and {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output must be in a folder that can be written to, and {existing} can't")
    there = next((output / name for name in names if (output / name).exists()), None)
    if there is not None and not overwrite:
        raise UserError(f"{there} exists already: give --overwrite to replace it, or another --output")
