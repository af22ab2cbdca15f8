"""The experiment: methods compared on the real digits 5 to 9, which the backbone has never seen."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data import full_data_config
from ..names import DEMO_BACKBONE
from ..training import Found, Recipe, build_model, digit_splits, save_model, search
from .backbone import default_cfgs
from .digits import NEW_DIGITS

__all__ = ["Experiment", "Outcome", "run_experiment"]


@dataclass(frozen=True)
class Experiment:
    """An experiment: which methods are compared, and how each is trained.

    Attributes:
        methods: keys of METHODS.
        epochs: for each number of training images, how long to train.
        seeds: of the split, the initialisation and the training.
        base_lrs: the candidates for every method but "full", which changes all weights and needs lower ones.
        full_base_lrs: the candidates for "full".
        batch_size: images a step.
    """

    methods: tuple[str, ...] = ("vapt", "vpt-deep", "linear", "full")
    epochs: dict[int, int] = field(default_factory=lambda: {20: 60, 100: 40, 300: 10})
    seeds: tuple[int, ...] = (0, 1, 2)
    base_lrs: tuple[float, ...] = (2.5, 1.0, 0.4)
    full_base_lrs: tuple[float, ...] = (0.05, 0.02, 0.008)
    batch_size: int = 32


@dataclass(frozen=True)
class Outcome:
    """The result of one method with one number of training images.

    Attributes:
        method: key of METHODS.
        num_train: training images.
        base_lr: the learning rate chosen by validation with the first seed, used for all seeds.
        validation: accuracy of every candidate with the first seed, 0 to 1, by its learning rate.
        test: accuracy on the test images, 0 to 1, a number a seed.
        num_trained: parameters trained.
    """

    method: str
    num_train: int
    base_lr: float
    validation: dict[float, float]
    test: list[float]
    num_trained: int

    @property
    def mean(self) -> float:
        """The mean test accuracy over the seeds, 0 to 1."""
        return statistics.mean(self.test)

    @property
    def spread(self) -> float:
        """The standard deviation of the test accuracy over the seeds (n - 1), 0 for one seed."""
        return statistics.stdev(self.test) if len(self.test) > 1 else 0.0


def run_experiment(
    experiment: Experiment,
    folder: Path,
    on_outcome: Callable[[Outcome], None],
    processes: int | None = None,
) -> list[Outcome]:
    """Run an experiment.

    Args:
        experiment: what to compare.
        folder: the first seed's models are saved in ``folder/method-images``, for ``load_model``.
        on_outcome: called with every outcome as soon as it is there.
        processes: how many to share the work, each with one thread, because models this small have no work
            for more; None for one a CPU core.

    Returns:
        The outcomes by number of training images, then in the order of the methods.
    """
    jobs = [(method, num_train) for num_train in experiment.epochs for method in experiment.methods]
    # The longest first, so that no process is left alone with one at the end.
    queue = sorted(jobs, key=lambda job: job[1] * experiment.epochs[job[1]], reverse=True)
    outcomes = {}
    processes = min(processes or os.cpu_count() or 1, len(jobs))
    spawn = multiprocessing.get_context("spawn")  # forked threads of PyTorch can hang
    with ProcessPoolExecutor(processes, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(run_method, experiment, folder, *job): job for job in queue}
        for future in as_completed(futures):
            outcomes[futures[future]] = future.result()
            on_outcome(outcomes[futures[future]])
    return [outcomes[job] for job in jobs]


def run_method(experiment: Experiment, folder: Path, method: str, num_train: int) -> Outcome:
    """Choose the learning rate of one method with the first seed, then test it with every seed."""
    base_lrs = experiment.full_base_lrs if method == "full" else experiment.base_lrs
    first, *seeds = experiment.seeds
    found = train_on_digits(experiment, method, num_train, first, base_lrs)
    save_model(found.model, folder / f"{method}-{num_train}", _metadata())
    chosen = [found.recipe.base_lr]
    again = [train_on_digits(experiment, method, num_train, seed, chosen) for seed in seeds]
    return Outcome(
        method=method,
        num_train=num_train,
        base_lr=found.recipe.base_lr,
        validation={c["base_lr"]: c["validation_accuracy"] for c in found.candidates},
        test=[one.test.accuracy for one in (found, *again) if one.test is not None],
        num_trained=sum(p.numel() for p in found.model.parameters() if p.requires_grad),
    )


def train_on_digits(
    experiment: Experiment, method: str, num_train: int, seed: int, base_lrs: Iterable[float]
) -> Found:
    """Train one method on one number of training images with one seed."""
    epochs, batch_size, metadata = experiment.epochs[num_train], experiment.batch_size, _metadata()
    recipes = [
        Recipe(base_lr, epochs=epochs, warmup_epochs=max(1, epochs // 10), batch_size=batch_size, seed=seed)
        for base_lr in base_lrs
    ]
    return search(
        lambda: build_model(method, DEMO_BACKBONE, len(metadata["class_names"])),
        digit_splits(metadata["data_config"], seed, num_train),
        recipes,
        validate_every=epochs,
    )


def _metadata() -> dict[str, Any]:
    """Return what prediction needs to know."""
    return {
        "class_names": [str(digit) for digit in NEW_DIGITS],
        "data_config": full_data_config(default_cfgs[DEMO_BACKBONE].default.to_dict()),
    }
