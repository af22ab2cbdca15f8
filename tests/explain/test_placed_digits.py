"""Digits at random places: the masks are those of the digit that is named, and of nothing else."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from vapt_fast.demo.digits import digit_images
from vapt_fast.demo.placed_digits import placed_digits


def pixels_of(data):
    return torch.from_numpy(np.stack([np.asarray(image.convert("L")) for image in data.images]))


@pytest.mark.parametrize("others", [range(5), ()])
def test_masks_are_of_the_digit_to_name(others):
    data = placed_digits(40, others=others, seed=1)
    pixels = pixels_of(data)
    assert data.masks.shape == pixels.shape == (40, 64, 64)
    assert pixels[data.masks].min() >= 100
    assert set(data.labels) == set(range(5))
    # Outside of the mask the other digit is left, in another quarter.
    quarters = data.masks.unflatten(1, (2, 32)).unflatten(3, (2, 32)).sum((2, 4)).flatten(1)
    ink = (pixels >= 100).unflatten(1, (2, 32)).unflatten(3, (2, 32)).sum((2, 4)).flatten(1)
    assert ((quarters > 0).sum(1) == 1).all()
    assert ((ink > 0).sum(1) == (2 if others else 1)).all()
    assert torch.equal(quarters[quarters > 0], ink[quarters > 0])


def test_labels_are_of_the_digit_in_the_mask():
    """A digit of a class is nearer to the mean digit of its own class, at least most are."""
    data = placed_digits(60, digits=(0, 1), others=(7,), seed=3)
    images, shown = digit_images((0, 1))
    filled = [np.asarray(image.convert("L"), float)[2:6, 3:5].mean() for image in images]
    level = {
        digit: np.mean([f for f, s in zip(filled, shown, strict=True) if s == digit]) for digit in (0, 1)
    }
    assert level[1] > 2 * level[0]  # a one is full in the middle, a zero empty
    inner = []
    for mask in data.masks:
        rows, columns = (mask.any(side).nonzero()[[0, -1]].flatten().tolist() for side in (1, 0))
        inner.append(mask[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1][9:17].float().mean().item())
    by_class = [
        np.mean([i for i, label in zip(inner, data.labels, strict=True) if label == k]) for k in (0, 1)
    ]
    assert by_class[1] > by_class[0] + 0.1


def test_the_same_seed_gives_the_same_pictures():
    first, same, other = (pixels_of(placed_digits(5, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_parts_share_no_digit():
    """Digits of parts that are one image each look the same in all pictures of a part."""
    first, last = (placed_digits(6, digits=(5,), others=(0,), part=part) for part in ((0, 0.0056), (0.99, 1)))
    images = digit_images((5,))[0]
    assert round(0.0056 * len(images)) == 1
    sums = [{int(mask.sum()) for mask in data.masks} for data in (first, last)]
    assert all(len(found) <= 7 for found in sums)  # a size each
    assert not torch.equal(pixels_of(first), pixels_of(last))
