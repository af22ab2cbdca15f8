"""Transforms of images: from a PIL image to the normalised tensor that a model takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import CenterCropOrPad, RandomCropOrPad
from torchvision import transforms

from ..data import eval_transform
from .errors import UserError, check_types

__all__ = ["AUGMENTATIONS", "NO_AUGMENTATION", "Augmentation", "eval_transform", "train_transform"]

AUGMENTATIONS = ("none", "flip", "crop-flip", "random-resized-crop", "rand-augment", "auto-augment")

# RandAugment with two operations of magnitude 9 of 31, and AutoAugment's policy for ImageNet: torchvision's,
# because Pillow refuses some of what timm's ask for (pictures of no bits).
_POLICIES = {"rand-augment": transforms.RandAugment, "auto-augment": transforms.AutoAugment}
_RESIZED_CROPS = ("random-resized-crop", *_POLICIES)
_SMALLEST_CROP = 0.08

_RANDOM_CROPS = {transforms.CenterCrop: transforms.RandomCrop, CenterCropOrPad: RandomCropOrPad}


@dataclass(frozen=True)
class Augmentation:
    """The random changes of training images.

    Attributes:
        kind: "none"; "flip" (left and right, half the time); "crop-flip" (a crop of the size that the model
            takes, at a random place of the resized image, and flip); "random-resized-crop" (a crop of random
            size and shape, and flip); "rand-augment", "auto-augment" (the same, then torchvision's policy).
        crop_scale: the smallest share of the image's area that a crop of random size has; None for 0.08.
        color_jitter: largest relative change of brightness, contrast and saturation.
        random_erasing: probability that a random rectangle is overwritten with noise.

    Raises:
        UserError: an unknown kind, a value out of range, or one that the kind has no use for.
    """

    kind: str = "none"
    crop_scale: float | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        if self.kind not in AUGMENTATIONS:
            raise UserError(f"augmentation must be one of {AUGMENTATIONS}, got {self.kind!r}")
        if self.crop_scale is not None and self.kind not in _RESIZED_CROPS:
            raise UserError(f"crop_scale needs an augmentation of {_RESIZED_CROPS}, got {self.kind!r}")
        if self.crop_scale is not None and not 0 < self.crop_scale <= 1:
            raise UserError(f"crop_scale must be in (0, 1], got {self.crop_scale}")
        for name in ("color_jitter", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.color_jitter and self.kind in _POLICIES:
            raise UserError(f"color_jitter can't be combined with {self.kind!r}, which changes colors itself")

    @property
    def random(self) -> bool:
        """Whether an image differs from one epoch to the next."""
        return self.kind != "none" or self.color_jitter > 0 or self.random_erasing > 0


NO_AUGMENTATION = Augmentation()


def train_transform(config: dict[str, Any], chosen: Augmentation) -> Any:
    """Return ``eval_transform`` with an augmentation."""
    if chosen.kind in _RESIZED_CROPS:
        jitter: Any = chosen.color_jitter or None  # timm takes None, which its annotation lacks
        crop, flip, *rest = create_transform(
            **config,
            is_training=True,
            scale=(_SMALLEST_CROP if chosen.crop_scale is None else chosen.crop_scale, 1.0),
            color_jitter=jitter,
            re_prob=chosen.random_erasing,
            re_mode="pixel",
        ).transforms
        policy = [_POLICIES[chosen.kind]()] if chosen.kind in _POLICIES else []
        return transforms.Compose([crop, flip, *policy, *rest])
    steps = eval_transform(config).transforms
    crop = next(i for i, step in enumerate(steps) if type(step) in _RANDOM_CROPS)
    random_crop = _RANDOM_CROPS[type(steps[crop])](config["input_size"][-2:])
    changes = [
        random_crop if chosen.kind == "crop-flip" else steps[crop],
        *([transforms.RandomHorizontalFlip()] if chosen.kind != "none" else []),
        *([transforms.ColorJitter(*[chosen.color_jitter] * 3)] if chosen.color_jitter else []),
    ]
    erasing = RandomErasing(chosen.random_erasing, mode="pixel", device="cpu")
    last = [erasing] if chosen.random_erasing else []
    return transforms.Compose([*steps[:crop], *changes, *steps[crop + 1 :], *last])
