"""``vapt-fast predict``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..tasks.segmentation import Segmenter
from ..training import UserError, eval_transform, load_model, open_image
from ..training.images import IMAGE_EXTENSIONS, images_in
from ..training.run import check_backend
from . import options
from .console import failures, finish, pick_device, print_best
from .output import check_folder
from .segment import picture_names, predict_masks, show_masks

__all__ = ["image_files", "predict", "readable_batches"]


def predict(
    adapter: options.Adapter,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    as_json: options.AsJson = False,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name for each image.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Folder for masks and overlays, of a model for segmentation.")
    ] = None,
    overwrite: options.Overwrite = False,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    backbone: options.AdapterBackbone = None,
    weights: options.AdapterWeights = None,
    backend: options.Backend = None,
    backbone_precision: options.BackbonePrecision = None,
) -> None:
    """Name the class of images with a trained model, or of each pixel with a model for segmentation.

    Files that are no images are reported and left out; the exit code is then 2.
    """
    with failures():
        check_backend(backend, "--backend")
        paths = image_files(images)
        if output is not None:
            check_folder(output, picture_names(paths), overwrite)
        device = pick_device(device)
        model, metadata = load_model(
            adapter, backend, backbone=backbone, weights=weights, backbone_precision=backbone_precision
        )
        show = _print_table
        if isinstance(model, Segmenter):
            if output is None:
                raise UserError("--output is missing: the model is for segmentation and writes pictures")
            predictions, errors = predict_masks(model.to(device), metadata, paths, output, batch_size)
            show = show_masks
        elif output is not None:
            raise UserError("--output is for models for segmentation, and this one names the class of images")
        else:
            predictions, errors = _predict(model.to(device), metadata, paths, top, batch_size, device)
    finish(predictions, as_json, show, errors)


def image_files(given: list[Path]) -> list[Path]:
    """Return the files themselves, and the images in the folders, sorted."""
    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        inside = images_in(path)
        if not inside:
            raise UserError(f"{path} has no images; expected files that end in one of {IMAGE_EXTENSIONS}")
        paths += inside
    return paths


def readable_batches(
    paths: list[Path], data_config: dict[str, Any], batch_size: int, errors: list[str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield names and images (B, C, H, W) of files; of those that are no images, add the errors."""
    transform = eval_transform(data_config)
    for start in range(0, len(paths), batch_size):
        names, tensors = [], []
        for path in paths[start : start + batch_size]:
            try:
                tensors.append(transform(open_image(path)))
            except UserError as error:
                errors.append(str(error))
            else:
                names.append(str(path))
        if tensors:
            yield names, torch.stack(tensors)


def _predict(
    model: nn.Module, metadata: dict[str, Any], paths: list[Path], top: int, batch_size: int, device: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the ``top`` classes of each image with their probabilities, and the errors of other files."""
    class_names = metadata["class_names"]
    predictions: list[dict[str, Any]] = []
    errors: list[str] = []
    for names, images in readable_batches(paths, metadata["data_config"], batch_size, errors):
        with torch.inference_mode():
            probabilities = model(images.to(device)).float().softmax(1)
        if unknown := int(probabilities.isnan().any(1).sum()):
            raise UserError(f"the model gives NaN for {unknown} of {len(names)} images, which names no class")
        best = probabilities.topk(min(top, len(class_names)), dim=1)
        for name, values, indices in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
            classes = [
                {"class": class_names[index], "probability": value}
                for index, value in zip(indices, values, strict=True)
            ]
            predictions.append({"file": name, **classes[0], "top": classes})
    return predictions, errors


def _print_table(predictions: list[dict[str, Any]]) -> None:
    rows = (
        (one["file"], [(entry["class"], f"{entry['probability']:.1%}") for entry in one["top"]])
        for one in predictions
    )
    print_best("class", "probability", rows)
