"""Methods against each other on the real digits 5 to 9, which the backbone has never seen."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from .methods import build_model
from .recipe import Recipe
from .saved import save_model
from .search import Found, search
from .splits import NEW_DIGITS, digit_splits
from .transforms import data_config

__all__ = ["Comparison", "Outcome", "compare"]

BACKBONE = "vit_digits_patch4_32"


@dataclass(frozen=True)
class Comparison:
    """What is compared.

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
    """How one method did with one number of training images.

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
        """Mean test accuracy over the seeds, 0 to 1."""
        return statistics.mean(self.test)

    @property
    def spread(self) -> float:
        """Standard deviation of the test accuracy over the seeds (n - 1), 0 for one seed."""
        return statistics.stdev(self.test) if len(self.test) > 1 else 0.0


def compare(
    comparison: Comparison,
    folder: Path,
    on_outcome: Callable[[Outcome], None],
    processes: int | None = None,
) -> list[Outcome]:
    """Run a comparison.

    Args:
        comparison: what to compare.
        folder: the first seed's models are saved in ``folder/method-images``, for ``load_model``.
        on_outcome: called with every outcome as soon as it is there.
        processes: how many to share the work, each with one thread, because models this small have no work
            for more; None for one a CPU core.

    Returns:
        The outcomes by number of training images, then in the order of the methods.
    """
    jobs = [(method, num_train) for num_train in comparison.epochs for method in comparison.methods]
    # The longest first, so that no process is left alone with one at the end.
    queue = sorted(jobs, key=lambda job: job[1] * comparison.epochs[job[1]], reverse=True)
    outcomes = {}
    processes = min(processes or os.cpu_count() or 1, len(jobs))
    spawn = multiprocessing.get_context("spawn")  # forked threads of PyTorch can hang
    with ProcessPoolExecutor(processes, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(run_method, comparison, folder, *job): job for job in queue}
        for future in as_completed(futures):
            outcomes[futures[future]] = future.result()
            on_outcome(outcomes[futures[future]])
    return [outcomes[job] for job in jobs]


def run_method(comparison: Comparison, folder: Path, method: str, num_train: int) -> Outcome:
    """Choose the learning rate of one method with the first seed, then test it with every seed."""
    base_lrs = comparison.full_base_lrs if method == "full" else comparison.base_lrs
    chosen, validation, test = None, {}, []
    for seed in comparison.seeds:
        found = train_on_digits(comparison, method, num_train, seed, base_lrs if chosen is None else [chosen])
        if chosen is None:
            chosen = found.recipe.base_lr
            validation = {c["base_lr"]: c["validation_accuracy"] for c in found.candidates}
            save_model(found.model, folder / f"{method}-{num_train}", _metadata())
        test.append(found.test.accuracy)
    num_trained = sum(p.numel() for p in found.model.parameters() if p.requires_grad)
    return Outcome(method, num_train, chosen, validation, test, num_trained)


def train_on_digits(
    comparison: Comparison, method: str, num_train: int, seed: int, base_lrs: Iterable[float]
) -> Found:
    """One method, one number of training images, one seed."""
    epochs = comparison.epochs[num_train]
    numbers = {"epochs": epochs, "warmup_epochs": max(1, epochs // 10), "batch_size": comparison.batch_size}
    metadata = _metadata()
    return search(
        lambda: build_model(method, BACKBONE, len(metadata["class_names"])),
        digit_splits(metadata["data_config"], seed, num_train),
        [Recipe(base_lr, seed=seed, **numbers) for base_lr in base_lrs],
        validate_every=epochs,
    )


def _metadata() -> dict[str, Any]:
    """What prediction needs to know."""
    return {
        "class_names": [str(digit) for digit in NEW_DIGITS],
        "data_config": data_config(timm.get_pretrained_cfg(BACKBONE).to_dict()),
    }
