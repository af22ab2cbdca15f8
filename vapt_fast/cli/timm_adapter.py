"""``vapt-fast timm-adapter``."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapters import CONFIG_NAME
from ..training import UserError
from ..training.timm_checkpoint import read_class_names, read_timm_checkpoint, timm_model
from . import options
from .console import count, failures, say, status
from .output import check_folder

__all__ = ["timm_adapter"]

# train.py's options for a backbone that no name of timm's gives
_OWN_WEIGHTS = ("pretrained_path", "initial_checkpoint")


def timm_adapter(
    checkpoint: Annotated[Path, typer.Argument(help="File that timm's train.py wrote, or a state dict.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    overwrite: options.Overwrite = False,
    use_ema: Annotated[
        bool, typer.Option("--use-ema", help="Take the averaged weights (of --model-ema).")
    ] = False,
    class_names: Annotated[
        Path | None,
        typer.Option(
            help="The training folder with one folder a class, or a text file with one name a line (default: "
            "numbers)."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="vapt_ and timm's name (default: as in the checkpoint).")
    ] = None,
    model_kwarg: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE, of the prompts or the backbone, as num_prompts=50; may be given several times "
            "(default: as in the checkpoint)."
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes (default: as in the checkpoint).")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images, pixels (default: as in the checkpoint).")
    ] = None,
) -> None:
    """Make an adapter folder, for predict and evaluate, of a checkpoint of timm's train.py."""
    with failures():
        check_folder(output, (CONFIG_NAME,), overwrite)
        keywords = dict(map(_parse, model_kwarg or []))
        state, args, averaged = read_timm_checkpoint(checkpoint, use_ema=use_ema)
        built, data_config = timm_model(
            state, args, model=model, num_classes=num_classes, image_size=image_size, options=keywords
        )
        names = None if class_names is None else read_class_names(class_names, built.num_classes)
        timms = args.get("pretrained") and not any(args.get(name) for name in _OWN_WEIGHTS)
        built.save_adapter(output, class_names=names, data_config=data_config, include_backbone=not timms)
    if averaged and not use_ema:
        say(
            "the checkpoint has averaged weights too, and timm's train.py chooses model_best by theirs: "
            "--use-ema takes them",
            status,
        )
    if class_names is None:
        say("no --class-names were given: the classes are called by their numbers", status)
    if not timms:
        say(
            "the frozen backbone is kept with the adapter, because the checkpoint doesn't tell that it has "
            "timm's pre-trained weights",
            status,
        )
    say(f"{built.backbone_name}, {count(built.num_classes, 'class', 'classes')}; wrote {output}")


def _parse(text: str) -> tuple[str, Any]:
    """Return a name and a value: a Python literal, else a str."""
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise UserError(f"--model-kwarg must be KEY=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
