"""What a benchmark suite is: data sets with fixed lists, classes, sizes and preparation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, printable
from ..listed import ImageList, ListedImages, check_disjoint, check_present
from ..splits import Splits, stratified_order
from ..transforms import NO_AUGMENTATION, Augmentation, eval_transform, train_transform

__all__ = ["PARTS", "DataSet", "Opened", "Suite", "open_from", "suite_splits"]

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSet:
    """One data set of a suite.

    Attributes:
        group: the part of the suite that it belongs to, over which a mean is taken.
        num_classes: classes.
        sizes: images to train on, to choose with, and to test on.
        image_folder: within its folder, where the paths of its lists begin.
    """

    group: str
    num_classes: int
    sizes: tuple[int, int, int]
    image_folder: str = ""


Reader = Callable[[Path, DataSet], tuple[tuple[str, ...], tuple[ImageList, ImageList, ImageList]]]
"""Reads a data set's folder: the names of its classes, and its lists in the order of PARTS."""


@dataclass(frozen=True)
class Suite:
    """A benchmark suite.

    Attributes:
        name: before the colon of "vtab:cifar".
        title: in tables.
        data_sets: by name, in the order of the published tables.
        preparation: of images, some keys of ``vapt_fast.data.DATA_KEYS``; the rest is as the backbone's.
        read: reads a data set's folder.
    """

    name: str
    title: str
    data_sets: Mapping[str, DataSet]
    preparation: Mapping[str, Any]
    read: Reader

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of its data sets, in order."""
        return tuple(dict.fromkeys(data_set.group for data_set in self.data_sets.values()))


@dataclass(frozen=True)
class Opened:
    """A data set of a suite as it lies on the disk.

    Attributes:
        name: as "vtab:cifar".
        class_names: by index.
        lists: one for each of PARTS.
        deviations: what differs from the suite's own lists, one line each; none for the benchmark itself.
    """

    name: str
    class_names: tuple[str, ...]
    lists: tuple[ImageList, ImageList, ImageList]
    deviations: tuple[str, ...]

    @property
    def record(self) -> dict[str, Any]:
        """What identifies the images, as JSON has it."""
        return {
            "name": self.name,
            "num_classes": len(self.class_names),
            "sizes": {part: len(images.paths) for part, images in zip(PARTS, self.lists, strict=True)},
            "sha256": {images.file.name: images.sha256 for images in self.lists},
            "deviations": list(self.deviations),
        }


def open_from(suite: Suite, member: str, root: Path, *, other_sizes: bool = False) -> Opened:
    """Read the lists of a data set, and check them. No image is opened.

    Args:
        suite: the suite.
        member: the data set's name in it.
        root: the folder with one folder a data set, named as in the suite, or the data set's own folder.
        other_sizes: take lists of other sizes than the suite's, which then are noted as deviations.

    Raises:
        UserError: a list that is missing or damaged, a label out of range, an image that is listed twice or
            does not exist, or lists of other sizes.
    """
    data_set = suite.data_sets[member]
    if not root.is_dir():
        raise UserError(f"root {printable(root)} does not exist; expected the folder of {suite.title}'s data")
    folder = root / member if (root / member).is_dir() else root
    class_names, lists = suite.read(folder, data_set)
    check_disjoint(lists)
    deviations = []
    for part, images, expected in zip(PARTS, lists, data_set.sizes, strict=True):
        if not images.paths:
            raise UserError(f"{printable(images.file)} is empty, expected images for {part}")
        check_present(images)
        if len(images.paths) != expected:
            deviations.append(f"{images.file.name} has {len(images.paths):,} images instead of {expected:,}")
    if deviations and not other_sizes:
        raise UserError(
            f"{printable(folder)} is not {suite.title}'s {member}: {'; '.join(deviations)}. Get the whole "
            "data set, or give other_sizes=True for a run that is not the benchmark"
        )
    return Opened(f"{suite.name}:{member}", class_names, lists, tuple(deviations))


def suite_splits(
    opened: Opened,
    config: dict[str, Any],
    seed: int,
    *,
    num_train: int | None = None,
    train_share: float | None = None,
    train_on_validation: bool = False,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Splits:
    """Return the splits of a data set as its lists have them.

    Args:
        opened: the data set.
        config: of ``full_data_config``.
        seed: of the choice of training images, if not all are taken.
        num_train: how many images to train on, spread over the classes; None for all.
        train_share: the same as a share of them, rounded up; None for all.
        train_on_validation: train on the validation images too, and choose nothing by them. A number or a
            share of images is then taken of both.
        augmentation: of the training images.

    Raises:
        UserError: a number of images that is out of range.
    """
    learning, fixed = train_transform(config, augmentation), eval_transform(config)
    train, validation, test = opened.lists
    paths, labels = train.paths, train.labels
    if train_on_validation:
        paths, labels = paths + validation.paths, labels + validation.labels
    if train_share is not None:
        num_train = math.ceil(round(train_share * len(paths), 6))  # 0.07 * 100 is a little more than 7
    if num_train is not None:
        if not 1 <= num_train <= len(paths):
            raise UserError(
                f"{opened.name} has {len(paths):,} images to train on, got train_images={num_train}"
            )
        chosen = stratified_order(labels, seed)[:num_train]
        paths, labels = [paths[index] for index in chosen], [labels[index] for index in chosen]
    return Splits(
        opened.class_names,
        ListedImages(paths, labels, learning),
        None if train_on_validation else ListedImages(validation.paths, validation.labels, fixed),
        ListedImages(test.paths, test.labels, fixed),
        source=opened.record,
    )
