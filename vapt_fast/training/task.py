"""Tasks: what a run does differently for classification, segmentation, ..."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from torch import nn

from ..config import PromptConfig
from .evaluation import Score, evaluate
from .images import check_images
from .loader import LabelledImages
from .methods import build_model
from .options import RunOptions
from .splits import Splits, digit_splits, folder_splits, image_files
from .suites import is_suite_data, open_data_set, suite_splits

__all__ = ["Classification", "Task", "find_task"]

Progress = Callable[[int, int], None]


class Task(Protocol):
    """What a run asks of a task."""

    def splits(self, options: RunOptions, config: dict[str, Any], seed: int) -> Splits:
        """Open the data; ``config`` says how images are prepared."""
        ...

    def check_data(self, splits: Splits, workers: int, progress: Progress | None) -> None:
        """Read every image once, and raise a UserError about those that can't be used."""
        ...

    def make_model(self, options: RunOptions, num_classes: int, prompts: PromptConfig) -> nn.Module:
        """Make an untrained model."""
        ...

    def evaluate(self, model: nn.Module, dataset: LabelledImages, **options: Any) -> Score:
        """Score a model on a data set; options as for vapt_fast.training.evaluate."""
        ...

    def metadata(self, options: RunOptions) -> dict[str, Any]:
        """Return what is kept with the model besides the result."""
        ...


class Classification:
    """One class an image."""

    def splits(self, options: RunOptions, config: dict[str, Any], seed: int) -> Splits:
        """Open the digits, a folder with one folder of images a class, or a benchmark's data set."""
        if is_suite_data(options.data):
            return suite_splits(
                open_data_set(options.data, options.root, other_sizes=options.other_sizes),
                config,
                seed,
                num_train=options.train_images,
                train_share=options.train_share,
                train_on_validation=options.train_on_validation,
                augmentation=options.augmentation,
            )
        if options.data == "digits":
            return digit_splits(config, seed, options.train_images, options.augmentation)
        return folder_splits(
            options.data,
            config,
            seed,
            num_train=options.train_images,
            validation_share=options.validation_share,
            test_share=options.test_share,
            augmentation=options.augmentation,
        )

    def check_data(self, splits: Splits, workers: int, progress: Progress | None) -> None:
        """Read every image once."""
        check_images(image_files(splits.train, splits.validation, splits.test), workers, progress)

    def make_model(self, options: RunOptions, num_classes: int, prompts: PromptConfig) -> nn.Module:
        """Make the model that the method trains."""
        return build_model(options.method, options.backbone, num_classes, prompts=prompts, **options.model)

    def evaluate(self, model: nn.Module, dataset: LabelledImages, **options: Any) -> Score:
        """Return accuracy and loss."""
        return evaluate(model, dataset, **options)

    def metadata(self, options: RunOptions) -> dict[str, Any]:
        """Return nothing."""
        return {}


def find_task(name: str) -> Task:
    """Return the task of that name, one of vapt_fast.training.options.TASKS."""
    if name == "classification":
        return Classification()
    # It stands above this layer, as do its dependencies, and is needed by its own runs only.
    return import_module(f"vapt_fast.tasks.{name}.task").TASK
