"""``vapt-fast demo``."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .console import check_backend, count, failures, out, say, status

if TYPE_CHECKING:
    from ..training.comparison import Comparison, Outcome

__all__ = ["demo"]


def demo(
    output: Annotated[Path, typer.Option(help="Folder for results, models and the picture.")] = Path(
        "demo-out"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with its own training images.")] = 3,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the work (default: one a core).")
    ] = None,
) -> None:
    """Compare VAPT with VPT-deep, a linear probe and full fine-tuning on real digits, in minutes on a CPU.

    A small backbone, pre-trained on the digits 0 to 4, learns 5 to 9 from few images. Learning rates are
    chosen on validation images; the test images only give the numbers in the table.
    """
    with failures():
        _check_packages()
        check_backend(None)

    from ..training.comparison import Comparison, compare
    from ..training.files import write_atomically
    from .pictures import draw

    comparison = Comparison(seeds=tuple(range(seeds)))
    jobs = len(comparison.methods) * len(comparison.epochs)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    started = time.monotonic()
    with failures(), Progress(*columns, console=status) as bars:
        task = bars.add_task("training", total=jobs)
        outcomes = compare(comparison, output / "models", lambda _: bars.advance(task), processes)
        results, picture = output / "results.json", output / "demo.png"
        content = {"comparison": asdict(comparison), "outcomes": [asdict(outcome) for outcome in outcomes]}
        write_atomically(results, json.dumps(content, indent=2).encode())
        largest = max(comparison.epochs)
        draw(outcomes, output / "models" / f"vapt-{largest}", picture)
    out.print(_table(comparison, outcomes))
    say(f"{time.monotonic() - started:.0f} s; wrote:")
    for path in (results, picture, output / "models"):
        say(f"  {path}")


def _check_packages() -> None:
    """Raise at once what the demo would fail for at its end, after minutes of training."""
    from ..training.errors import UserError

    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"the demo needs {' and '.join(missing)}, which {verb} not installed; install with: "
            f"pip install {' '.join(missing)}"
        )


def _table(comparison: Comparison, outcomes: list[Outcome]) -> Table:
    from ..training.methods import METHODS

    table = Table(
        title="Test accuracy in %, mean ± standard deviation over "
        f"{count(len(comparison.seeds), 'seed')}, by number of training images"
    )
    table.add_column("method")
    table.add_column("weights trained", justify="right")
    for num_train in comparison.epochs:
        table.add_column(str(num_train), justify="right")
    for method in comparison.methods:
        row = [outcome for outcome in outcomes if outcome.method == method]
        cells = [f"{100 * outcome.mean:.1f} ± {100 * outcome.spread:.1f}" for outcome in row]
        table.add_row(METHODS[method].title, f"{row[0].num_trained:,}", *cells)
    return table
