"""Small data sets in the layouts of the benchmark suites."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vapt_fast.training.suites import find_data_set


def image(label: int, seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise around a colour that tells the label."""
    colour = np.random.default_rng(label).integers(60, 200, 3)
    noise = np.random.default_rng([label, seed]).integers(-50, 50, (*size, 3))
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))


def vtab_folder(root: Path, task: str, sizes: Sequence[int] = (12, 6, 6), *, both: bool = True) -> Path:
    """Write a task of VTAB-1K with few images, of the first three classes or fewer."""
    classes = min(3, find_data_set(f"vtab:{task}")[2].num_classes)
    folder, seed, listed = root / task, 0, {}
    for split, size in zip(("train800", "val200", "test"), sizes, strict=True):
        lines = []
        (folder / "images" / split).mkdir(parents=True)
        for index in range(size):
            path, seed = f"images/{split}/{index:06d}.jpg", seed + 1
            image(index % classes, seed).save(folder / path)
            lines.append(f"{path} {index % classes}\n")
        listed[split] = lines
    if both:
        together = [*listed["train800"], *listed["val200"]]
        listed["train800val200"] = [line.replace("train800/", "train800val200/") for line in together]
    for split, lines in listed.items():
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def fgvc_folder(root: Path, name: str, names: str = "class {:03d}", per_class: int = 1) -> Path:
    """Write a data set of FGVC with ``per_class`` images of each class in each split."""
    data_set = find_data_set(f"fgvc:{name}")[2]
    folder = root / name
    (folder / data_set.image_folder / "some").mkdir(parents=True)
    for seed, split in enumerate(("train", "val", "test")):
        labels = {}
        for label in range(data_set.num_classes):
            for index in range(per_class):
                path = f"some/{split}_{label}_{index}.png"
                image(label, 10 * seed + index, (8, 8)).save(folder / data_set.image_folder / path)
                labels[path] = names.format(label) if names else label + 1
        (folder / f"{split}.json").write_text(json.dumps(labels))
    return folder
