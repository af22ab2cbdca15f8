"""``vapt-fast sweep``."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.table import Table as RichTable
from torch.distributed import is_torchelastic_launched

from ..training import UserError
from ..training.methods import METHODS
from ..training.suites import SUITES
from ..training.sweep import Places, Row, Spread, SweepOptions, Table, sweep_table, write_table
from ..training.sweep import sweep as run_sweep
from ..training.sweep.options import SWEEP_NAME
from . import options
from .console import cell, failures, out, pick_device, progress_bars, say
from .output import check_folder
from .train_options import flag_of, is_given, run_options, with_flags, with_run_options

__all__ = ["sweep"]

# What a sweep decides by itself, or has several of.
_LEFT_OUT = (
    *("data", "method", "seed", "num_prompts", "train_share", "train_images", "train_on_validation", "test"),
    *("validation_share", "test_share"),
)
_OWN = ("method", "protocol", "seed", "train_share", "num_prompts", "threads", "processes_per_run")

Data = Annotated[
    list[str] | None,
    typer.Option(
        help="vtab, fgvc, or one of their data sets as vtab:cifar; may be given several times. Not needed "
        "for a sweep that is in --output already."
    ),
]
Method = Annotated[
    list[str] | None,
    typer.Option(help=f"What to compare, of {', '.join(METHODS)}; several times (default: vapt)."),
]
Protocol = Annotated[
    Literal["paper", "adamw"],
    typer.Option(
        help="paper: SGD, a grid of learning rates and weight decays for each data set and method, five "
        "seeds, as VPT and VAPT. adamw: one recipe for all, three seeds, as Adapter+. Options change it."
    ),
]
Seed = Annotated[
    list[int] | None,
    typer.Option(help="A seed to test with; may be given several times (default: the protocol's)."),
]
TrainShare = Annotated[
    list[float] | None,
    typer.Option(help="A share of the training images; may be given several times (default: 1)."),
]
NumPrompts = Annotated[
    list[int] | None,
    typer.Option(
        "--num-prompts",
        "--prompts",
        help="A number of prompts to try; may be given several times (default: 10).",
    ),
]
ShowTable = Annotated[
    bool, typer.Option("--table", help="Show the table of what is finished, and compute nothing.")
]
SaveModels = Annotated[bool, typer.Option("--save-models", help="Keep the models that are tested.")]
Engine = Annotated[
    Literal["joblib", "ray"], typer.Option(help="What spreads the runs: joblib on this machine, or Ray.")
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Runs at the same time (default: one a device; with Ray, all it has)."),
]
Devices = Annotated[
    list[str] | None,
    typer.Option(help="cpu, cuda, cuda:1, ...; may be given several times (default: all GPUs, or cpu)."),
]
Threads = Annotated[
    int, typer.Option(min=1, help="Threads of each process on the CPU; the last bits depend on it.")
]
ProcessesPerRun = Annotated[
    int,
    typer.Option(
        min=1,
        help="Processes that train each run together, as those of torchrun train one model: each on a GPU of "
        "its own, with its part of every batch.",
    ),
]


def sweep(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the runs and the table.")],
    data: Data = None,
    method: Method = None,
    protocol: Protocol = "paper",
    seed: Seed = None,
    train_share: TrainShare = None,
    num_prompts: NumPrompts = None,
    table: ShowTable = False,
    save_models: SaveModels = False,
    engine: Engine = "joblib",
    jobs: Jobs = None,
    device: Devices = None,
    threads: Threads = 1,
    processes_per_run: ProcessesPerRun = 1,
    workers: options.Workers = 0,
    **given: Any,
) -> None:
    """Compare methods on VTAB-1K and FGVC, by the protocol of a paper, and show the table.

    Learning rates are chosen on validation images. Options of training that are not given are the protocol's,
    or as those of train; the backbone is vit_base_patch16_224.orig_in21k. The same command goes on with what
    was stopped, and several at a time share the work, also from other machines that have the folder.
    """
    advice = f"Go on with: vapt-fast sweep --output {shlex.quote(str(output))}"
    with failures(advice, with_flags, begun=output / SWEEP_NAME):
        named = [name for name in (*_OWN, *given) if is_given(context, name)]
        if data is None:
            if named:
                raise UserError(
                    f"--data must be given with {flag_of(named[0])}, as vtab or vtab:cifar; to go on with a "
                    "sweep, give neither"
                )
            chosen = SweepOptions.read(output)
        else:
            chosen = SweepOptions(
                data=data,
                methods=method or ["vapt"],
                protocol=protocol,
                seeds=seed,
                train_shares=train_share or [1.0],
                num_prompts=num_prompts,
                run=run_options({name: given[name] for name in named if name in given}),
                threads=threads,
                processes_per_run=processes_per_run,
            )
        if not table:
            check_folder(output, (), overwrite=True)
            places = Places(_devices(device, engine), engine, jobs, workers, save_models)
            with progress_bars() as bars:
                task = bars.add_task("runs", total=None)
                run_sweep(
                    chosen, output, places, lambda done, of: bars.update(task, completed=done, total=of)
                )
        result = sweep_table(chosen, output)
        if not table:
            write_table(result, output)
        _show(result)


sweep.__signature__ = with_run_options(sweep, _LEFT_OUT, defaults=False)  # type: ignore[attr-defined]  # typer reads it


def _devices(given: list[str] | None, engine: str) -> tuple[str, ...]:
    if given:
        # Ray's machines may have what this one lacks.
        return tuple(given if engine == "ray" else map(pick_device, given))
    if is_torchelastic_launched() and torch.cuda.is_available():
        return (f"cuda:{os.environ['LOCAL_RANK']}",)
    count = torch.cuda.device_count()
    return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)


def _show(table: Table) -> None:
    """Print the means and the single data sets of each suite."""
    for suite in dict.fromkeys(key["suite"] for key, _ in table.means()):
        _show_means(table, suite)
        _show_data_sets(table, suite)
    for data, deviations in dict.fromkeys((row.data, row.deviations) for row in table.rows):
        if deviations:
            say(f"note: {data} is not the benchmark's: {'; '.join(deviations)}")


def _show_means(table: Table, suite: str) -> None:
    columns = [(key, means) for key, means in table.means() if key["suite"] == suite]
    groups = [name for name in columns[0][1] if not name.startswith("mean_of")]
    shown = ["mean_of_tasks"] if len(groups) == 1 else [*groups, "mean_of_tasks", "mean_of_groups"]
    number, known = columns[0][0]["data_sets"], len(SUITES[suite].data_sets)
    title = f"{SUITES[suite].title}, {number} of {known} data sets, protocol {table.options.protocol}: test "
    names = ("method", *(name.replace("_", " ") for name in shown), "trained", "seconds", "GPU memory")
    rich = RichTable(*names, title=f"{title}accuracy in %, mean ± standard deviation over seeds")
    for key, means in columns:
        rows = table.select(suite, key["method"], key["share"])
        rich.add_row(
            _label(key["method"], key["share"]), *(_percent(means[name]) for name in shown), *_costs(rows)
        )
    out.print(rich)
    say("trained: weights without the head; seconds: of one training; both are means over the data sets")


def _show_data_sets(table: Table, suite: str) -> None:
    keys = [(key["method"], key["share"]) for key, _ in table.means() if key["suite"] == suite]
    rich = RichTable("data set", *(_label(*key) for key in keys))
    by_column = [table.select(suite, *key) for key in keys]
    for rows in zip(*by_column, strict=True):
        rich.add_row(cell(rows[0].data), *(_accuracy(row) for row in rows))
    out.print(rich)


def _label(method: str, share: float) -> str:
    return METHODS[method].title if share == 1 else f"{METHODS[method].title}, {share:.3g} of the images"


def _percent(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{100 * spread.mean:.2f}" + ("" if spread.std is None else f" ± {100 * spread.std:.2f}")


def _accuracy(row: Row) -> str:
    if row.accuracy is None:
        return "diverged" if row.complete else "not finished"
    return _percent(row.accuracy)


def _costs(rows: Sequence[Row]) -> tuple[str, str, str]:
    trained = [
        row.num_trained - row.num_trained_in_head
        for row in rows
        if row.num_trained is not None and row.num_trained_in_head is not None
    ]
    seconds = [row.train_seconds for row in rows if row.train_seconds is not None]
    memory = [row.peak_memory for row in rows if row.peak_memory is not None]
    return (
        f"{statistics.fmean(trained):,.0f}" if trained else "-",
        f"{statistics.fmean(seconds):,.1f}" if seconds else "-",
        f"{max(memory) / 2**30:.2f} GiB" if memory else "-",
    )
