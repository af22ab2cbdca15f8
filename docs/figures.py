"""Draw the pictures of the documentation: ``python docs/figures.py`` writes docs/figures/*.svg."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from vapt_fast.functional import prompt_matrices

DOCS = Path(__file__).parent
COLORS = ("#4c72b0", "#dd8452", "#8fae8b")
plt.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "vapt_fast",
    "font.size": 10,
}  # the same file each time


def method() -> plt.Figure:
    """What VAPT does before, in and after each frozen block."""
    cls, prompt, patch = COLORS
    figure, axis = plt.subplots(figsize=(8, 3.4))

    def tokens(x: float, y: float, colors: list[str], **style: Any) -> None:
        for place, color in enumerate(colors):
            axis.add_patch(Rectangle((x, y - 0.5 * place), 0.4, 0.4, facecolor=color, **style))

    def box(x: float, y: float, width: float, height: float, text: str, color: str) -> None:
        axis.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=color, linewidth=2))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#555555"})

    tokens(0, 2.6, [cls, *[patch] * 6])
    box(
        1.6,
        2.5,
        4.6,
        2,
        "norm, convolution over the grid,\npositions mixed into prompts,\nbottleneck over the channels",
        prompt,
    )
    tokens(7, 3.8, [prompt] * 3)
    box(8.3, -0.6, 2, 3.8, "block,\nfrozen", "#888888")
    tokens(11.1, 2.6, [cls, *[patch] * 6])
    tokens(11.1, 4.3, [prompt] * 3, alpha=0.3)
    arrow((0.6, 1.4), (1.5, 3))
    arrow((6.3, 3.5), (6.9, 3.5))
    arrow((7.5, 3.2), (8.2, 2.6))
    arrow((0.6, 1.0), (8.2, 1.0))
    arrow((10.4, 1.0), (11, 1.0))
    arrow((11.6, 1.0), (12.3, 1.0))
    axis.text(3.9, 4.6, "learned", ha="center", fontsize=9, color=prompt)
    axis.text(11.7, 4.0, "thrown away", fontsize=9, va="center")
    axis.text(12.4, 1.0, "next block, with\nits own prompts", fontsize=9, va="center")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in COLORS]
    names = ["prefix token (CLS)", "prompts", "patches"]
    figure.legend(handles, names, loc="lower center", ncols=3, frameon=False, fontsize=9)
    axis.set(xlim=(-0.2, 15), ylim=(-0.8, 5), aspect="equal")
    axis.axis("off")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def attention() -> plt.Figure:
    """Which queries (rows) meet which keys (columns), of 1 prefix token, 3 prompts and 6 patches."""
    colors = ListedColormap([*COLORS, "#f2f2f2"])
    tokens = torch.tensor([0] + [1] * 3 + [2] * 6)
    panels = {
        "literal": range(10),
        "rewritten": [0, *range(4, 10)],
        "rewritten, last block": [0],
    }
    figure, axes = plt.subplots(1, 3, figsize=(8, 3.2))
    for axis, (title, queries) in zip(axes, panels.items(), strict=True):
        cells = torch.full((10, 10), 3)
        cells[list(queries)] = tokens
        style = {"cmap": colors, "vmin": 0, "vmax": 3, "edgecolors": "white", "linewidth": 1}
        axis.pcolormesh(range(11), range(11), cells, **style)
        axis.pcolormesh([-1.5, -0.5], range(11), tokens[:, None], **style)
        axis.pcolormesh(range(11), [-1.5, -0.5], tokens[None], **style)
        axis.set(title=title, aspect="equal", ylim=(10, -1.5))
        axis.axis("off")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in COLORS]
    names = ["prefix token (CLS)", "prompts", "patches"]
    figure.legend(handles, names, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 0.95))
    return figure


def pooling() -> plt.Figure:
    """A row of the projection W on the convolved grid, the kernel, and the row of M that they make."""
    torch.manual_seed(1)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(1, 1, 8, 8), 3, stride=1)
    weight, kernel = smooth.view(1, 1, 36), torch.randn(1, 2, 2)
    matrix = prompt_matrices(weight, kernel, (7, 7))
    parts = {
        "W, one prompt\n(H' x W' = 6 x 6)": weight.view(6, 6),
        "kernel k\n(2 x 2)": kernel[0],
        "M, the same prompt\n(H x W = 7 x 7)": matrix.view(7, 7),
    }
    figure, axes = plt.subplots(1, 3, figsize=(6, 2.6), width_ratios=[6, 2, 7])
    for axis, (title, values), sign in zip(axes, parts.items(), ("*", "=", ""), strict=True):
        bound = values.abs().max().item()
        style = {"cmap": "PuOr", "vmin": -bound, "vmax": bound, "edgecolors": "white", "linewidth": 1}
        axis.pcolormesh(values.flip(0), **style)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
        axis.text(1.1, 0.5, sign, transform=axis.transAxes, fontsize=18, va="center")
    figure.tight_layout(w_pad=3)
    return figure


def steps() -> plt.Figure:
    """The time of a training step by backend, from bench/results."""
    results = json.loads((DOCS.parent / "bench/results/h200-2026-11-27-kernels.json").read_text())
    rows = [row for row in results["steps"]["rows"] if row["mode"] == "training step" and row["one_graph"]]
    settings = [(50, 64), (100, 64), (50, 256)]
    figure, axis = plt.subplots(figsize=(8, 2.9))
    for place, backend in enumerate(("reference", "torch", "auto")):
        for setting, color in zip(settings, COLORS, strict=True):
            wanted = (f"{backend}, bfloat16", *setting)
            (row,) = (row for row in rows if (row["name"], row["prompts"], row["batch"]) == wanted)
            rate = setting[1] / median(row["ms"]) * 1000
            y = -place * 4 - settings.index(setting)
            label = f"{setting[0]} prompts, batch {setting[1]}" if place == 0 else None
            axis.barh(y, rate, color=color, label=label)
            axis.text(rate + 40, y, f"{rate:,.0f}", va="center", fontsize=8)
    axis.set(
        yticks=[-1, -5, -9],
        yticklabels=["reference", "torch", "auto"],
        xlabel="images a second",
        xlim=(0, 5600),
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    for draw in (method, attention, pooling, steps):
        path = DOCS / "figures" / f"{draw.__name__}.svg"
        draw().savefig(path, metadata={"Date": None})
        path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))
