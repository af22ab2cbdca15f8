"""What ``vapt-fast predict`` and ``evaluate`` do with a model for segmentation."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from ..files import write_atomically
from ..tasks.segmentation import MaskedImages, PixelEvaluation, Preparation, Segmenter
from ..tasks.segmentation.data import split_data
from ..tasks.segmentation.pictures import mask_picture, overlay, palette, predict_labels
from ..training import UserError, open_image
from .console import cell, out, say

__all__ = ["mask_data", "picture_names", "predict_masks", "show_masks", "show_pixels"]

_FOLDERS = ("masks", "overlays")
_SMALLEST_SHARE = 0.01  # of the pixels, for a class to be in the table


def picture_names(paths: list[Path]) -> list[str]:
    """Return the names of the files that ``predict_masks`` writes for images.

    Raises:
        UserError: two images have one name.
    """
    twice = [name for name, number in Counter(path.stem for path in paths).items() if number > 1]
    if twice:
        raise UserError(f"several images are called {twice[0]!r}: predict them into different folders")
    return [_picture_name(folder, path) for path in paths for folder in _FOLDERS]


def _picture_name(folder: str, image: Path) -> str:
    return f"{folder}/{image.stem}.png"


def predict_masks(
    model: Segmenter, metadata: dict[str, Any], paths: list[Path], output: Path, batch_size: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write ``masks/NAME.png`` and ``overlays/NAME.png`` for each image.

    Masks have the numbers that the training masks have.

    Returns:
        For each image its file, those written, and the share of its pixels that each class has; and the
        errors of files that are no images.
    """
    prepare = Preparation(metadata["data_config"])
    names = metadata["class_names"]
    offset = int(bool(metadata.get("reduce_zero_label")))
    colours = palette(len(names) + offset)
    predictions, errors = [], []
    for path in paths:
        try:
            image = open_image(path)
        except UserError as error:
            errors.append(str(error))
            continue
        labels = predict_labels(model, image, prepare, batch_size=batch_size)
        shares = (torch.bincount(labels.flatten(), minlength=len(names)) / labels.numel()).tolist()
        pictures = (mask_picture(labels + offset, colours), overlay(image, labels + offset, colours))
        files = {folder: output / _picture_name(folder, path) for folder in _FOLDERS}
        for file, picture in zip(files.values(), pictures, strict=True):
            write_atomically(file, _png(picture))
        predictions.append(
            {
                "file": str(path),
                **{folder[:-1]: str(file) for folder, file in files.items()},
                "shares": {name: share for name, share in zip(names, shares, strict=True) if share},
            }
        )
    return predictions, errors


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="png")
    return content.getvalue()


def show_masks(predictions: list[dict[str, Any]]) -> None:
    """Print a table of what ``predict_masks`` returns."""
    table = Table("file", "mask", "classes")
    for column in table.columns:
        column.overflow = "fold"
    for prediction in predictions:
        shares = sorted(prediction["shares"].items(), key=lambda entry: -entry[1])
        largest = [f"{name} {share:.0%}" for name, share in shares if share >= _SMALLEST_SHARE]
        table.add_row(cell(prediction["file"]), cell(prediction["mask"]), cell(", ".join(largest)))
    if predictions:
        out.print(table)


def mask_data(data: str, metadata: dict[str, Any], split: str | None) -> MaskedImages:
    """Open one split of a folder of images and masks to evaluate a model on."""
    reduce = bool(metadata.get("reduce_zero_label"))
    return split_data(data, metadata["data_config"], len(metadata["class_names"]), split, reduce)


def show_pixels(result: PixelEvaluation) -> None:
    """Print the mean IoU, and a table of each class's."""
    say(f"mean IoU: {result.mean_iou:.1%}")
    say(f"accuracy: {result.accuracy:.1%} of {result.num_images:,} pixels")
    table = Table("class", "pixels", "accuracy", "IoU")
    table.columns[0].overflow = "fold"
    for (name, pixels, accuracy), iou in zip(result.by_class, result.ious, strict=True):
        shown = ("" if share is None else f"{share:.1%}" for share in (accuracy, iou))
        table.add_row(cell(name), f"{pixels:,}", *shown)
    out.print(table)
