"""The demo's picture: accuracy over training images, and where the prompts look."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from ..explain import prompt_maps
from ..files import write_atomically
from ..model import AdaptiveViT
from ..training import METHODS, eval_transform, load_model
from .digits import NEW_DIGITS, digit_images
from .experiment import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

__all__ = ["draw"]


def draw(outcomes: list[Outcome], vapt_folder: Path, path: Path) -> None:
    """Draw the results of the experiment, and what the prompts of a VAPT model look at.

    Args:
        outcomes: of ``run_experiment``.
        vapt_folder: a model trained with the method "vapt".
        path: PNG file to write.
    """
    # The object-oriented interface: pyplot would choose a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained", dpi=150)
    left, right = cast("list[SubFigure]", figure.subfigures(1, 2, width_ratios=(1, 1.1)))
    _draw_accuracy(left, outcomes)
    _draw_maps(right, vapt_folder)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def _draw_accuracy(figure: SubFigure, outcomes: list[Outcome]) -> None:
    axes = figure.subplots()
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        row = [outcome for outcome in outcomes if outcome.method == method]
        axes.errorbar(
            [outcome.num_train for outcome in row],
            [100 * outcome.mean for outcome in row],
            yerr=[100 * outcome.spread for outcome in row],
            label=f"{METHODS[method].title} ({row[0].num_trained:,} weights)",
            marker="o",
            capsize=3,
        )
    sizes = sorted({outcome.num_train for outcome in outcomes})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training images")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Digits 5 to 9 with a backbone that knows 0 to 4")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_maps(figure: SubFigure, vapt_folder: Path) -> None:
    model, metadata = load_model(vapt_folder)
    digits, labels = digit_images(NEW_DIGITS)
    shown = [digits[labels.index(digit)] for digit in NEW_DIGITS]
    transform = eval_transform(metadata["data_config"])
    pixels = torch.stack([transform(image) for image in shown])
    with torch.no_grad():
        of_prompts = prompt_maps(cast(AdaptiveViT, model), pixels)
    maps = {index: each.norm(dim=1) for index, each in of_prompts.items()}
    axes = figure.subplots(len(maps) + 1, len(shown), squeeze=False)
    for column in range(len(shown)):
        gray = pixels[column].mean(0).numpy()
        axes[0, column].imshow(gray, cmap="gray")
        for row, strength in enumerate(maps.values(), start=1):
            axes[row, column].imshow(gray, cmap="gray")
            height, width = gray.shape
            over = (-0.5, width - 0.5, height - 0.5, -0.5)
            axes[row, column].imshow(strength[column].numpy(), cmap="inferno", alpha=0.6, extent=over)
    for row, label in enumerate(["image", *(f"block {index}" for index in maps)]):
        axes[row, 0].set_ylabel(label)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
    figure.suptitle("Which patches shape VAPT's prompts (bright: most)")
