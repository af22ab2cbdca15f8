"""``vapt-fast demo``."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..demo.experiment import Experiment, Outcome, run_experiment
from ..demo.picture import draw
from ..files import write_atomically
from ..training import METHODS, UserError
from ..training.run import check_backend
from . import options
from .console import count, failures, out, progress_bars, say
from .output import check_folder

__all__ = ["demo"]


def demo(
    output: Annotated[Path, typer.Option(help="Folder for results, models and the picture.")] = Path(
        "demo-out"
    ),
    overwrite: options.Overwrite = False,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with its own training images.")] = 3,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the work (default: one a core).")
    ] = None,
) -> None:
    """Compare VAPT with VPT-deep, a linear probe and full fine-tuning on real digits, in minutes on a CPU.

    A small backbone, pre-trained on the digits 0 to 4, learns 5 to 9 from few images. Learning rates are
    chosen on validation images; the test images only give the accuracies in the table.
    """
    started = time.monotonic()
    experiment = Experiment(seeds=tuple(range(seeds)))
    results, models, picture = (output / name for name in ("results.json", "models", "demo.png"))
    with failures():
        _check_packages()
        check_backend(None)
        check_folder(output, (results.name, picture.name), overwrite)
        with progress_bars() as bars:
            task = bars.add_task("training", total=len(experiment.methods) * len(experiment.epochs))
            outcomes = run_experiment(experiment, models, lambda _: bars.advance(task), processes)
        content = {"experiment": asdict(experiment), "outcomes": [asdict(outcome) for outcome in outcomes]}
        write_atomically(results, json.dumps(content, indent=2).encode())
        draw(outcomes, models / f"vapt-{max(experiment.epochs)}", picture)
    out.print(_table(experiment, outcomes))
    say(f"{time.monotonic() - started:.0f} s; wrote:")
    for path in (results, picture, models):
        say(f"  {path}")


def _check_packages() -> None:
    """Raise at once what the demo would fail for at its end, after minutes of training."""
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"the demo needs {' and '.join(missing)}, which {verb} not installed; install with: "
            "pip install 'vapt_fast[demo]'"
        )


def _table(experiment: Experiment, outcomes: list[Outcome]) -> Table:
    table = Table(
        title="Test accuracy in %, mean ± standard deviation over "
        f"{count(len(experiment.seeds), 'seed')}, by number of training images"
    )
    table.add_column("method")
    table.add_column("weights trained", justify="right")
    for num_train in experiment.epochs:
        table.add_column(str(num_train), justify="right")
    for method in experiment.methods:
        row = [outcome for outcome in outcomes if outcome.method == method]
        cells = [f"{100 * outcome.mean:.1f} ± {100 * outcome.spread:.1f}" for outcome in row]
        table.add_row(METHODS[method].title, f"{row[0].num_trained:,}", *cells)
    return table
