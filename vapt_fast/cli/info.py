"""``vapt-fast info``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import info as machine
from ..model import AdaptiveViT
from ..training import UserError
from ..training.methods import check_backbone
from .console import failures, say

__all__ = ["info"]


def info(
    model: Annotated[
        str | None, typer.Argument(help="timm's name of a backbone: also show how its blocks would run.")
    ] = None,
) -> None:
    """Show versions, devices and backends, and why a backend can't run here."""
    say(machine.report())
    if model is not None:
        with failures():
            check_backbone(model)
            try:
                report = machine.forward_report(AdaptiveViT(model))
            except NotImplementedError as error:  # a family that is not supported
                raise UserError(str(error)) from error
        say(f"{model}\n{report}")
