"""``vapt-fast export``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..export import DESCRIPTION_NAME, OWN_FILES, ExportError, check_formats, export_model
from ..training import UserError, load_model
from . import options
from .console import failures, pick_device, say
from .output import check_folder

__all__ = ["export"]


class _Format(str, Enum):  # typer takes no list of literals
    pt2 = "pt2"
    aoti = "aoti"
    onnx = "onnx"


def export(
    adapter: options.Adapter,
    output: Annotated[Path, typer.Option(help="Folder for the files.")],
    formats: Annotated[
        list[_Format] | None,
        typer.Option(
            "--format",
            help="pt2: for torch.export.load; aoti: compiled for this machine's processor; onnx. May be "
            "given several times (default: pt2).",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images in every call (default: any number).")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where pt2 and aoti will run: cpu, cuda, cuda:1, ...; onnx needs cpu here.")
    ] = "cpu",
    backbone: options.AdapterBackbone = None,
    weights: options.AdapterWeights = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a trained model as files that run without this library, and check that they compute the same.

    They take prepared images and give logits. export.json tells how images are prepared, and the classes.
    """
    with failures():
        chosen = check_formats([form.value for form in formats or [_Format.pt2]])
        check_folder(output, OWN_FILES, overwrite)
        device = pick_device(device)
        model, metadata = load_model(adapter, backbone=backbone, weights=weights)
        known = {name: metadata[name] for name in ("class_names", "data_config")}
        try:
            written = export_model(
                model.to(device),
                output,
                formats=chosen,
                batch_size=batch_size,
                overwrite=overwrite,
                **known,
            )
        except ExportError as error:
            raise UserError(str(error)) from error
    for entry in written["files"].values():
        say(
            f"{entry['file']}: its logits differ from the model's by at most "
            f"{entry['largest_difference']:.1e} on random images"
        )
    say(f"wrote {output}, with {DESCRIPTION_NAME}")
