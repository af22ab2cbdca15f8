"""The console of all commands: where and how they print, and how they fail.

Whatever comes from users (paths, names of classes, messages about them) is printed by ``say`` or stands in a
``cell``. A string that is given to rich as it is would be read as its markup: "scan[1].png" loses a part.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..adapters import AdapterError
from ..ops.backend import BackendUnavailableError
from ..training.errors import UserError, printable

__all__ = [
    "cell",
    "count",
    "fail",
    "failures",
    "finish",
    "out",
    "pick_device",
    "print_best",
    "progress_bars",
    "say",
    "status",
]

out = Console()
"""For results."""

status = Console(stderr=True)
"""For progress and errors, so that results can be piped on."""

INTERRUPTED = 130  # as shells report a program stopped by Ctrl-C


def say(message: str, console: Console | None = None, style: str = "") -> None:
    """Print a message, as it is and without breaking its lines, to ``out`` or another console."""
    text = Text("\n".join(map(printable, message.split("\n"))), style)
    (out if console is None else console).print(text, soft_wrap=True)


def cell(text: object) -> Text:
    """Return a text for a table, as it is, in one line."""
    return Text(printable(str(text)))


def print_best(name: str, number: str, rows: Iterable[tuple[str, list[tuple[str, str]]]]) -> None:
    """Print a table of files, each with lines of a ``name`` and a ``number``; nothing without files."""
    table = Table()
    for column in ("file", name):
        table.add_column(column, overflow="fold")
    table.add_column(number)
    for file, lines in rows:
        names, numbers = zip(*lines, strict=True) if lines else ((), ())
        table.add_row(cell(file), Text("\n").join(map(cell, names)), "\n".join(numbers))
    if table.row_count:
        out.print(table)


def finish(found: list[Any], as_json: bool, show: Callable[[list[Any]], None], errors: list[str]) -> None:
    """Print what a command has found, as JSON or by ``show``, and its errors, with which it exits with 2."""
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    for error in errors:
        say(f"error: {error}", status, "red")
    if errors:
        raise typer.Exit(2)


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with what it counts: "1 image", "1,200 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one error and exit."""
    say(f"error: {message}", status, "red")
    raise typer.Exit(code)


def progress_bars(**options: Any) -> Progress:
    """Return progress bars on ``status``, each with its description, count and remaining time."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=status, **options)


def pick_device(name: str) -> str:
    """Return the device of that name, "auto" being a GPU if there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as torch says it
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name!r} is not usable here; expected auto, cpu, cuda, ...: {reason}"
        ) from error
    return name


@contextmanager
def failures(
    advice: str = "", spell: Callable[[str], str] = str, *, begun: Path | None = None
) -> Iterator[None]:
    """Turn errors that users can do something about into a message and an exit code.

    Args:
        advice: how to resume after Ctrl-C or a full disk.
        spell: returns the message of an error as it is shown.
        begun: a file without which there is nothing to resume, and no advice.
    """

    def go_on() -> str:
        return f" {advice}" if advice and (begun is None or begun.exists()) else ""

    try:
        yield
    except (UserError, AdapterError, BackendUnavailableError, ModuleNotFoundError) as error:
        fail(spell(str(error)))
    except KeyboardInterrupt:
        fail(f"stopped.{go_on()}", INTERRUPTED)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f"the disk is full: {error}. Free some space.{go_on()}", code=1)
        if error.filename is None:  # not about a file of the user's
            raise
        fail(f"{error.filename}: {error.strerror}", code=1)
