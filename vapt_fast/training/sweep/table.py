"""The table of a sweep: accuracies over seeds, both kinds of mean, parameters, time and memory.

Published tables have two means: over all tasks, and over the means of the groups. They differ by several
points, so both are here. The standard deviation of a mean is that of the means of single seeds.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ...files import write_files
from ..errors import UserError
from ..suites import find_data_set
from .options import Cell, Run, SweepOptions
from .work import chosen_run, read_result

__all__ = ["Row", "Spread", "Table", "sweep_table", "write_table"]


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and their standard deviation (n - 1), None for one seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return that of some values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """What is known of one cell: a method on a share of a data set.

    Attributes:
        data, group, method, share: which.
        chosen: learning rate, weight decay and number of prompts; None as long as they are not chosen.
        validation_accuracy: of the chosen candidate; None if there was no choice.
        accuracies: on the test images, 0 to 1, by seed; None of one that diverged.
        complete: all its runs have results. Without a choice, all candidates diverged.
        num_trained, num_trained_in_head, num_parameters: of the model.
        deviations: what differs from the benchmark's lists.
        train_seconds: mean of the tested trainings.
        search_seconds: of all candidates together.
        peak_memory: bytes on the GPU; None elsewhere.
    """

    data: str
    group: str
    method: str
    share: float
    chosen: dict[str, Any] | None
    validation_accuracy: float | None
    accuracies: dict[int, float | None]
    complete: bool
    num_trained: int | None
    num_trained_in_head: int | None
    num_parameters: int | None
    deviations: tuple[str, ...]
    train_seconds: float | None
    search_seconds: float
    peak_memory: int | None

    @property
    def accuracy(self) -> Spread | None:
        """Over the seeds; None unless all have results and none diverged."""
        known = [value for value in self.accuracies.values() if value is not None]
        return Spread.of(known) if self.complete and known and len(known) == len(self.accuracies) else None


@dataclass(frozen=True)
class Table:
    """The table of a sweep."""

    options: SweepOptions
    rows: tuple[Row, ...]

    def select(self, suite: str, method: str, share: float) -> list[Row]:
        """Return the rows of one method on one share, of a suite's data sets."""
        return [
            row
            for row in self.rows
            if (row.method, row.share) == (method, share) and find_data_set(row.data)[0].name == suite
        ]

    def means(self) -> list[tuple[dict[str, Any], dict[str, Spread | None]]]:
        """Return the means over each suite: suite, method and share, and the means by their names.

        They are ``mean_of_tasks``, one by the name of each group, and ``mean_of_groups``; None where the
        result of a task is missing. They are over those of the suite's data sets that the sweep has.
        """
        options = self.options
        suites = dict.fromkeys(find_data_set(data)[0].name for data in options.data)
        return [
            (
                {"suite": suite, "method": method, "share": share, "data_sets": len(rows)},
                _means(rows),
            )
            for suite, method, share in product(suites, options.methods, options.train_shares)
            for rows in [self.select(suite, method, share)]
        ]


def sweep_table(options: SweepOptions, folder: Path) -> Table:
    """Return the table of the sweep in ``folder``, as far as there are results.

    Raises:
        UserError: a damaged result, or results of different lists of images for one data set.
    """
    lists: dict[str, Any] = {}
    return Table(options, tuple(_row(cell, folder, lists) for cell in options.cells()))


def write_table(table: Table, folder: Path) -> None:
    """Write ``table.json`` and ``table.csv``, which depend on results alone, and ``costs.json``.

    Raises:
        OSError: the disk is full, or the like.
    """
    cells = [_cell(row) for row in table.rows]
    means = [{**key, **{name: _both(spread) for name, spread in of.items()}} for key, of in table.means()]
    costs = [
        {name: getattr(row, name) for name in ("data", "method", "share", *_COSTS)} for row in table.rows
    ]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for cell in cells:
        flat = {**cell, **(cell["accuracy"] or {}), **(cell["chosen"] or {})}
        writer.writerow([flat.get(name) for name in _COLUMNS])
    contents = {"table.json": {"options": asdict(table.options), "cells": cells, "means": means}}
    contents["costs.json"] = {"cells": costs}
    files = {name: json.dumps(content, indent=1).encode() for name, content in contents.items()}
    write_files(folder, {**files, "table.csv": lines.getvalue().encode()})


_COSTS = ("train_seconds", "search_seconds", "peak_memory")
_COLUMNS = (
    *("data", "group", "method", "share", "mean", "std", "validation_accuracy"),
    *("base_lr", "weight_decay", "num_prompts", "num_trained", "num_trained_in_head"),
)


def _cell(row: Row) -> dict[str, Any]:
    """Return what table.json says of a cell: nothing that differs from one machine to another."""
    known = {name: value for name, value in asdict(row).items() if name not in _COSTS}
    return {**known, "accuracy": _both(row.accuracy)}


def _both(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else asdict(spread)


def _row(cell: Cell, folder: Path, lists: dict[str, Any]) -> Row:
    """Return the row of a cell; ``lists`` has those of each data set that were seen before."""
    candidates = cell.candidates()
    searched = [read_result(run, folder) for run in candidates] if len(candidates) > 1 else []
    chosen = chosen_run(cell, folder)
    last = [] if chosen is None else cell.last(chosen)
    results = [read_result(run, folder) for run in last]
    ran = [result for result in [*searched, *results] if result is not None and not result.get("diverged")]
    for result in ran:
        if lists.setdefault(cell.data, result["data"]) != result["data"]:
            raise UserError(
                f"results for {cell.data} are of different lists of images: {lists[cell.data]} and "
                f"{result['data']}; remove {folder / cell.name} of those that are wrong, and go on"
            )
    tested = [result for result in results if result is not None and not result.get("diverged")]
    model = tested[0] if tested else {}
    validation = None
    if chosen is not None and searched:
        validation = searched[candidates.index(chosen)]
    return Row(
        data=cell.data,
        group=find_data_set(cell.data)[2].group,
        method=cell.method,
        share=cell.share,
        chosen=None if chosen is None else _choice(chosen),
        validation_accuracy=None if validation is None else validation["validation_accuracy"],
        accuracies={
            run.options.recipe["seed"]: None if result is None else result.get("test_accuracy")
            for run, result in zip(last, results, strict=True)
        },
        complete=None not in searched and None not in results,
        deviations=tuple(lists.get(cell.data, {}).get("deviations", ())),
        **{name: model.get(name) for name in ("num_trained", "num_trained_in_head", "num_parameters")},
        train_seconds=statistics.fmean(result["train_seconds"] for result in tested) if tested else None,
        search_seconds=sum(result["train_seconds"] for result in ran if result["test_accuracy"] is None),
        peak_memory=max((result["peak_memory"] for result in tested if result["peak_memory"]), default=None),
    )


def _choice(run: Run) -> dict[str, Any]:
    recipe = run.options.recipes()[0]
    return {
        "base_lr": recipe.base_lr,
        "weight_decay": recipe.weight_decay,
        "num_prompts": run.options.prompts.get("num_prompts"),
    }


def _means(rows: Sequence[Row]) -> dict[str, Spread | None]:
    """Return the means over tasks, over each group's tasks, and over groups, each over seeds."""
    groups = dict.fromkeys(row.group for row in rows)
    members = {group: [row for row in rows if row.group == group] for group in groups}
    by_group = {group: _by_seed(of) for group, of in members.items()}
    found = {"mean_of_tasks": _by_seed(rows), **by_group, "mean_of_groups": None}
    if None not in by_group.values():
        each = [values for values in by_group.values() if values is not None]
        found["mean_of_groups"] = [statistics.fmean(values) for values in zip(*each, strict=True)]
    return {name: None if values is None else Spread.of(values) for name, values in found.items()}


def _by_seed(rows: Sequence[Row]) -> list[float] | None:
    """Return the mean of the rows for each seed; None if one of them has no accuracy."""
    if any(row.accuracy is None for row in rows):
        return None
    by_row = [[value for value in row.accuracies.values() if value is not None] for row in rows]
    return [statistics.fmean(values) for values in zip(*by_row, strict=True)]
