"""``vapt-fast demo``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .console import failures, out, status

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
    from ..training.comparison import Comparison, compare
    from ..training.files import write_atomically
    from .pictures import draw

    comparison = Comparison(seeds=tuple(range(seeds)))
    jobs = len(comparison.methods) * len(comparison.epochs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
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
    out.print(f"{time.monotonic() - started:.0f} s; wrote:")
    for path in (results, picture, output / "models"):
        out.print(f"  {path}", soft_wrap=True)


def _table(comparison: Comparison, outcomes: list[Outcome]) -> Table:
    from ..training.methods import METHODS

    table = Table(
        title="Test accuracy in %, mean ± standard deviation over "
        f"{len(comparison.seeds)} seeds, by number of training images"
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
