"""``vapt-fast info``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from .. import info as machine
from ..accounting import Account, account
from ..config import PromptConfig
from ..model import AdaptiveViT
from ..training import METHODS, UserError, build_model
from ..training.methods import check_backbone, method_name
from . import options
from .console import count, failures, out, say
from .train_options import ARGUMENTS, value_of, with_flags, with_run_options

__all__ = ["info"]


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="timm's name of a backbone: also show how its blocks would run, and what it costs."
        ),
    ] = None,
    num_classes: Annotated[int, typer.Option(min=1, help="Classes of the head.")] = 100,
    batch_size: options.BatchSize = 64,
    **given: Any,
) -> None:
    """Show versions, devices and backends, and why a backend can't run here.

    With the name of a backbone: how its blocks would run, and what a method costs on it, in parameters,
    operations and memory. For that nothing is downloaded or computed.
    """
    with failures(spell=partial(with_flags, leave_out=_OTHERS)):
        adapted = None if model is None else _adapted(model, num_classes, given)
        say(machine.report())
        if adapted is None:
            return
        say(f"{model}\n{machine.forward_report(adapted)}")
        _show(METHODS[method_name(given["method"])].title, account(adapted, batch_size))


_OTHERS = [
    name
    for name, (owner, _) in ARGUMENTS.items()
    if owner is not PromptConfig and name not in ("method", "image_size")
]
info.__signature__ = with_run_options(info, _OTHERS)  # type: ignore[attr-defined]  # typer reads it


def _adapted(name: str, num_classes: int, given: dict[str, Any]) -> AdaptiveViT:
    """Return the model without numbers: its parameters are on PyTorch's meta device."""
    check_backbone(name)
    method, image_size = method_name(given["method"]), given["image_size"]
    values = {name: value_of(name, value) for name, value in given.items()}
    prompts = {
        option.name: values[name] for name, (owner, option) in ARGUMENTS.items() if owner is PromptConfig
    }
    size = {} if image_size is None else {"img_size": image_size}
    try:
        with torch.device("meta"):
            config = PromptConfig(**prompts)
            model = build_model(method, name, num_classes, prompts=config, pretrained=False, **size)
    except (TypeError, ValueError, NotImplementedError) as error:  # a family that is not supported among them
        raise UserError(str(error)) from error
    if not isinstance(model, AdaptiveViT):
        raise UserError(f"--method must leave the backbone frozen, got {method!r}: it has no prompts to show")
    return model


def _show(title: str, costs: Account) -> None:
    say("parameters")
    say(f"  backbone  {costs.backbone:,}")
    say(f"  prompts   {costs.prompts:,}, {costs.share:.2%} of the backbone's")
    say(f"  head      {costs.head:,}")
    table = Table(title=f"Multiply-adds an image, and memory of a step of {count(costs.batch_size, 'image')}")
    table.add_column("what runs", overflow="fold")
    for column in ("forward", "training step", "activations", "in all"):
        table.add_column(column, justify="right")
    rows = {
        "backbone, only the head trained": costs.bare,
        "backbone, all of it trained": costs.full,
        f"{title}, as published": costs.literal,
        f"{title}, rewritten": costs.rewritten,
    }
    for name, one in rows.items():
        table.add_row(
            name,
            f"{_engineering(one.forward)} ({one.forward / costs.bare.forward - 1:+.1%})",
            _engineering(one.training),
            f"{_engineering(one.activations * costs.batch_size)}B",
            f"{_engineering(costs.training_memory(one))}B",
        )
    out.print(table)


def _engineering(number: float) -> str:
    """Return a number with three digits and a unit of thousands: "17.6 G"."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} T" if number < 1000 else f"{number:,.0f} T"
