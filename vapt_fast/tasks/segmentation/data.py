"""Images with masks: a folder of both, and how they are prepared together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from ...training.errors import UserError, printable
from ...training.images import images_in, open_image
from ...training.loss import IGNORED
from ...training.splits import SPLIT_FOLDERS, Splits
from ...training.transforms import NO_AUGMENTATION, Augmentation

__all__ = ["MaskedImages", "Preparation", "mask_splits", "open_mask", "split_data"]

CLASSES_NAME = "classes.txt"
_AUGMENTATIONS = ("none", "flip", "crop-flip", "random-resized-crop")
_UNLABELLED = 255  # in mask files
_SCALES = (0.5, 2.0)  # of random resizing, as is usual for ADE20K


class Preparation:
    """What is done with an image and its labels before the model sees them.

    The image is resized, keeping its proportions, to the smallest size that covers what the model takes. In
    evaluation that is all, the labels stay as they are: windows slide over the image. For training, a crop of
    the model's size is cut from both.

    Args:
        config: of ``full_data_config``.
        training: cut crops.
        augmentation: of training images: "none" (the central crop), "flip", "crop-flip" (a crop at a random
            place) or "random-resized-crop" (after a random resize by 0.5 to 2; what lies beyond the image is
            ignored); and color_jitter.

    Raises:
        UserError: an augmentation that masks can't follow.
    """

    def __init__(
        self, config: dict[str, Any], *, training: bool = False, augmentation: Augmentation = NO_AUGMENTATION
    ) -> None:
        if augmentation.kind not in _AUGMENTATIONS or augmentation.random_erasing or augmentation.crop_scale:
            raise UserError(
                f"segmentation takes the augmentations {_AUGMENTATIONS} and color_jitter, without crop_scale "
                f"and random_erasing, got {augmentation.kind!r}, crop_scale={augmentation.crop_scale}, "
                f"random_erasing={augmentation.random_erasing}"
            )
        channels, *size = config["input_size"]
        self.size: tuple[int, int] = (size[0], size[1])
        self._interpolation = InterpolationMode(config["interpolation"])
        self._random_scale = augmentation.kind == "random-resized-crop"
        self._crop = v2.Compose([*self._crops(config["mean"], augmentation)]) if training else None
        self._normalise = v2.Compose(
            [
                *([v2.Grayscale()] if channels == 1 else []),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config["mean"], config["std"]),
            ]
        )

    def _crops(self, mean: Sequence[float], augmentation: Augmentation) -> Iterator[Any]:
        if augmentation.kind in ("none", "flip"):
            yield v2.CenterCrop(self.size)
        else:
            beyond = [round(255 * value) for value in mean] * (3 // len(mean))
            fill: Any = {Image.Image: tuple(beyond), tv_tensors.Mask: IGNORED}
            yield v2.RandomCrop(self.size, pad_if_needed=True, fill=fill)
        if augmentation.kind != "none":
            yield v2.RandomHorizontalFlip()
        if augmentation.color_jitter:
            yield v2.ColorJitter(*[augmentation.color_jitter] * 3)

    def image(self, image: Image.Image) -> Tensor:
        """Return an image to predict, (C, H, W), that covers the model's size."""
        return cast(Tensor, self._normalise(self._resized(image)))

    def __call__(self, image: Image.Image, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return an image (C, H, W) and labels, of the same size in training, else (h, w) as given."""
        if self._crop is None:
            return self.image(image), labels
        scale = float(torch.empty(()).uniform_(*_SCALES)) if self._random_scale else 1.0
        image = self._resized(image, scale)
        image, mask = self._crop(image, tv_tensors.Mask(_nearest(labels, (image.height, image.width))))
        return cast(Tensor, self._normalise(image)), cast(Tensor, mask).as_subclass(Tensor)

    def _resized(self, image: Image.Image, scale: float = 1.0) -> Image.Image:
        height, width = self.size
        scale *= max(height / image.height, width / image.width)
        size = [round(image.height * scale), round(image.width * scale)]
        return cast(Image.Image, v2.functional.resize(image, size, interpolation=self._interpolation))


def _nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return labels (H, W) resized as Pillow does, each from the pixel that is nearest to its centre.

    torchvision resizes masks by the pixel above and to the left.
    """
    return F.interpolate(labels[None, None].double(), size, mode="nearest-exact")[0, 0].long()


class MaskedImages:
    """A data set of (image (C, H, W), labels (H, W), int64, IGNORED ones among them), read from files.

    Args:
        files: pairs of an image's path and its mask's.
        prepare: makes the tensors of an image and its labels (h, w).
        num_classes: labels must be below.
        reduce_zero_label: 0 in masks is no class, and all others are one less.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Path]],
        prepare: Callable[[Image.Image, Tensor], tuple[Tensor, Tensor]],
        num_classes: int,
        reduce_zero_label: bool = False,
    ) -> None:
        self.files = list(files)
        self._prepare = prepare
        self._num_classes = num_classes
        self._reduce_zero_label = reduce_zero_label

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._prepare(*self.read(index))

    def read(self, index: int) -> tuple[Image.Image, Tensor]:
        """Return an image and its labels as the files have them.

        Raises:
            UserError: one can't be read, their sizes differ, or a label is out of range.
        """
        image_path, mask_path = self.files[index]
        image, labels = open_image(image_path), open_mask(mask_path, self._reduce_zero_label)
        if labels.shape != (image.height, image.width):
            raise UserError(
                f"{printable(mask_path)} must be of its image's size, {image.width}x{image.height} pixels, "
                f"got {labels.shape[1]}x{labels.shape[0]}"
            )
        known = labels[labels != IGNORED]
        wrong = known[(known < 0) | (known >= self._num_classes)]
        if len(wrong):
            raise UserError(
                f"{printable(mask_path)} has pixels of class {int(wrong[0])}, but there are "
                f"{self._num_classes} classes; expected 0 to {self._num_classes - 1}, and 255 for no label"
            )
        return image, labels


def open_mask(path: Path, reduce_zero_label: bool = False) -> Tensor:
    """Return the labels (H, W), int64, in a mask: pixels of 255 become IGNORED.

    Args:
        path: a file of one channel (gray, or indices of a palette) that holds the numbers of classes.
        reduce_zero_label: 0 becomes IGNORED too, and all others one less.

    Raises:
        UserError: no such file, no image, or one of several channels.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            numbers = np.array(image)
    except OSError as error:
        raise UserError(f"{printable(path)} can't be read as a mask: {printable(str(error))}") from error
    if numbers.ndim != 2 or numbers.dtype.kind not in "biu":
        raise UserError(
            f"{printable(path)} must have one channel of integers, the numbers of classes, got "
            f"{numbers.dtype} of shape {numbers.shape}"
        )
    labels = torch.from_numpy(numbers.astype(np.int64))
    ignored = (labels == _UNLABELLED) | ((labels == 0) & reduce_zero_label)
    return (labels - int(reduce_zero_label)).masked_fill(ignored, IGNORED)


def mask_splits(
    root: str | Path,
    config: dict[str, Any],
    seed: int,
    *,
    num_train: int | None = None,
    validation_share: float = 0.2,
    augmentation: Augmentation = NO_AUGMENTATION,
    reduce_zero_label: bool = False,
) -> Splits:
    """Open the images and masks of a folder with ``train/``, and ``val/`` and ``test/`` if there are any.

    Each has ``images/`` and ``masks/``, with a mask for every image: the same path but for the ending
    (``.png``, ...). ``classes.txt`` in ``root`` names the classes, one a line; without it they are numbered,
    up to the largest number in the training masks. Without ``val/``, a share of ``train/`` is split off.

    Args:
        root: the folder.
        config: of ``full_data_config``.
        seed: of the split.
        num_train: training images to use, chosen at random; None for all.
        validation_share: of the training images, where there is no ``val/``.
        augmentation: of the training images; see Preparation.
        reduce_zero_label: see MaskedImages.

    Raises:
        UserError: folders or masks that are missing, too few images, masks without classes, or more
            classes than the numbers below 255 tell apart.
    """
    root = Path(root)
    found = {split: _pairs(root, split) for split in SPLIT_FOLDERS}
    train, validation, test = found["train"], found["validation"], found["test"]
    if train is None:
        raise UserError(
            f"data must be a folder with train/images and train/masks for segmentation, got {printable(root)}"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    if validation is None:
        held_out = round(validation_share * len(train))
        validation, order = [train[index] for index in order[:held_out]], order[held_out:]
    num_train = len(order) if num_train is None else num_train
    if not validation or not 1 <= num_train <= len(order):
        raise UserError(
            f"{printable(root)} leaves {len(order)} images to train on and {len(validation)} for validation: "
            f"there must be one of each at least, and train_images at most {len(order)}, got {num_train}"
        )
    class_names = _class_names(root, train, reduce_zero_label)
    learning = Preparation(config, training=True, augmentation=augmentation)
    options: dict[str, Any] = {"num_classes": len(class_names), "reduce_zero_label": reduce_zero_label}
    parts = {
        "train": MaskedImages([train[index] for index in order[:num_train]], learning, **options),
        "validation": MaskedImages(validation, Preparation(config), **options),
        "test": None if test is None else MaskedImages(test, Preparation(config), **options),
    }
    files = {
        name: [path.relative_to(root).as_posix() for pair in part.files for path in pair]
        for name, part in parts.items()
        if part is not None
    }
    return Splits(
        class_names, cast(Any, parts["train"]), cast(Any, parts["validation"]), parts["test"], files
    )


def split_data(
    root: str | Path, config: dict[str, Any], num_classes: int, split: str | None, reduce_zero_label: bool
) -> MaskedImages:
    """Open one split of such a folder to evaluate a model on; None for "test", or else "validation".

    Raises:
        UserError: no such split.
    """
    chosen = ("test", "validation") if split is None else (split,)
    pairs = next((pairs for name in chosen if (pairs := _pairs(Path(root), name)) is not None), None)
    if pairs is None:
        raise UserError(f"{printable(root)} has no images/ and masks/ in a folder of the split {chosen[0]!r}")
    return MaskedImages(pairs, Preparation(config), num_classes, reduce_zero_label)


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]] | None:
    """Return the images of a split with their masks, sorted; None if the split isn't there."""
    folder = next((root / name for name in SPLIT_FOLDERS[split] if (root / name / "images").is_dir()), None)
    if folder is None:
        return None
    masks, images = _by_name(folder / "masks"), _by_name(folder / "images")
    missing = [printable(path) for key, path in images.items() if key not in masks]
    if missing or not images:
        what = f"{len(missing)} have none: {', '.join(missing[:3])}" if missing else "there are no images"
        raise UserError(f"{printable(folder)} must have a mask in masks/ for every image in images/; {what}")
    return [(path, masks[key]) for key, path in images.items()]


def _by_name(folder: Path) -> dict[str, Path]:
    """Return the images in a folder, sorted, by their paths within it without the ending."""
    found: dict[str, Path] = {}
    for path in images_in(folder):
        other = found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
        if other is not path:
            raise UserError(
                f"{printable(path)} and {printable(other)} differ in their endings only: an image and its "
                "mask belong together by the rest of the name, so keep one of them"
            )
    return found


def _class_names(root: Path, train: list[tuple[Path, Path]], reduce_zero_label: bool) -> tuple[str, ...]:
    listed = root / CLASSES_NAME
    if listed.is_file():
        names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        largest = max(int(open_mask(mask, reduce_zero_label).max()) for _, mask in train)
        names = [str(number) for number in range(largest + 1)]
        if not names:
            raise UserError(f"the masks of {printable(root)} for training give no pixel a class")
    if not names or len(set(names)) < len(names):
        raise UserError(f"{printable(listed)} must name each class once, one a line, got {names}")
    most = _UNLABELLED - int(reduce_zero_label)
    if len(names) > most:
        raise UserError(
            f"{printable(root)} has {len(names)} classes, and {_UNLABELLED} in a mask is no label, which "
            f"leaves {most}: merge the rarest"
        )
    return tuple(names)
