"""What all commands share: where they print, and how they fail."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from ..adapters import AdapterError
from ..backends._dispatch import BackendUnavailable
from ..training.errors import UserError

__all__ = ["fail", "failures", "out", "status"]

out = Console()
"""For results."""

status = Console(stderr=True)
"""For progress and errors, so that results can be piped on."""

INTERRUPTED = 130  # as shells report a program stopped by Ctrl-C


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one error and exit."""
    status.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def failures(advice: str = "") -> Iterator[None]:
    """Turn the errors that users can do something about into a message and an exit code.

    Args:
        advice: how to go on after Ctrl-C or a full disk.
    """
    try:
        yield
    except (UserError, AdapterError, BackendUnavailable, ModuleNotFoundError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"stopped. {advice}".strip(), INTERRUPTED)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f"the disk is full: {error}. Free some space. {advice}".strip(), code=1)
        if error.filename is None:  # not about a file of the user's
            raise
        fail(f"{error.filename}: {error.strerror}", code=1)
