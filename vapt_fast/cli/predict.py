"""``vapt-fast predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .console import cell, check_backend, failures, out, say, status

if TYPE_CHECKING:
    from torch import nn

__all__ = ["predict"]


def predict(
    adapter: Annotated[
        Path, typer.Argument(help="Folder that vapt-fast train or model.save_adapter() wrote.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name for each image.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if there is one.")] = "auto",
    backbone: Annotated[
        str | None,
        typer.Option(
            help="timm's name of the backbone, as local-dir:/folder (default: what the adapter says)."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="File with the backbone's weights, if the adapter's folder has none.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, reference, torch, triton or cuda; see vapt-fast info.")
    ] = None,
) -> None:
    """Name the class of images with a trained model.

    Files that are no images are reported and left out; the exit code is then 2.
    """
    from ..training import load_model
    from .train import pick_device

    with failures():
        check_backend(backend)
        device = pick_device(device)
        model, metadata = load_model(adapter, backend, backbone=backbone, weights=weights)
        paths = _image_files(images)
        predictions, errors = _predict(model.to(device), metadata, paths, top, batch_size, device)
    if as_json:
        print(json.dumps(predictions, indent=2))
    else:
        _print_table(predictions)
    for error in errors:
        say(f"error: {error}", status, "red")
    if errors:
        raise typer.Exit(2)


def _image_files(given: list[Path]) -> list[Path]:
    """The files themselves, and the images in the folders, sorted."""
    from ..training import UserError
    from ..training.images import IMAGE_EXTENSIONS

    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_EXTENSIONS)
        if not inside:
            raise UserError(f"{path} has no images; expected files that end in one of {IMAGE_EXTENSIONS}")
        paths += inside
    return paths


def _predict(
    model: nn.Module, metadata: dict[str, Any], paths: list[Path], top: int, batch_size: int, device: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """The ``top`` classes of each image with their probabilities, and what is wrong with the other files."""
    import torch

    from ..training import UserError, eval_transform, open_image

    class_names = metadata["class_names"]
    transform = eval_transform(metadata["data_config"])
    predictions, errors = [], []
    for start in range(0, len(paths), batch_size):
        names, tensors = [], []
        for path in paths[start : start + batch_size]:
            try:
                tensors.append(transform(open_image(path)))
            except UserError as error:
                errors.append(str(error))
            else:
                names.append(str(path))
        if not tensors:
            continue
        with torch.inference_mode():
            probabilities = model(torch.stack(tensors).to(device)).float().softmax(1)
        best = probabilities.topk(min(top, len(class_names)), dim=1)
        for name, values, indices in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
            classes = [
                {"class": class_names[index], "probability": value}
                for index, value in zip(indices, values, strict=True)
            ]
            predictions.append({"file": name, **classes[0], "top": classes})
    return predictions, errors


def _print_table(predictions: list[dict[str, Any]]) -> None:
    table = Table()
    table.add_column("file", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability")
    for prediction in predictions:
        table.add_row(
            cell(prediction["file"]),
            Text("\n").join(cell(entry["class"]) for entry in prediction["top"]),
            "\n".join(f"{entry['probability']:.1%}" for entry in prediction["top"]),
        )
    if predictions:
        out.print(table)
