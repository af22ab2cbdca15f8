"""Predicted labels as pictures: masks, and overlays on the image."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...training.errors import UserError
from .data import Preparation
from .decoders import resized
from .model import Segmenter
from .windows import sliding_window

__all__ = ["mask_picture", "overlay", "palette", "predict_labels"]

_GOLDEN = (5**0.5 - 1) / 2


@torch.inference_mode()
def predict_labels(
    model: Segmenter, image: Image.Image, prepare: Preparation, *, batch_size: int = 8
) -> Tensor:
    """Return the class of each pixel of an image, (height, width), int64, on the CPU.

    Args:
        model: in eval mode.
        image: of any size, RGB.
        prepare: how images are prepared, of the model's size.
        batch_size: windows that the model gets at once.

    Raises:
        UserError: logits that are NaN.
    """
    tensor = prepare.image(image)[None].to(next(model.parameters()).device)
    logits = sliding_window(model, tensor, prepare.size, batch_size=batch_size).float()
    # Class by class: all logits of a photograph of 24 million pixels would take 14 GB for 150 classes.
    highest = torch.full((image.height, image.width), -torch.inf, device=logits.device)
    labels = torch.zeros_like(highest, dtype=torch.int64)
    for index, one in enumerate(logits.split(1, dim=1)):
        values = resized(one, highest.shape)[0, 0]
        labels[values > highest] = index
        highest = torch.maximum(highest, values)
    if highest.isnan().any():
        raise UserError("the model gives NaN for some pixels, which names no class")
    return labels.cpu()


def palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Return a colour for each class: the first is black, the others are bright and far apart in hue."""
    hues = (index * _GOLDEN % 1 for index in range(1, num_classes))
    bright = (colorsys.hsv_to_rgb(hue, 0.85, 1.0) for hue in hues)
    return [(0, 0, 0), *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in bright)]


def mask_picture(labels: Tensor, colours: list[tuple[int, int, int]]) -> Image.Image:
    """Return labels (H, W) as a picture whose pixels are the numbers themselves, shown in colours.

    A PNG of it can be a mask to train on. More than 256 numbers become 16-bit gray.
    """
    if len(colours) > 256:
        return Image.fromarray(labels.numpy().astype(np.uint16))
    picture = Image.fromarray(labels.numpy().astype(np.uint8))
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def overlay(image: Image.Image, labels: Tensor, colours: list[tuple[int, int, int]]) -> Image.Image:
    """Return an RGB image blended with the colours of its labels (H, W), half of each."""
    painted = np.asarray(colours, dtype=np.uint8)[labels.numpy()]
    return Image.blend(image.convert("RGB"), Image.fromarray(painted), 0.5)
