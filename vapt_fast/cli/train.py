"""``vapt-fast train``."""

from __future__ import annotations

import math
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ..adapters import WEIGHTS_NAME, trainable_summary
from ..names import DEMO_BACKBONE
from ..training import Recipe, RunOptions, Score, UserError, run
from ..training.options import OPTIONS_NAME, RESULT_NAME
from ..training.parallel import joined, rank
from ..training.run import check_backend
from ..training.saved import FULL_MODEL_NAME
from ..training.trainer import Epoch
from . import options
from .console import count, failures, out, pick_device, progress_bars, say, status
from .output import check_folder
from .train_options import ARGUMENTS, flag_of, is_given, run_options, with_flags, with_run_options

__all__ = ["train"]

_MOMENT = 1.0  # seconds


def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the trained model, metrics and checkpoint.")],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume the stopped run in --output, with its options. With a larger --epochs, train the "
            "model of a finished run on: the learning rate follows the cosine of the new length, so it rises "
            "again.",
        ),
    ] = False,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads on the CPU (default: 1 for the digits backbone, else all cores)."),
    ] = None,
    workers: options.Workers = 0,
    **given: Any,
) -> None:
    """Adapt a backbone to labelled images; the learning rate is chosen on validation images.

    Without options but --output: VAPT on real images of the digits 5 to 9, with the small backbone that comes
    with this package and has only seen 0 to 4.
    """
    advice = f"Go on with: vapt-fast train --resume --output {shlex.quote(str(output))}"
    with failures(advice, with_flags, begun=output / OPTIONS_NAME):
        check_backend(given["backend"], "--backend")
        chosen = _resumed(context, given, output) if resume else RunOptions(**run_options(given))
        if not resume:
            _check_free(output, overwrite)
        check_folder(output, () if resume else (WEIGHTS_NAME, FULL_MODEL_NAME), overwrite)
        if threads is None and chosen.backbone == DEMO_BACKBONE:
            threads = 1  # so small a model has no work for more, which would wait for each other
        if threads is not None:
            torch.set_num_threads(threads)
        with joined(pick_device(device)) as place:
            shows = rank() == 0
            progress = _Progress(chosen.recipes(), shows)
            with progress.bars:
                result = run(
                    chosen,
                    output,
                    resume=resume,
                    device=place,
                    workers=workers,
                    on_check=progress.check,
                    on_start=lambda model, splits: _describe(model, splits, chosen) if shows else None,
                    progress=progress,
                )
    if shows:
        _report(result, output)


train.__signature__ = with_run_options(train)  # type: ignore[attr-defined]  # typer reads it


def _resumed(context: typer.Context, given: dict[str, Any], output: Path) -> RunOptions:
    """Return the options of the run in ``output``; those on the command line must agree with them."""
    options = RunOptions.read(output)
    if (output / RESULT_NAME).exists():
        if not is_given(context, "epochs"):
            raise UserError(
                f"the run in {output} is finished: there is nothing to resume. To train on, give --epochs too"
            )
        options = options.extended(given["epochs"], output)
    now, then = _flat(run_options(given)), _flat(asdict(options))
    for name, (_, option) in ARGUMENTS.items():
        if is_given(context, name) and now[option.name] != then[option.name]:
            raise UserError(
                f"{flag_of(name)} was {then[option.name]} when the run in {output} started, got "
                f"{now[option.name]}; leave it out"
            )
    return options


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, **options["prompts"], **options["recipe"]}


def _check_free(output: Path, overwrite: bool) -> None:
    if (output / OPTIONS_NAME).exists() and not overwrite:
        raise UserError(
            f"--output {output} has a run already: give --resume to go on with it, --overwrite to replace "
            "it, or another folder"
        )


def _describe(model: Any, splits: Any, options: RunOptions) -> None:
    test = "none" if splits.test is None else f"{len(splits.test):,}"
    chosen_with = "none" if splits.validation is None else f"{len(splits.validation):,}"
    say(
        f"{count(len(splits.class_names), 'class', 'classes')}; {count(len(splits.train), 'image')} to train "
        f"on, {chosen_with} to choose the learning rate with, {test} to test on",
        status,
    )
    say(trainable_summary(model), status)
    if options.backbone == DEMO_BACKBONE and options.data != "digits":
        say(
            f"the backbone is {DEMO_BACKBONE}, which has seen nothing but digits of 32 x 32 pixels: name one "
            "of timm's with --backbone",
            status,
        )
    if options.needs_backbone_file:
        size = sum(tensor.nbytes for tensor in model.backbone.state_dict().values()) / 1e6
        say(
            f"the frozen backbone ({size:,.0f} MB) will be kept with what is learned, because no name of "
            "timm's gives its weights",
            status,
        )


class _Progress:
    """The bars for reading the images and for the epochs of all candidates."""

    def __init__(self, recipes: list[Recipe], shown: bool) -> None:
        self.bars = progress_bars(disable=not shown)
        self._recipes = recipes
        self._tasks: dict[int, Any] = {}
        self._check: Any = None
        self._started = math.inf

    def check(self, done: int, total: int) -> None:
        """Show how many images were read, if that takes more than a moment."""
        self._started = min(self._started, time.monotonic())
        if self._check is None and time.monotonic() > self._started + _MOMENT:
            self._check = self.bars.add_task("reading all images once", total=total)
        if self._check is not None:
            self.bars.update(self._check, completed=done, visible=done < total)

    def __call__(self, candidate: int, epoch: Epoch, score: Score | None) -> None:
        if candidate not in self._tasks:
            self._tasks[candidate] = self.bars.add_task("", total=self._recipes[candidate].epochs)
        validation = "" if score is None else f", validation {score.merit:.1%}"
        self.bars.update(
            self._tasks[candidate],
            completed=epoch.epoch,
            description=f"{candidate + 1} of {len(self._recipes)}: loss {epoch.train_loss:.3f}{validation}",
        )


def _report(result: dict[str, Any], output: Path) -> None:
    table = Table("learning rate", "weight decay", "validation", title="Candidates")
    for candidate in result["candidates"]:
        score = _merit(candidate, "validation")
        scored = "none" if score is None else f"{score:.1%}"
        table.add_row(
            f"{candidate['base_lr']:g}",
            f"{candidate['weight_decay']:g}",
            "diverged" if candidate["diverged"] else scored,
        )
    out.print(table)
    chosen = result["recipe"]
    say(f"chosen: learning rate {chosen['base_lr']:g}, weight decay {chosen['weight_decay']:g}")
    for deviation in result["data"].get("deviations", []):
        say(f"note: this is not the benchmark's data: {deviation}")
    if result["test_accuracy"] is not None:
        what = "accuracy" if "test_mean_iou" not in result else "mean IoU"
        tested = count(result["num_images"]["test"], "image")
        say(f"test {what}: {_merit(result, 'test'):.1%} of {tested}")
    say(f"wrote {output}")


def _merit(scores: dict[str, Any], split: str) -> float | None:
    """Return the mean IoU of segmentation, the accuracy of other tasks."""
    return scores.get(f"{split}_mean_iou", scores[f"{split}_accuracy"])
