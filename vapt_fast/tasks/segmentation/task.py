"""Segmentation as the training's runs know it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ...config import PromptConfig
from ...training.errors import DivergedError, UserError
from ...training.evaluation import Score
from ...training.images import check_images
from ...training.loader import LabelledImages, make_loader
from ...training.loss import IGNORED, cross_entropy
from ...training.methods import METHODS, build_model
from ...training.options import RunOptions
from ...training.splits import Splits
from ...training.trainer import autocast
from .data import MaskedImages, mask_splits
from .decoders import resized
from .metric import PixelEvaluation, confusion_matrix
from .model import Segmenter
from .windows import sliding_window

__all__ = ["TASK", "evaluate_pixels"]


class Segmentation:
    """A class for each pixel; see Task."""

    def splits(self, options: RunOptions, config: dict[str, Any], seed: int) -> Splits:
        """Open a folder of images and masks."""
        if options.data == "digits":
            raise UserError(
                "data must be a folder with train/images and train/masks for segmentation, got 'digits'"
            )
        for name, default in (("cache", False), ("crop_mode", None), ("crop_pct", None)):
            if getattr(options, name) != default:
                raise UserError(
                    f"{name} is for classification: windows slide over images of any size; leave it out"
                )
        return mask_splits(
            options.data,
            config,
            seed,
            num_train=options.train_images,
            validation_share=options.validation_share,
            augmentation=options.augmentation,
            reduce_zero_label=options.reduce_zero_label,
        )

    def check_data(self, splits: Splits, workers: int, progress: Callable[[int, int], None] | None) -> None:
        """Read every image and mask once."""
        parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
        places = [(part, index) for part in parts for index in range(len(part))]
        check_images(places, workers, progress, _read)

    def make_model(self, options: RunOptions, num_classes: int, prompts: PromptConfig) -> nn.Module:
        """Make a Segmenter."""
        if METHODS[options.method].prompts is None:
            raise UserError(
                f"segmentation is for a frozen backbone, and the method {options.method!r} trains it"
            )
        make = partial(Segmenter, decoder=options.decoder, num_classes=num_classes)
        return build_model(
            options.method, options.backbone, num_classes, prompts=prompts, make=make, **options.model
        )

    def evaluate(self, model: nn.Module, dataset: LabelledImages, **options: Any) -> Score:
        """Return the accuracy of the pixels, the loss and the mean IoU; a loss of NaN for a model of NaN."""
        size = cast(Segmenter, model).num_classes
        try:
            found = evaluate_pixels(model, dataset, [str(index) for index in range(size)], **options)
        except DivergedError:
            return Score(0.0, math.nan, 0.0)
        return Score(found.accuracy, found.loss, found.mean_iou)

    def metadata(self, options: RunOptions) -> dict[str, Any]:
        """Return how the masks are numbered."""
        return {"reduce_zero_label": options.reduce_zero_label}


TASK = Segmentation()


def _read(place: tuple[MaskedImages, int]) -> None:
    dataset, index = place
    dataset.read(index)


@torch.no_grad()
def evaluate_pixels(
    model: nn.Module,
    dataset: LabelledImages,
    class_names: list[str],
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    amp: str | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PixelEvaluation:
    """Count the predictions of a model for all pixels of a data set.

    Windows of the model's size slide over each image; their mean logits are resized to the labels' size.

    Args:
        model: a Segmenter on ``device``, or with ``size`` any other model that gives logits (B, C, h, w); it
            is left in eval mode.
        dataset: of (image (C, H, W), labels (h, w)), of any sizes that a window fits in.
        class_names: of the model, by index.
        size: height and width of the windows; None for those that a Segmenter takes.
        batch_size: windows a step.
        device, amp, workers: as for vapt_fast.training.evaluate.
        progress: told how many images are done, of how many.

    Raises:
        DivergedError: the model gives NaN or infinite numbers for pixels that have a label.
        UserError: an image or mask that can't be used.
    """
    device = torch.device(device)
    size = cast(Segmenter, model).pretrained_cfg["input_size"][-2:] if size is None else size
    model.eval()
    confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)
    loss, num_pixels = 0.0, 0
    loader = make_loader(dataset, 1, workers=workers, device=device)
    for done, (images, labels) in enumerate(loader, start=1):
        with autocast(device, amp):
            logits = sliding_window(model, images, size, batch_size=batch_size)
        logits = resized(logits.float(), labels.shape[-2:])
        pixels = int((labels != IGNORED).sum())
        loss += cross_entropy(logits, labels).item() * pixels
        if math.isnan(loss):
            raise DivergedError("the model gives NaN or infinities for some pixels, which name no class")
        num_pixels += pixels
        confusion += confusion_matrix(logits.argmax(1), labels, len(class_names)).cpu()
        if progress is not None:
            progress(done, len(dataset))
    if not num_pixels:
        raise UserError("no pixel of the masks has a label: there is nothing to evaluate")
    return PixelEvaluation(tuple(class_names), confusion, loss / num_pixels)
