"""``vapt-fast timm``: timm's own scripts, with the ``vapt_*`` names."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..training import UserError
from .console import failures

__all__ = ["timm"]


def timm(
    script: Annotated[Path, typer.Argument(help="train.py, validate.py, inference.py or another script.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
) -> None:
    """Run a script of timm's, or your own, with the vapt_ names known to timm.

    For example: vapt-fast timm validate.py DATA --model vapt_vit_base_patch16_224 --checkpoint CHECKPOINT.
    The exit code is the script's.
    """
    with failures():
        if not script.is_file():
            raise UserError(f"SCRIPT must be a Python file, got {script}, which is no file")
    argv, path = sys.argv[:], sys.path[:]
    sys.argv = [str(script), *(arguments or [])]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
