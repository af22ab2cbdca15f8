"""How well VAPT and VPT-deep find what they name: a digit at a random place, by several maps and scores.

The demo's small backbone is adapted to name the digits 5 to 9, each somewhere on a black canvas. The learning
rate is chosen on validation images. Maps of the true class are then scored on test images, by the exact mask
of the digit. Example:

    python bench/localisation.py --out localisation.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import TensorDataset

from vapt_fast import AdaptiveViT, explain
from vapt_fast.demo.placed_digits import PlacedDigits, placed_digits
from vapt_fast.files import write_atomically
from vapt_fast.names import DEMO_BACKBONE
from vapt_fast.training import METHODS, Recipe, Splits, build_model, search

COMPARED = ("vapt", "vpt-deep")
BASE_LRS = (1.0, 0.4)
PARTS = {"train": (0.0, 0.5), "validation": (0.5, 0.7), "test": (0.7, 1.0)}
SIZE = 64
STEPS = 8  # of deletion and insertion
SCORES = ("pointing game", "energy", "mask IoU", "deletion", "insertion")
Maps = Callable[[AdaptiveViT, Tensor, Tensor], Tensor]


def shaping(model: AdaptiveViT, images: Tensor, labels: Tensor) -> Tensor:
    """Which patches shape the prompts, the mean of all blocks."""
    by_block = [maps.norm(dim=1) for maps in explain.prompt_maps(model, images).values()]
    return torch.stack([maps / maps.sum((1, 2), keepdim=True) for maps in by_block]).mean(0)


def brightness(model: AdaptiveViT, images: Tensor, labels: Tensor) -> Tensor:
    """The picture itself, which needs no model: digits are white on black."""
    return F.adaptive_avg_pool2d(images.mean(1) - images.amin(), model.grid)


def centre(model: AdaptiveViT, images: Tensor, labels: Tensor) -> Tensor:
    """A Gaussian in the middle, which knows nothing of the picture."""
    rows, columns = (torch.linspace(-1, 1, side) for side in model.grid)
    return torch.exp(-2 * (rows[:, None] ** 2 + columns**2)).expand(len(images), -1, -1)


MAPS: dict[str, Maps] = {
    "Grad-CAM": explain.grad_cam,
    "attention rollout": lambda model, images, labels: explain.rollout(model, images),
    "patches that shape prompts": shaping,
    "brightness": brightness,
    "centred Gaussian": centre,
}


def prepared(data: PlacedDigits, model: AdaptiveViT) -> tuple[Tensor, Tensor]:
    transform = model.transform()
    return torch.stack([transform(image) for image in data.images]), torch.tensor(data.labels)


def train(method: str, counts: dict[str, int], epochs: int, seed: int) -> tuple[Any, float, PlacedDigits]:
    """Return the model, its accuracy on test images, and these."""
    make = partial(build_model, method, DEMO_BACKBONE, 5, img_size=SIZE)
    data = {
        name: placed_digits(count, others=(), part=PARTS[name], seed=10 * seed + index)
        for index, (name, count) in enumerate(counts.items())
    }
    splits = {name: TensorDataset(*prepared(part, make(pretrained=False))) for name, part in data.items()}
    recipes = [
        Recipe(base_lr, epochs=epochs, warmup_epochs=max(1, epochs // 10), batch_size=32, seed=seed)
        for base_lr in BASE_LRS
    ]
    found = search(make, Splits(tuple("56789"), **splits), recipes, validate_every=epochs)
    assert found.test is not None
    return found.model, found.test.accuracy, data["test"]


@torch.no_grad()
def scores(model: AdaptiveViT, data: PlacedDigits, maps: Maps) -> dict[str, tuple[float, float]]:
    """Return the mean of each score and of its chance level."""
    images, labels = prepared(data, model)
    found = maps(model, images, labels)
    pixels = explain.to_pixels(found, (SIZE, SIZE))
    of_masks = [
        score(pixels, data.masks) for score in (explain.pointing_game, explain.energy, explain.mask_iou)
    ]
    black = images.amin()
    of_curves = [
        score(model, images, found, labels, steps=STEPS, fill=black)
        for score in (explain.deletion, explain.insertion)
    ]
    return {
        name: (result.value.mean().item(), result.chance.mean().item())
        for name, result in zip(SCORES, [*of_masks, *of_curves], strict=True)
    }


def measure(job: tuple[str, int], counts: dict[str, int], epochs: int) -> list[dict[str, Any]]:
    """Return a row for each map of one method with one seed."""
    torch.set_num_threads(1)  # so small a model has no work for more
    method, seed = job
    model, accuracy, data = train(method, counts, epochs, seed)
    about = {"method": method, "seed": seed, "accuracy": accuracy}
    return [
        {**about, "map": name, "scores": scores(model, data, maps)}
        for name, maps in MAPS.items()
        if maps is not shaping or method == "vapt"
    ]


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("method", "map", *SCORES, title="Mean scores (and chance levels)")
    for method in COMPARED:
        own = [row for row in rows if row["method"] == method]
        accuracy = sum(row["accuracy"] for row in own) / len(own)
        title = f"{METHODS[method].title}, accuracy {accuracy:.1%}"
        for name in dict.fromkeys(row["map"] for row in own):
            found = [row["scores"] for row in own if row["map"] == name]
            table.add_row(title, name, *(_mean(found, score) for score in SCORES))
            title = ""
        table.add_section()
    return table


def _mean(found: list[dict[str, tuple[float, float]]], score: str) -> str:
    value, chance = (sum(one[score][part] for one in found) / len(found) for part in (0, 1))
    return f"{value:.3f} ({chance:.3f})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON file")
    add("--seeds", type=int, default=1, help="models of each method (%(default)s)")
    add("--epochs", type=int, default=16, help="(%(default)s)")
    add("--train", type=int, default=500, help="training images (%(default)s)")
    add("--test", type=int, default=100, help="test images, and as many to validate with (%(default)s)")
    add("--processes", type=int, default=2, help="that share the work (%(default)s)")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    counts = {"train": options.train, "validation": options.test, "test": options.test}
    job = partial(measure, counts=counts, epochs=options.epochs)
    jobs = list(product(COMPARED, range(options.seeds)))
    if options.processes == 1:
        parts = list(map(job, jobs))
    else:
        spawn = multiprocessing.get_context("spawn")  # forked threads of PyTorch can hang
        with ProcessPoolExecutor(options.processes, spawn) as pool:
            parts = list(pool.map(job, jobs))
    rows = [row for part in parts for row in part]
    write_atomically(options.out, (json.dumps(rows, indent=1) + "\n").encode())
    Console(width=140).print(table_of(rows))
    print(f"{time.monotonic() - began:.0f} s; wrote {options.out}")


if __name__ == "__main__":
    main()
