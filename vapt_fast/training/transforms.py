"""Images as a model wants them: from a file or a PIL image to a normalised tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from timm.data import resolve_data_config
from torchvision import transforms

from .. import data
from .errors import UserError

__all__ = ["AUGMENTATIONS", "data_config", "eval_transform", "open_image", "train_transform"]

AUGMENTATIONS = ("none", "crop-flip")


def data_config(pretrained_cfg: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """How images must be prepared for a model: input_size, mean, std, interpolation, crop_pct, crop_mode.

    Args:
        pretrained_cfg: of the model.
        **changes: any of the names above, to differ from the model's; None leaves the model's.
    """
    config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    return config | {name: value for name, value in changes.items() if value is not None}


def eval_transform(config: dict[str, Any]) -> Any:
    """From a PIL image to a normalised tensor (3, H, W), with nothing random in it."""
    return data.eval_transform(config)


def train_transform(config: dict[str, Any], augmentation: str) -> Any:
    """As ``eval_transform`` for "none"; "crop-flip" crops at a random place and flips at random.

    Raises:
        UserError: an unknown augmentation.
    """
    if augmentation not in AUGMENTATIONS:
        raise UserError(f"augmentation must be one of {AUGMENTATIONS}, got {augmentation!r}")
    fixed = eval_transform(config)
    if augmentation == "none":
        return fixed
    size = config["input_size"][-2:]
    steps = []
    for step in fixed.transforms:
        crop = isinstance(step, transforms.CenterCrop)
        steps += [transforms.RandomCrop(size), transforms.RandomHorizontalFlip()] if crop else [step]
    return transforms.Compose(steps)


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, as RGB.

    Raises:
        UserError: the file is missing, is no image or is damaged; the message names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise for damaged files
        raise UserError(f"{path} can't be read as an image: {error}") from error
