"""Search: train by every candidate recipe and keep the best on the validation images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import parallel
from .checkpoint import load_checkpoint, save_checkpoint
from .errors import DivergedError, UserError
from .evaluation import Score, evaluate
from .loader import LabelledImages
from .methods import trained_state
from .metrics import MetricsLog
from .recipe import Recipe
from .splits import Splits
from .trainer import Epoch, Trainer, load_trained_state, seed_everything

__all__ = ["CHECKPOINT_NAME", "METRICS_NAME", "Found", "Progress", "Start", "search"]

CHECKPOINT_NAME = "checkpoint.pt"
METRICS_NAME = "metrics.jsonl"

Progress = Callable[[int, Epoch, Score | None], None]
"""Called after every epoch with the candidate's index, the epoch, and the validation score, if any."""


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        model: trained by the best recipe, in eval mode.
        recipe: the best one.
        validation: its score on the validation images after the last epoch; by this it was chosen. None
            without validation images.
        test: its score on the test images, which were not looked at before; None without test images.
        candidates: for every recipe tried, base_lr, weight_decay, and accuracy and loss in validation.
        seconds: what training took, of all recipes and without validation.
    """

    model: nn.Module
    recipe: Recipe
    validation: Score | None
    test: Score | None
    candidates: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class Start:
    """A trained model to train on.

    Attributes:
        model: what ``trained_state`` gives of it.
        epochs: how many it was trained for.
        metrics_size: bytes of the metrics' file that are about these.
    """

    model: dict[str, Tensor]
    epochs: int
    metrics_size: int


def search(
    make_model: Callable[[], nn.Module],
    splits: Splits,
    recipes: Sequence[Recipe],
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    validate_every: int = 1,
    folder: Path | None = None,
    resume: bool = False,
    start: Start | None = None,
    progress: Progress | None = None,
    evaluate: Callable[..., Score] = evaluate,
) -> Found:
    """Train a new model by each recipe, take the best in validation, and test that one.

    Every candidate is judged after its last epoch, so that validation chooses the recipe and nothing else.
    The higher accuracy (of segmentation: mean IoU) wins, then the lower loss, then the earlier recipe.

    Args:
        make_model: makes an untrained model; called with all random generators seeded by the recipe's seed.
        splits, recipes: the images, and the candidates, at least one; exactly one without validation images.
        device, workers: as for Trainer.
        validate_every: epochs between scores in validation. The last is always taken and alone decides.
        folder: where the checkpoint and the metrics go, every epoch; None to keep nothing.
        resume: go on from the checkpoint in ``folder``, to the same bits as without the stop.
        start: where the recipe, which then must be the only one, starts from; None for the beginning.
        progress: see Progress.
        evaluate: scores a model on a data set, as vapt_fast.training.evaluate does.

    Raises:
        UserError: nothing to resume, a checkpoint of another search, or several recipes without validation
            images.
        DivergedError: no recipe that didn't diverge.
        OSError: the disk is full, or the like; the checkpoint in ``folder`` is still good.
    """
    if splits.validation is None and len(recipes) != 1:
        raise UserError(f"without validation images there must be one recipe, got {len(recipes)}")
    state: dict[str, Any] = {
        "recipes": [asdict(recipe) for recipe in recipes],
        "candidates": [],
        "best": None,
        "current": None,
        "metrics_size": 0 if start is None else start.metrics_size,
        "seconds": 0.0,
    }
    if resume:
        if folder is None:
            raise UserError("resume needs the folder that the search was stopped in")
        expected, state = state["recipes"], load_checkpoint(folder / CHECKPOINT_NAME)
        if state["recipes"] != expected:
            raise UserError(f"{folder / CHECKPOINT_NAME} was written with other options: resume with those")
    if parallel.rank():
        folder = None  # the first process writes
    log = MetricsLog(None if folder is None else folder / METRICS_NAME, keep=state["metrics_size"])
    options: dict[str, Any] = {"device": device, "workers": workers}

    def score_of(model: nn.Module, dataset: LabelledImages, recipe: Recipe) -> Score:
        return evaluate(model, dataset, batch_size=recipe.batch_size, amp=recipe.amp, **options)

    for index, recipe in list(enumerate(recipes))[len(state["candidates"]) :]:
        trainer = Trainer(_seeded(make_model, recipe), recipe, splits.train, **options)
        if state["current"] is not None:
            trainer.load_state_dict(state["current"])
        elif start is not None:
            trainer.start_from(start.model, start.epochs)
        for epoch, score in _epochs(trainer, splits.validation, validate_every, score_of):
            tried = {"base_lr": recipe.base_lr, "weight_decay": recipe.weight_decay}
            log.write({"candidate": index, **tried, **asdict(epoch), **_entries(score)})
            state["seconds"] += epoch.seconds
            if trainer.finished:
                _finish_candidate(state, trainer, score)
            else:
                state["current"] = trainer.state_dict()
            state["metrics_size"] = log.size
            if folder is not None:
                save_checkpoint(folder / CHECKPOINT_NAME, state)
            if progress is not None:
                progress(index, epoch, score)
    return _best(state, make_model, splits.test, recipes, score_of, device)


def _epochs(
    trainer: Trainer, validation: LabelledImages | None, validate_every: int, score_of: Callable[..., Score]
) -> Iterator[tuple[Epoch, Score | None]]:
    """Train to the end; yield every epoch with its score in validation, which the last has if any has."""
    while not trainer.finished:
        epoch, score = trainer.run_epoch(), None
        if validation is not None and (trainer.finished or trainer.epoch % validate_every == 0):
            score = score_of(trainer.model, validation, trainer.recipe)
        yield epoch, score


def _best(
    state: dict[str, Any],
    make_model: Callable[[], nn.Module],
    test_data: LabelledImages | None,
    recipes: Sequence[Recipe],
    score_of: Callable[..., Score],
    device: torch.device | str,
) -> Found:
    """Make the best candidate's model again, and test it."""
    best = state["best"]
    if best is None:
        raise DivergedError(
            f"training diverged with every learning rate of {[recipe.base_lr for recipe in recipes]}: "
            "give lower ones"
        )
    recipe = recipes[best["index"]]
    model = _seeded(make_model, recipe).to(device)
    load_trained_state(model, best["model"])
    test = None if test_data is None else score_of(model, test_data, recipe)
    chosen = state["candidates"][best["index"]]
    names = ("validation_accuracy", "validation_loss", "validation_mean_iou")
    scored = chosen["validation_accuracy"] is not None
    validation = Score(*(chosen.get(name) for name in names)) if scored else None
    return Found(model.eval(), recipe, validation, test, state["candidates"], state["seconds"])


def _seeded(make_model: Callable[[], nn.Module], recipe: Recipe) -> nn.Module:
    seed_everything(recipe.seed)
    return make_model()


def _finish_candidate(state: dict[str, Any], trainer: Trainer, score: Score | None) -> None:
    """List a trained candidate, and keep its tensors if it is the best so far."""
    # The loss of an epoch says nothing of its last step.
    diverged = trainer.diverged or not (score is None or math.isfinite(score.loss))
    candidate = {
        "base_lr": trainer.recipe.base_lr,
        "weight_decay": trainer.recipe.weight_decay,
        "diverged": diverged,
        **_entries(score),
    }
    state["candidates"].append(candidate)
    state["current"] = None
    if diverged:
        return
    merit = [] if score is None else [score.merit, -score.loss]
    if state["best"] is None or merit > state["best"]["merit"]:
        tensors = {name: tensor.cpu().clone() for name, tensor in trained_state(trainer.model).items()}
        state["best"] = {"index": len(state["candidates"]) - 1, "merit": merit, "model": tensors}


def _entries(score: Score | None) -> dict[str, float | None]:
    """Return what files keep of a score in validation, if there is one."""
    return {
        "validation_accuracy": None,
        "validation_loss": None,
        **({} if score is None else score.entries("validation")),
    }
