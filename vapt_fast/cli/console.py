"""What all commands share: where and how they print, and how they fail.

Whatever comes from users (paths, names of classes, messages about them) is printed by ``say`` or stands in a
``cell``. A string that is given to rich as it is would be read as its markup: "scan[1].png" loses a part.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from ..adapters import AdapterError
from ..ops import backend as backends
from ..training.errors import UserError, printable

__all__ = ["cell", "check_backend", "count", "fail", "failures", "out", "say", "status"]

out = Console()
"""For results."""

status = Console(stderr=True)
"""For progress and errors, so that results can be piped on."""

INTERRUPTED = 130  # as shells report a program stopped by Ctrl-C


def say(message: str, console: Console | None = None, style: str = "") -> None:
    """Print a message, as it is and without breaking its lines, to ``out`` or another console."""
    (out if console is None else console).print(_as_data(message, style), soft_wrap=True)


def cell(text: object) -> Text:
    """A text in a table, as it is, in one line."""
    return Text(printable(str(text)))


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with what it counts: "1 image", "1,200 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _as_data(message: str, style: str = "") -> Text:
    return Text("\n".join(map(printable, message.split("\n"))), style)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one error and exit."""
    say(f"error: {message}", status, "red")
    raise typer.Exit(code)


def check_backend(name: str | None) -> None:
    """Check ``--backend``, or the environment variable where it is not given, before anything is done.

    Raises:
        UserError: not the name of a backend.
        BackendUnavailableError: it can't run here.
    """
    try:
        if name is None:
            backends.resolve()
        else:
            backends.check_backend(name, "--backend")
    except ValueError as error:
        raise UserError(str(error)) from error


@contextmanager
def failures(advice: str = "") -> Iterator[None]:
    """Turn the errors that users can do something about into a message and an exit code.

    Args:
        advice: how to go on after Ctrl-C or a full disk.
    """
    try:
        yield
    except (UserError, AdapterError, backends.BackendUnavailableError, ModuleNotFoundError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"stopped. {advice}".strip(), INTERRUPTED)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f"the disk is full: {error}. Free some space. {advice}".strip(), code=1)
        if error.filename is None:  # not about a file of the user's
            raise
        fail(f"{error.filename}: {error.strerror}", code=1)
