"""``vapt-fast evaluate``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..files import write_atomically
from ..tasks.segmentation import PixelEvaluation, Segmenter, evaluate_pixels
from ..training import RunOptions, UserError, load_model
from ..training.evaluation import Evaluation, evaluate_by_class
from ..training.loader import LabelledImages
from ..training.options import OPTIONS_NAME
from ..training.run import check_backend
from ..training.splits import evaluation_data
from . import options
from .console import cell, count, failures, out, pick_device, progress_bars, say, status
from .output import check_file
from .segment import mask_data, show_pixels

__all__ = ["evaluate"]

_LARGEST_MATRIX = 20  # classes whose confusion matrix is shown as a whole
_CONFUSIONS = 20  # how many are shown of more classes


def evaluate(
    adapter: options.Adapter,
    data: Annotated[
        str,
        typer.Option(
            help="A folder with train/, val/ and test/, or with one folder of images a class, all of which "
            "are taken; or 'digits'. Classes are matched by name."
        ),
    ],
    split: Annotated[
        Literal["train", "val", "test"] | None,
        typer.Option(help="The split, of a folder that is split already (default: test)."),
    ] = None,
    device: options.Device = "auto",
    backbone: options.AdapterBackbone = None,
    weights: options.AdapterWeights = None,
    backend: options.Backend = None,
    backbone_precision: options.BackbonePrecision = None,
    batch_size: options.BatchSize = 64,
    workers: options.Workers = 0,
    as_json: options.AsJson = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for all results (.json), or for the confusion matrix and the classes (.csv)."
        ),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Test a trained model on labelled images: accuracy, also by class, and which classes are confused.

    A model for segmentation needs images/ and masks/ in test/ (or val/), and gives its mean IoU.

    A folder with one folder a class is taken as a whole. If vapt-fast train has split the same folder, most
    of its images were trained on, and the numbers say nothing about new ones.
    """
    with failures():
        check_backend(backend, "--backend")
        if output is not None:
            check_file(output, (".json", ".csv"), overwrite)
        device = pick_device(device)
        model, metadata = load_model(
            adapter, backend, backbone=backbone, weights=weights, backbone_precision=backbone_precision
        )
        chosen = "validation" if split == "val" else split
        dataset: LabelledImages
        counts: Callable[..., Evaluation] = evaluate_by_class
        if isinstance(model, Segmenter):
            counts, dataset = evaluate_pixels, mask_data(data, metadata, chosen)
        else:
            dataset = evaluation_data(data, metadata["data_config"], metadata["class_names"], chosen)
        if split is None and _was_trained_on(adapter, data):
            say(f"note: {data} was split for the training of this model, which saw most of it", status)
        with progress_bars(transient=True, disable=not status.is_terminal) as bars:
            task = bars.add_task("images", total=len(dataset))
            result = counts(
                model.to(device),
                dataset,
                metadata["class_names"],
                batch_size=batch_size,
                device=device,
                workers=workers,
                progress=lambda done, _: bars.update(task, completed=done),
            )
        content = {"adapter": str(adapter), "data": data, "split": split, **result.as_dict()}
        as_json_text = json.dumps(content, indent=2)
        if output is not None:
            text = _csv(result) if output.suffix.lower() == ".csv" else f"{as_json_text}\n"
            write_atomically(output, text.encode(errors="backslashreplace"))
    _note_absent(result)
    if as_json:
        print(as_json_text)
    elif isinstance(result, PixelEvaluation):
        show_pixels(result)
    else:
        _show(result)
    if output is not None:
        say(f"wrote {output}", status if as_json else out)


def _was_trained_on(adapter: Path, data: str) -> bool:
    """Whether ``adapter`` is of a run that split ``data`` itself."""
    if data == "digits" or (Path(data) / "train").is_dir() or not (adapter / OPTIONS_NAME).exists():
        return False
    try:
        return RunOptions.read(adapter).data == str(Path(data).resolve())
    except UserError:  # of another version: nobody knows
        return False


def _note_absent(result: Evaluation) -> None:
    absent = [name for name, images, _ in result.by_class if not images]
    if absent:
        say(
            f"without {result.unit} here: {count(len(absent), 'class', 'classes')}: {', '.join(absent)}",
            status,
        )


def _show(result: Evaluation) -> None:
    say(f"accuracy: {result.accuracy:.1%} of {count(result.num_images, 'image')}")
    say(f"mean accuracy of the classes: {result.mean_class_accuracy:.1%}")
    table = Table("class", "images", "accuracy")
    table.columns[0].overflow = "fold"
    for name, images, accuracy in result.by_class:
        table.add_row(cell(name), f"{images:,}", "" if accuracy is None else f"{accuracy:.1%}")
    out.print(table)
    _print_whole(_matrix(result) if len(result.class_names) <= _LARGEST_MATRIX else _confusions(result))


def _matrix(result: Evaluation) -> Table:
    rows = [[f"{number:,}" if number else "" for number in row] for row in result.confusion.tolist()]
    table = Table()
    table.add_column("class \\ taken for", overflow="fold", max_width=24)
    for name, column in zip(result.class_names, zip(*rows, strict=True), strict=True):
        table.add_column(cell(name), justify="right", overflow="fold", max_width=max(10, *map(len, column)))
    for name, row in zip(result.class_names, rows, strict=True):
        table.add_row(cell(name), *row)
    return table


def _confusions(result: Evaluation) -> Table:
    table = Table("class", "taken for", "images")
    for true, said, images in result.largest_confusions(_CONFUSIONS):
        table.add_row(cell(true), cell(said), f"{images:,}")
    return table


def _print_whole(table: Table) -> None:
    """Print a table with no number broken, if need be wider than the terminal."""
    needed = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    Console(file=out.file, width=max(out.width, needed)).print(table)


def _csv(result: Evaluation) -> str:
    """Return a line for each class: its images, its accuracy, and how many were taken for each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", result.unit, "accuracy", *result.class_names])
    for (name, images, accuracy), said in zip(result.by_class, result.confusion.tolist(), strict=True):
        writer.writerow([name, images, "" if accuracy is None else accuracy, *said])
    return text.getvalue()
