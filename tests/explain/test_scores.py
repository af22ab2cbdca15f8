"""Localisation scores: by hand on small maps, their chance levels by experiment."""

import pytest
import torch
from torch import nn

from vapt_fast import explain

MASK = torch.tensor([[[1, 1, 0], [1, 0, 0]]], dtype=torch.bool)
MAP_SCORES = [explain.pointing_game, explain.energy, explain.mask_iou]
CURVES = [explain.deletion, explain.insertion]


def score(function, values, mask=MASK):
    value, chance = function(torch.tensor([values], dtype=torch.float64), mask)
    assert value.shape == chance.shape == (1,)
    return value.item(), chance.item()


@pytest.mark.parametrize(
    ("function", "values", "expected"),
    [
        (explain.pointing_game, [[0, 9, 1], [2, 3, 4]], 1),
        (explain.pointing_game, [[0, 1, 9], [2, 3, 4]], 0),
        (explain.pointing_game, [[0, 1, 9], [9, 9, 4]], 1 / 3),
        (explain.energy, [[0, 1, 4], [2, 2, 1]], 3 / 10),
        (explain.energy, [[0, 0, 0], [5, 0, 0]], 1),
        (explain.energy, [[0, 0, 0], [0, 0, 0]], 1 / 2),
        (explain.mask_iou, [[9, 8, 1], [7, 2, 3]], 1),
        (explain.mask_iou, [[9, 1, 8], [7, 2, 3]], 2 / 4),
        (explain.mask_iou, [[0, 1, 9], [2, 8, 7]], 0),
        (explain.mask_iou, [[9, 5, 5], [0, 5, 5]], 1.5 / 4.5),  # two of four that tie, one of them inside
    ],
)
def test_map_scores_by_hand(function, values, expected):
    assert score(function, values)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("function", MAP_SCORES)
def test_a_constant_map_has_the_chance_level(function):
    mask = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    value, chance = function(torch.full(mask.shape, 0.5, dtype=torch.float64), mask)
    torch.testing.assert_close(value, chance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", MAP_SCORES)
def test_random_maps_have_the_chance_level(function):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, 20, 20, generator=generator) < 0.3).expand(4000, -1, -1)
    value, chance = function(torch.rand(4000, 20, 20, generator=generator), mask)
    assert value.mean().item() == pytest.approx(chance.mean().item(), abs=0.02)


@pytest.mark.parametrize("function", MAP_SCORES)
def test_the_mask_itself_is_the_best_map(function):
    assert score(function, MASK[0].tolist()) == (1, pytest.approx(score(function, [[0.0] * 3] * 2)[0]))


@pytest.mark.parametrize("function", MAP_SCORES)
@pytest.mark.parametrize(
    ("maps", "masks", "error", "message"),
    [
        (torch.ones(1, 2, 3, dtype=torch.int64), MASK, TypeError, "maps must be of a floating dtype"),
        (torch.ones(1, 2, 3), MASK.float(), TypeError, "masks must be bool"),
        (torch.ones(1, 3, 3), MASK, ValueError, "masks must be of the maps' shape"),
        (torch.ones(2, 3), MASK[0], ValueError, r"maps must be \(B, H, W\)"),
        (torch.ones(1, 2, 3), ~torch.ones_like(MASK), ValueError, "pixels inside"),
        (torch.full((1, 2, 3), torch.nan), MASK, ValueError, "finite"),
    ],
)
def test_wrong_maps_and_masks(function, maps, masks, error, message):
    with pytest.raises(error, match=message):
        function(maps, masks)


def test_energy_of_a_negative_map():
    with pytest.raises(ValueError, match="relu"):
        explain.energy(torch.tensor([[[1.0, -1, 0], [0, 0, 0]]]), MASK)


@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
def test_maps_at_the_size_of_images(size):
    found = explain.to_pixels(torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0)), size)
    assert found.shape == (3, *size)
    assert torch.allclose(found.amin((1, 2)), torch.zeros(3))
    assert torch.allclose(found.amax((1, 2)), torch.ones(3))


# ---- deletion and insertion


class Brightness(nn.Module):
    """A probability of class 1 that is the share of bright pixels in the upper left quarter."""

    def forward(self, images):
        assert not self.training
        share = images[:, 0, :4, :4].mean((1, 2)).clamp(1e-9, 1 - 1e-9)
        return torch.stack([torch.zeros_like(share), torch.logit(share)], dim=1)


def bright(batch=1, channels=3):
    return torch.ones(batch, channels, 8, 8, dtype=torch.float64)


GOOD = torch.tensor([[[4.0, 3, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "maps", "expected"),
    [
        # 1, 3/4, 1/2, 1/4, 0, then 0 for 12 more of 16 steps
        (explain.deletion, GOOD, 2 / 16),
        (explain.deletion, -GOOD, 14 / 16),
        (explain.insertion, GOOD, 14 / 16),
        (explain.insertion, -GOOD, 2 / 16),
    ],
)
def test_areas_by_hand(function, maps, expected):
    found = function(Brightness().train(), bright(), maps, 1, fill=0.0)
    assert found.value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("function", CURVES)
def test_the_chance_level_is_that_of_random_orders(function):
    found = function(Brightness(), bright(200), torch.zeros(200, 4, 4), 1, fill=0.0, num_random=2)
    assert found.value.mean().item() == pytest.approx(0.5, abs=0.03)  # ties are in random order
    assert found.chance.mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(found.value, found.chance)
    again = function(Brightness(), bright(200), torch.zeros(200, 4, 4), 1, fill=0.0, num_random=2)
    assert torch.equal(again.value, found.value)
    assert torch.equal(again.chance, found.chance)
    none = function(Brightness(), bright(2), torch.zeros(2, 4, 4), 1, num_random=0)
    assert none.chance.isnan().all()


@pytest.mark.parametrize("steps", [1, 3, 16, 40])
@pytest.mark.parametrize("function", CURVES)
def test_every_number_of_steps_goes_from_one_end_to_the_other(function, steps):
    """One step has the two ends alone, whatever the map."""
    found = function(Brightness(), bright(), GOOD, 1, fill=0.0, steps=steps)
    best = found.value.item() if function is explain.insertion else 1 - found.value.item()
    assert best == pytest.approx({1: 8 / 16, 3: 13.5 / 16, 16: 14 / 16, 40: 14 / 16}[steps], abs=1e-6)


def test_filled_with_the_mean_of_the_image():
    """A constant image stays as it is, so nothing is lost."""
    found = explain.deletion(Brightness(), 0.7 * bright(), GOOD, 1)
    assert found.value.item() == pytest.approx(0.7)


@pytest.mark.parametrize("function", CURVES)
@pytest.mark.parametrize(
    ("maps", "options", "error", "message"),
    [
        (torch.ones(1, 3, 4), {}, ValueError, "divide the images"),
        (torch.ones(2, 4, 4), {}, ValueError, "divide the images"),
        (torch.ones(1, 4, 4), {"steps": 0}, ValueError, "steps must be at least 1"),
        (torch.ones(1, 4, 4), {"targets": 2}, ValueError, "classes below 2"),
        (torch.ones(1, 4, 4), {"targets": [0, 1]}, ValueError, "one an image"),
    ],
)
def test_wrong_calls(function, maps, options, error, message):
    with pytest.raises(error, match=message):
        function(Brightness(), bright(), maps, **options)
