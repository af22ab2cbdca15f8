"""Pictures of results.json: images/s of whole models, and how far each op is from its floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # not pyplot, which would choose a window system

from vapt_fast.benchmark import MODES, Row


def models(results: dict[str, Any]) -> Figure | None:
    """Draw images/s of every variant, without and with a CUDA graph; a row of pictures for each table."""
    comparisons = [c for c in results["comparisons"] if any(row["seconds"] for row in c["rows"])]
    if not comparisons:
        return None
    figure = Figure(figsize=(16, 4 * len(comparisons)), layout="constrained", dpi=80)
    axes = figure.subplots(len(comparisons), len(MODES), squeeze=False)
    for comparison, line in zip(comparisons, axes, strict=True):
        batch, rows = comparison["setting"]["batch"], [Row.from_dict(row) for row in comparison["rows"]]
        num_prompts = max(row.variant.num_prompts for row in rows)
        for mode, axis in zip(MODES, line, strict=True):
            names = list(dict.fromkeys(str(row.variant) for row in rows))
            for graph, height in ((False, 0.4), (True, -0.4)):
                chosen = [row for row in rows if row.mode == mode and row.graph == graph]
                speeds = [batch / row.spread.median if row.seconds else 0 for row in chosen]
                label = "as a CUDA graph" if graph else "without a CUDA graph"
                axis.barh(range(len(chosen)), speeds, height=height, align="edge", label=label)
            axis.set_yticks(range(len(names)), names, fontsize=7)
            axis.invert_yaxis()
            axis.set_title(f"{mode}, P = {num_prompts}, batch {batch}")
            axis.set_xlabel("images/s")
    axes[0, 0].legend(fontsize=7)
    return figure


def ops(results: dict[str, Any]) -> Figure | None:
    """Draw microseconds of every benchmark of an op, with the floor where it is known."""
    measured = [op for op in results.get("ops", []) if op.get("seconds")]
    if not measured:
        return None
    groups = list(dict.fromkeys(op["group"] for op in measured))
    columns = 4
    figure = Figure(figsize=(18, 2.2 * -(-len(groups) // columns)), layout="constrained", dpi=80)
    axes = figure.subplots(-(-len(groups) // columns), columns, squeeze=False).flat
    for group, axis in zip(groups, axes, strict=False):
        own = [op for op in measured if op["group"] == group]
        axis.barh(range(len(own)), [1e6 * op["seconds"] for op in own])
        axis.set_yticks(range(len(own)), [op["rival"] for op in own], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(group, fontsize=8)
        if own[0].get("floor_seconds"):
            axis.axvline(1e6 * own[0]["floor_seconds"], color="black", linestyle="dashed")
    for axis in list(figure.axes)[len(groups) :]:
        axis.set_visible(False)
    figure.supxlabel("microseconds; dashed: the floor")
    return figure


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write models.png and ops.png, as far as there is something to show."""
    for name, picture in (("models", models), ("ops", ops)):
        figure = picture(results)
        if figure is not None:
            figure.savefig(folder / f"{name}.png")
