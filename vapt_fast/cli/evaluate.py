"""``vapt-fast evaluate``."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .console import cell, check_backend, count, failures, out, say, status

if TYPE_CHECKING:
    from ..training.evaluation import Evaluation

__all__ = ["evaluate"]

_LARGEST_MATRIX = 20  # classes whose confusion matrix is shown as a whole
_CONFUSIONS = 20  # how many are shown of more classes
_SUFFIXES = (".json", ".csv")


def evaluate(
    adapter: Annotated[
        Path, typer.Argument(help="Folder that vapt-fast train or model.save_adapter() wrote.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A folder with train/, val/ and test/, or with one folder of images a class, all of which "
            "are taken; or 'digits'. Classes are matched by name."
        ),
    ],
    split: Annotated[
        Literal["train", "val", "test"] | None,
        typer.Option(help="Of a folder that is split already (default: test)."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if there is one.")] = "auto",
    backbone: Annotated[
        str | None,
        typer.Option(help="timm's name of the backbone, as local-dir:/folder (default: the adapter's)."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="File with the backbone's weights, if the adapter's folder has none.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, reference, torch, triton or cuda; see vapt-fast info.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for all results (.json), or for the confusion matrix and the classes (.csv)."
        ),
    ] = None,
) -> None:
    """Test a trained model on labelled images: accuracy, by class too, and what is taken for what.

    A folder with one folder a class is taken as a whole. If vapt-fast train has split the same folder, most
    of its images were trained on, and the numbers say nothing about new ones.
    """
    from ..training import UserError, load_model
    from ..training.evaluation import evaluate_by_class
    from ..training.files import write_atomically
    from ..training.splits import evaluation_data
    from .train import pick_device

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(
        TextColumn("images"), *columns, console=status, transient=True, disable=not status.is_terminal
    )
    with failures():
        check_backend(backend)
        if output is not None and output.suffix.lower() not in _SUFFIXES:
            raise UserError(f"--output must end in one of {_SUFFIXES}, got {output}")
        device = pick_device(device)
        model, metadata = load_model(adapter, backend, backbone=backbone, weights=weights)
        chosen = "validation" if split == "val" else split
        dataset = evaluation_data(data, metadata["data_config"], metadata["class_names"], chosen)
        if split is None and _was_trained_on(adapter, data):
            say(f"note: {data} was split for the training of this model, which saw most of it", status)
        with bars:
            task = bars.add_task("", total=len(dataset))
            result = evaluate_by_class(
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
    absent = [
        name for name, images in zip(result.class_names, result.class_counts, strict=True) if not images
    ]
    if absent:
        say(f"without images here: {count(len(absent), 'class', 'classes')}: {', '.join(absent)}", status)
    if as_json:
        print(as_json_text)
    else:
        _show(result)
    if output is not None:
        say(f"wrote {output}", status if as_json else out)


def _was_trained_on(adapter: Path, data: str) -> bool:
    """Whether ``adapter`` is of a run that split ``data`` itself."""
    from ..training.errors import UserError
    from ..training.run import OPTIONS_NAME, RunOptions

    if data == "digits" or (Path(data) / "train").is_dir() or not (adapter / OPTIONS_NAME).exists():
        return False
    try:
        return RunOptions.read(adapter).data == str(Path(data).resolve())
    except UserError:  # of another version: nobody knows
        return False


def _show(result: Evaluation) -> None:
    say(f"accuracy: {result.accuracy:.1%} of {count(result.num_images, 'image')}")
    say(f"mean accuracy of the classes: {result.mean_class_accuracy:.1%}")
    table = Table("class", "images", "accuracy")
    table.columns[0].overflow = "fold"
    for name, images, accuracy in zip(
        result.class_names, result.class_counts, result.class_accuracy, strict=True
    ):
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
    """A line for each class: its images, its accuracy, and for how many each class was said."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "images", "accuracy", *result.class_names])
    rows: Any = zip(
        result.class_names,
        result.class_counts,
        result.class_accuracy,
        result.confusion.tolist(),
        strict=True,
    )
    for name, images, accuracy, said in rows:
        writer.writerow([name, images, "" if accuracy is None else accuracy, *said])
    return text.getvalue()
