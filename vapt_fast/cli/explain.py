"""``vapt-fast explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..explain import explain_picture
from ..files import write_atomically
from ..model import AdaptiveViT
from ..tasks.segmentation import Segmenter
from ..training import UserError, load_model, open_image
from ..training.run import check_backend
from . import options
from .console import failures, pick_device, say
from .output import check_file

__all__ = ["explain"]


def explain(
    adapter: options.Adapter,
    image: Annotated[Path, typer.Argument(help="Image file.")],
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("explanation.png"),
    target: Annotated[
        str | None, typer.Option(help="Name of the class to explain (default: the one that is predicted).")
    ] = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    backbone: options.AdapterBackbone = None,
    weights: options.AdapterWeights = None,
    backend: options.Backend = None,
) -> None:
    """Draw what a trained model looks at in an image, and what its prompts have to do with it."""
    with failures():
        check_backend(backend, "--backend")
        check_file(output, (".png",), overwrite)
        picture = open_image(image)
        device = pick_device(device)
        model, metadata = load_model(adapter, backend, backbone=backbone, weights=weights)
        if not isinstance(model, AdaptiveViT):
            raise UserError(
                f"{adapter} holds a model without prompts, trained by full fine-tuning; expected an adapter"
            )
        if isinstance(model, Segmenter):
            raise UserError(f"{adapter} is for segmentation, and explain is about the class of an image")
        names = metadata["class_names"]
        if target is not None and target not in names:
            raise UserError(f"--target must be one of the classes {', '.join(names)}, got {target!r}")
        explained = explain_picture(
            model.to(device),
            picture,
            None if target is None else names.index(target),
            class_names=names,
        )
        write_atomically(output, explained)
    say(f"wrote {output}")
