"""The command ``vapt-fast``: train, predict, demo, bench, info."""

from __future__ import annotations

import typer

from .bench import bench
from .demo import demo
from .info import info
from .predict import predict
from .train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="vapt-fast",
    help="Adapt frozen timm Vision Transformers with prompts computed from each image (VAPT).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, predict, demo, bench, info):
    app.command()(command)


def main() -> None:
    """Entry point. Exits with 0, 1 (the machine failed: a full disk), 2 (wrong use) or 130 (Ctrl-C)."""
    app()
