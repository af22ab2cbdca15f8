"""How images are prepared for a model: timm's data config, checked, and the transform it describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.data import create_transform, resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from .arguments import choice, integer, plain, real
from .pixels import as_seen

__all__ = ["DATA_KEYS", "NORMALIZATIONS", "eval_transform", "full_data_config"]

# timm's names, which its create_transform takes as keywords
DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
NORMALIZATIONS: dict[str, dict[str, list[float]]] = {
    "model": {},
    "imagenet": {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)},
    "none": {"mean": [0.0] * 3, "std": [1.0] * 3},
}
"""By name, the mean and the standard deviation that a data config is given; "model" keeps its own."""


def full_data_config(
    pretrained_cfg: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return all of DATA_KEYS, as JSON has them: ``given``, else ``pretrained_cfg``, else timm's defaults.

    Args:
        pretrained_cfg: timm's description of a model, with the ``input_size`` that it takes.
        given: any of DATA_KEYS, to differ from it.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: an unknown key, a value out of range, or another ``input_size`` than the model's.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise TypeError(f"data_config must be a dict, got {type(given).__name__}")
    unknown = sorted(str(key) for key in given if key not in DATA_KEYS)
    if unknown:
        raise ValueError(f"data_config has the unknown keys {unknown}, expected some of {DATA_KEYS}")
    config = resolve_data_config(pretrained_cfg=dict(pretrained_cfg))
    size = _size(config["input_size"])
    mean, std = (_each_channel(config[name], size[0]) for name in ("mean", "std"))
    config |= {"mean": mean, "std": std}
    config |= {key: plain(value) for key, value in given.items() if value is not None}
    if _size(config["input_size"]) != size:
        raise ValueError(f"data_config input_size must be the model's {size}, got {config['input_size']}")
    return check_data_config({key: config[key] for key in DATA_KEYS})


def check_data_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with lists for sequences, if all its values are in range.

    Raises:
        TypeError, ValueError: which key, what was given, what is expected.
    """
    size = _size(config["input_size"])
    checked: dict[str, Any] = {"input_size": size}
    for name in ("mean", "std"):
        checked[name] = _numbers(name, config[name], size[0])
    if min(checked["std"]) <= 0:
        raise ValueError(f"data_config std must be positive, got {checked['std']}")
    for name, choices in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        checked[name] = choice(f"data_config {name}", config[name], choices)
    checked["crop_pct"] = real("data_config crop_pct", config["crop_pct"])
    if not 0 < checked["crop_pct"] < math.inf:
        raise ValueError(f"data_config crop_pct must be positive, got {checked['crop_pct']}")
    return {key: checked[key] for key in DATA_KEYS}


def eval_transform(config: Mapping[str, Any]) -> transforms.Compose:
    """Return the transform of a PIL image to a normalised tensor (in_chans, H, W); nothing in it is random.

    Images are taken as a person sees them, see vapt_fast.pixels. For a model of one channel they become grey.

    Args:
        config: of ``full_data_config``.

    Raises:
        ValueError: PIL has no images of that many channels.
    """
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(
            f"the model takes images of {channels} channels, which PIL does not have; expected 1 or 3. "
            "Prepare them yourself: resize, then subtract the data config's mean and divide by its std"
        )
    steps = create_transform(**{**config, "input_size": tuple(config["input_size"])}).transforms
    grey = [transforms.Grayscale()] if channels == 1 else []
    return transforms.Compose([transforms.Lambda(as_seen), *grey, *steps])


def _size(value: Any) -> list[int]:
    value = plain(value)
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise TypeError(f"data_config input_size must be (channels, height, width), got {value!r}")
    return [integer("data_config input_size", side, minimum=1) for side in value]


def _numbers(name: str, value: Any, channels: int) -> list[float]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or len(value) != channels:
        raise ValueError(f"data_config {name} must be {channels} numbers, one a channel, got {value!r}")
    numbers = [real(f"data_config {name}", number) for number in value]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"data_config {name} must be finite, got {value!r}")
    return numbers


def _each_channel(values: Any, channels: int) -> list[float]:
    """A number for each channel; where there are others than the backbone was trained on, their average."""
    values = list(values)
    return values if len(values) == channels else [sum(values) / len(values)] * channels
