"""The command ``vapt-fast`` and its subcommands; timm's scripts among them."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from .._version import __version__
from .bench import bench
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .export import export
from .help import Command, Group
from .info import info
from .predict import predict
from .retrieve import retrieve
from .scripts import timm
from .serve import serve
from .sweep import sweep
from .timm_adapter import timm_adapter
from .train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="vapt-fast",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    *(train, sweep, predict, evaluate, explain, export, serve),
    *(retrieve, demo, bench, info, timm_adapter),
)
for command in COMMANDS:
    app.command(cls=Command)(command)
# Whatever comes after the script's name is the script's, its --help too.
app.command(cls=Command, context_settings={"allow_interspersed_args": False})(timm)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vapt-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Adapt frozen timm Vision Transformers with prompts computed from each image (VAPT)."""


def main() -> None:
    """Entry point. Exits with 0, 1 (the machine failed: a full disk), 2 (wrong use) or 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that lack a letter of a name
    app()
