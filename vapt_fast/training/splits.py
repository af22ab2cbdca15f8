"""Labelled images in three disjoint splits: train, validation (to choose with) and test (to report)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder

from ..demo import NEW_DIGITS, digit_images
from .errors import UserError, printable
from .images import IMAGE_EXTENSIONS, check_folders, is_image, open_image
from .listed import ListedImages
from .loader import LabelledImages, in_memory
from .transforms import NO_AUGMENTATION, Augmentation, eval_transform, train_transform

__all__ = [
    "Splits",
    "digit_splits",
    "evaluation_data",
    "folder_splits",
    "image_files",
    "stratified_order",
]

_DIGITS_TEST = 400
_DIGITS_VALIDATION = 196
_DIGITS_TEST_SEED = 2501  # the test images are the same for every seed of a run

SPLIT_FOLDERS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class Splits:
    """Three data sets of (image (3, H, W), class index), with no image in two of them.

    Attributes:
        class_names: name of each class, by its index.
        train: to learn from.
        validation: to choose the learning rate with; None where it is chosen already.
        test: to report; None where the user has none.
        files: the images of each split in their order, as paths within the data's folder; none for digits.
        source: what identifies images that lists name; none for others.
    """

    class_names: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages | None
    files: dict[str, list[str]] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


def image_files(*datasets: object) -> list[str]:
    """Return the paths of the image files that the data sets read; none for images in memory and None."""
    paths: list[str] = []
    for dataset in datasets:
        if isinstance(dataset, Subset):
            whole = image_files(dataset.dataset)
            paths += [whole[index] for index in dataset.indices] if whole else []
        elif isinstance(dataset, ImageFolder):
            paths += [path for path, _ in dataset.samples]
        elif isinstance(dataset, ListedImages):
            paths += dataset.paths
    return paths


class _Transformed:
    """Images in memory that are transformed anew whenever they are read."""

    def __init__(self, images: Sequence[Image.Image], labels: Sequence[int], transform: Any) -> None:
        self._images, self._labels, self._transform = images, labels, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images[index]), self._labels[index]


def stratified_order(labels: Sequence[int], seed: int) -> list[int]:
    """Return a random order of all indices; every beginning of it has the classes in their proportions."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator).tolist()
    members: dict[int, list[int]] = {}
    for index in shuffled:
        members.setdefault(labels[index], []).append(index)
    place = {
        index: (rank + 0.5) / len(indices)
        for indices in members.values()
        for rank, index in enumerate(indices)
    }
    return sorted(shuffled, key=place.__getitem__)


def digit_splits(
    config: dict[str, Any],
    seed: int,
    num_train: int | None = None,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Splits:
    """Split the real digit images 5 to 9: 400 for test, 196 for validation, at most 300 for training.

    The test images are always the same; ``seed`` deals out the others. A smaller training set is the
    beginning of a larger one.

    Args:
        config: of ``full_data_config``.
        seed: of the split.
        num_train: training images; None for all 300.
        augmentation: of the training images.

    Raises:
        UserError: more training images than there are, or fewer than classes.
        ModuleNotFoundError: scikit-learn is missing.
    """
    images, digits = digit_images(NEW_DIGITS)
    transform = eval_transform(config)
    pixels = torch.stack([transform(image) for image in images])
    labels = torch.tensor(digits) - NEW_DIGITS.start

    order = torch.tensor(stratified_order(labels.tolist(), _DIGITS_TEST_SEED))
    test, rest = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    rest = rest[stratified_order(labels[rest].tolist(), seed)]
    validation, train = rest[:_DIGITS_VALIDATION], rest[_DIGITS_VALIDATION:]
    train = train[: _check_num_train(num_train, len(train), len(NEW_DIGITS))]
    learning: LabelledImages = TensorDataset(pixels[train], labels[train])
    if augmentation.random:
        shown = [images[index] for index in train.tolist()]
        learning = _Transformed(shown, labels[train].tolist(), train_transform(config, augmentation))
    return Splits(
        class_names=tuple(str(digit) for digit in NEW_DIGITS),
        train=learning,
        validation=TensorDataset(pixels[validation], labels[validation]),
        test=TensorDataset(pixels[test], labels[test]),
    )


def folder_splits(
    root: str | Path,
    config: dict[str, Any],
    seed: int,
    *,
    num_train: int | None = None,
    validation_share: float = 0.2,
    test_share: float = 0.2,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Splits:
    """Split images in folders named after their classes.

    Either ``root`` has the folders ``train``, optionally ``val`` and ``test``, each with one folder a class;
    without ``val``, a share of ``train`` is split off. Or ``root`` has one folder a class and is split in
    three. Splits are stratified and depend on ``seed`` only.

    Args:
        root: the folder.
        config: of ``full_data_config``.
        seed: of the split.
        num_train: training images to use, stratified; None for all.
        validation_share, test_share: of the images that are split.
        augmentation: of the training images.

    Raises:
        UserError: a folder that is missing, empty or has other classes than the training folder, or one that
            is laid out for segmentation.
    """
    root = Path(root)
    if not root.is_dir():
        raise _no_folder(root)
    learning, fixed = train_transform(config, augmentation), eval_transform(config)
    base = root / "train" if (root / "train").is_dir() else root
    train = _open_folder(base, learning)
    if len(train.classes) < 2:
        raise UserError(f"{printable(base)} must have folders of two classes at least, got {train.classes}")
    if train.classes == ["images", "masks"]:
        raise UserError(
            f"{printable(base)} has images/ and masks/: give task='segmentation' (--task segmentation)"
        )
    order = stratified_order(train.targets, seed)
    num_test, num_validation = (round(share * len(order)) for share in (test_share, validation_share))
    test: LabelledImages | None = None
    validation: LabelledImages | None = None
    if base == root:
        test = Subset(_open_folder(root, fixed), order[:num_test]) if num_test else None
        order = order[num_test:]
    else:
        folders = [_find_split(root, split) for split in ("test", "validation")]
        test, validation = (of if of is None else _open_folder(of, fixed, train.classes) for of in folders)
    if validation is None:
        validation = Subset(_open_folder(base, fixed), order[:num_validation])
        order = order[num_validation:]
    if not len(validation):
        raise UserError(
            f"{printable(root)} has too few images, none is left for validation, which chooses the learning "
            "rate: add images, or give a larger validation_share"
        )
    count = _check_num_train(num_train, len(order), len(train.classes))
    learned = Subset(train, order[:count])
    parts = {"train": learned, "validation": validation, "test": test}
    files = {
        name: [Path(path).relative_to(root).as_posix() for path in image_files(part)]
        for name, part in parts.items()
        if part is not None
    }
    return Splits(tuple(train.classes), learned, validation, test, files)


def evaluation_data(
    root: str | Path, config: dict[str, Any], class_names: Sequence[str], split: str | None = None
) -> LabelledImages:
    """Open images to evaluate a model on, labelled with its classes by their names.

    Args:
        root: a folder that is split already, as for ``folder_splits``, or one with one folder a class, all of
            whose images are taken; or "digits", of which there are test images only.
        config: of ``full_data_config``.
        class_names: the model's, by index. Folders are matched by name; the model may know more classes.
        split: "train", "validation" or "test", of a folder that is split already; None for "test".

    Raises:
        UserError: no such folder or split, a folder named after no class of the model, or no images.
    """
    if root == "digits":
        return _digits_to_test(config, class_names, split)
    root = Path(root)
    if not root.is_dir():
        raise _no_folder(root)
    found = {name: _find_split(root, name) for name in SPLIT_FOLDERS}
    if any(name in class_names for names in SPLIT_FOLDERS.values() for name in names):
        found = dict.fromkeys(found)  # these are classes
    folder: Path | None = root
    chosen = "test" if split is None else split
    if any(found.values()):
        folder = found[chosen]
    elif split is not None:
        raise UserError(f"{printable(root)} has no folder {SPLIT_FOLDERS[split][0]}/: leave the split out")
    if folder is None:
        there = [name for name, path in found.items() if path is not None]
        raise UserError(f"{printable(root)} has no images of the split {chosen!r}, it has {there}")
    dataset = _open_folder(folder, eval_transform(config), allow_empty=True)
    labels = _matched(dataset.classes, class_names, printable(folder))
    if not len(dataset):
        raise UserError(f"{printable(folder)} has no images; expected files that end in {IMAGE_EXTENSIONS}")
    dataset.target_transform = labels.__getitem__
    return dataset


def _digits_to_test(config: dict[str, Any], class_names: Sequence[str], split: str | None) -> TensorDataset:
    if split not in (None, "test"):
        raise UserError(f"of the digits, only the split 'test' is the same in every run; got {split!r}")
    splits = digit_splits(config, seed=0)
    assert splits.test is not None
    images, labels = in_memory(splits.test).tensors
    return TensorDataset(images, torch.tensor(_matched(splits.class_names, class_names, "digits"))[labels])


def _matched(names: Sequence[str], class_names: Sequence[str], where: str) -> list[int]:
    """Return the index of each name among the model's classes."""
    unknown = sorted(set(names) - set(class_names))
    if unknown:
        raise UserError(
            f"{where} has classes that the model doesn't know: {unknown}; it knows {list(class_names)}"
        )
    several = sorted(name for name in names if list(class_names).count(name) > 1)
    if several:
        raise UserError(
            f"{where} can't be matched by name: several classes of the model are called {several}"
        )
    return [class_names.index(name) for name in names]


def _no_folder(root: Path) -> UserError:
    return UserError(
        f"data must be 'digits' or a folder with one folder of images a class, got {printable(root)}"
    )


def _open_folder(
    root: Path, transform: Any, classes: Sequence[str] | None = None, *, allow_empty: bool = False
) -> ImageFolder:
    check_folders(root)
    try:
        dataset = _VisibleFolder(
            str(root),
            transform,
            loader=open_image,
            is_valid_file=partial(is_image, folder=root),
            allow_empty=allow_empty,
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{printable(root)} must have one folder of images a class: {str(error).splitlines()[0]}"
        ) from error
    if classes is not None and dataset.classes != list(classes):
        raise UserError(
            f"{printable(root)} has the classes {dataset.classes}, but the training images {list(classes)}"
        )
    return dataset


class _VisibleFolder(ImageFolder):
    """An ImageFolder of which hidden folders are no classes."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        found = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return found, {name: index for index, name in enumerate(found)}


def _find_split(root: Path, split: str) -> Path | None:
    return next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)


def _check_num_train(num_train: int | None, available: int, num_classes: int) -> int:
    if available < num_classes:
        raise UserError(
            f"{available} images are left to train on after validation and test, fewer than the "
            f"{num_classes} classes: add images, or give a smaller validation_share or test_share"
        )
    if num_train is None:
        num_train = available
    if not num_classes <= num_train <= available:
        raise UserError(
            f"train_images must be between {num_classes}, one a class, and {available}, all that are left "
            f"after validation and test; got {num_train}"
        )
    return num_train
