"""Localisation scores: how well maps of importance find an object, each with its chance level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import integer
from ..modules import evaluating
from .grad_cam import check_targets, normalise

__all__ = ["Score", "deletion", "energy", "insertion", "mask_iou", "pointing_game", "to_pixels"]


class Score(NamedTuple):
    """A score of each image, and what a map that knows nothing would have: both (B,), from 0 to 1."""

    value: Tensor
    chance: Tensor


def to_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (B, H, W) at the (height, width) of an image, bilinear, each scaled from 0 to 1.

    These are the pixels that pytorch-grad-cam gives (OpenCV's bilinear interpolation).
    """
    return normalise(F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", align_corners=False)[:, 0])


def pointing_game(maps: Tensor, masks: Tensor) -> Score:
    """Return whether the maximum of each map is within its mask (Zhang et al. 2016, without tolerance).

    Args:
        maps: (B, H, W), floating.
        masks: (B, H, W), bool, each with pixels inside.

    Returns:
        1 or 0 for each image; the share of the maxima that are inside where there are several. The chance
        level is the mask's share of the area.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, an empty mask, values that are not finite.
    """
    maps, inside = _checked(maps, masks)
    maxima = (maps == maps.amax(1, keepdim=True)).to(maps.dtype)
    return Score((maxima * inside).sum(1) / maxima.sum(1), inside.mean(1))


def energy(maps: Tensor, masks: Tensor) -> Score:
    """Return the share of each map that is within its mask (energy-based pointing game, Wang et al. 2020).

    Args:
        maps: (B, H, W), floating, nowhere negative. A map of zeros has the chance level.
        masks: (B, H, W), bool, each with pixels inside.

    Returns:
        The shares. The chance level is the mask's share of the area.

    Raises:
        TypeError, ValueError: as for ``pointing_game``, or a map is negative somewhere.
    """
    maps, inside = _checked(maps, masks)
    if maps.amin() < 0:
        raise ValueError(f"maps must not be negative, got {maps.amin().item():g}; take maps.relu()")
    total, chance = maps.sum(1), inside.mean(1)
    return Score(torch.where(total > 0, (maps * inside).sum(1) / total, chance), chance)


def mask_iou(maps: Tensor, masks: Tensor) -> Score:
    """Return the intersection over union of each mask and as many of the map's highest pixels.

    Args:
        maps: (B, H, W), floating.
        masks: (B, H, W), bool, each with pixels inside.

    Returns:
        The IoUs; of pixels that tie at the threshold, each counts in part. The chance level is that of a
        constant map, a / (2 - a) for a mask with the share a of the area.

    Raises:
        TypeError, ValueError: as for ``pointing_game``.
    """
    maps, inside = _checked(maps, masks)
    size = inside.sum(1)
    ordered = maps.sort(1, descending=True).values
    threshold = ordered.gather(1, size.long().unsqueeze(1) - 1)
    above, tied = (maps > threshold).to(maps.dtype), (maps == threshold).to(maps.dtype)
    share = (size - above.sum(1)) / tied.sum(1)
    both = (above * inside).sum(1) + share * (tied * inside).sum(1)
    area = inside.mean(1)
    return Score(both / (2 * size - both), area / (2 - area))


def deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: int | Sequence[int] | Tensor | None = None,
    *,
    steps: int = 16,
    fill: Tensor | float | None = None,
    num_random: int = 1,
    seed: int = 0,
) -> Score:
    """Return the area under the probability of a class as cells are removed, highest first (RISE, 2018).

    Lower is better: what matters goes first. Images without some cells are unlike any in training, so only
    compare with the chance level and with other maps of the same model.

    Args:
        model: any classifier, images (B, C, height, width) to logits (B, classes); run in eval mode.
        images: (B, C, height, width).
        maps: (B, H, W), whose cells divide the images: H divides height, W divides width.
        targets: the class, one for all images or one each; None for the class that the model predicts.
        steps: parts that the cells are removed in, at most one a cell; the model runs ``steps`` + 2 times.
        fill: what takes the place of a removed cell, a number or a tensor that broadcasts to the images; None
            for each image's own mean colour.
        num_random: random orders whose mean is the chance level, each as dear as the score; 0 gives NaN.
        seed: of the random orders, also of those of cells that tie.

    Returns:
        The areas by the trapezoidal rule, 0 to 1, and the mean of random orders.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, no such class, steps below 1.
    """
    return _area(model, images, maps, targets, False, steps, fill, num_random, seed)


def insertion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: int | Sequence[int] | Tensor | None = None,
    **options: Any,
) -> Score:
    """Return the area under the probability of a class as cells appear on ``fill``, highest first.

    Higher is better. All else, ``options`` too, is as for ``deletion``.
    """
    return _area(model, images, maps, targets, True, **options)


@torch.no_grad()
def _area(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: int | Sequence[int] | Tensor | None,
    insert: bool,
    steps: int = 16,
    fill: Tensor | float | None = None,
    num_random: int = 1,
    seed: int = 0,
) -> Score:
    cells = _checked_cells(images, maps)
    steps, num_random = integer("steps", steps, minimum=1), integer("num_random", num_random, minimum=0)
    generator = torch.Generator().manual_seed(integer("seed", seed))
    if fill is None:
        fill = images.mean((2, 3), keepdim=True)
    background = torch.as_tensor(fill, dtype=images.dtype, device=images.device).expand_as(images)
    before, after = (background, images) if insert else (images, background)
    grid, steps = maps.shape[1:], min(steps, cells)
    counts = [round(step * cells / steps) for step in range(steps + 1)]
    shares = torch.tensor(counts, dtype=torch.float64, device=maps.device) / cells

    def area(values: Tensor, probability: Callable[[Tensor], Tensor]) -> Tensor:
        order = _descending(values, generator)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(cells, device=order.device).expand_as(order)
        )
        points = []
        for count in counts:
            gone = (rank < count).unflatten(1, grid).unsqueeze(1).to(images.dtype)
            gone = F.interpolate(gone, size=images.shape[2:], mode="nearest-exact") > 0.5
            points.append(probability(torch.where(gone, after, before)))
        return torch.trapezoid(torch.stack(points), shares.to(points[0]), dim=0)

    with evaluating(model):
        indices = check_targets(targets, model(images)).unsqueeze(1)

        def probability(changed: Tensor) -> Tensor:
            logits = model(changed)
            return (
                logits.to(torch.promote_types(logits.dtype, torch.float32))
                .softmax(1)
                .gather(1, indices)[:, 0]
            )

        value = area(maps.flatten(1), probability)
        random = [area(torch.zeros_like(maps).flatten(1), probability) for _ in range(num_random)]
    return Score(value, torch.stack(random).mean(0) if random else torch.full_like(value, torch.nan))


def _descending(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return the order (B, n) of values (B, n) from the highest down, ties in random order."""
    shuffled = torch.rand(values.shape, generator=generator, device="cpu").argsort(1).to(values.device)
    ranked = values.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, ranked)


def _checked(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps and masks as (B, pixels) in the maps' dtype, float32 at least."""
    _check_maps(maps)
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be bool, got {masks.dtype}; compare with a threshold first")
    if masks.shape != maps.shape:
        raise ValueError(
            f"masks must be of the maps' shape {tuple(maps.shape)}, got {tuple(masks.shape)}; to_pixels "
            "brings maps to the size of masks"
        )
    if not masks.flatten(1).any(1).all():
        raise ValueError("masks must have pixels inside, got an empty one; leave such images out")
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return maps.to(dtype).flatten(1), masks.to(dtype).flatten(1)


def _check_maps(maps: Tensor) -> None:
    if not maps.is_floating_point():
        raise TypeError(f"maps must be of a floating dtype, got {maps.dtype}")
    if maps.ndim != 3 or maps.numel() == 0:
        raise ValueError(f"maps must be (B, H, W), none of them 0, got {tuple(maps.shape)}")
    if not maps.isfinite().all():
        raise ValueError("maps must be finite, got infinities or NaN")


def _checked_cells(images: Tensor, maps: Tensor) -> int:
    """Return the number of cells of a map, if they divide the images."""
    _check_maps(maps)
    (batch, *grid), sides = maps.shape, images.shape[2:]
    if images.ndim != 4 or len(images) != batch or any(side % n for side, n in zip(sides, grid, strict=True)):
        raise ValueError(
            f"maps must be (B, H, W) with H and W that divide the images' height and width, got "
            f"{tuple(maps.shape)} for images {tuple(images.shape)}"
        )
    return grid[0] * grid[1]
