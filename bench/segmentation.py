"""Methods compared in segmentation: digits 5 to 9 on canvases, by a backbone that has seen 0 to 4 alone.

    python bench/segmentation.py [results.json]

It takes some 6 minutes of CPU time, shared by a process for each CPU. The learning rate of each method is
chosen by the mean IoU on validation images with the first seed; all numbers are of test images.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

import vapt_fast.demo
from vapt_fast import PromptConfig
from vapt_fast.data import full_data_config
from vapt_fast.demo.placed_digits import digit_canvases
from vapt_fast.names import DEMO_BACKBONE
from vapt_fast.tasks.segmentation import Preparation, Segmenter
from vapt_fast.tasks.segmentation.task import TASK
from vapt_fast.training import METHODS, Recipe, Splits, build_model, search

CLASS_NAMES = ("background", *map(str, vapt_fast.demo.NEW_DIGITS))
SIZE = 48  # pixels along each side
COUNTS = {"train": 300, "val": 50, "test": 200}
EPOCHS, BATCH_SIZE = 20, 16
BASE_LRS = (0.16, 0.04, 0.01)
SEEDS = (0, 1, 2)
JOBS = ("vapt", "vpt-deep", "linear")


class Canvases:
    """Canvases in memory."""

    def __init__(self, part, seed):
        cfg = timm.get_pretrained_cfg(DEMO_BACKBONE).to_dict() | {"input_size": (3, SIZE, SIZE)}
        prepare = Preparation(full_data_config(cfg))
        self.items = [
            (prepare.image(image), torch.tensor(list(mask.tobytes())).view(SIZE, SIZE))
            for image, mask in digit_canvases(COUNTS[part], size=(SIZE, SIZE), part=part, seed=seed)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def run_method(method):
    """The chosen learning rate, the mean IoU for each seed, and how many weights were trained."""
    prompts = PromptConfig(num_prompts=10)
    make = partial(Segmenter, num_classes=len(CLASS_NAMES))
    make_model = partial(
        build_model, method, DEMO_BACKBONE, len(CLASS_NAMES), prompts=prompts, make=make, img_size=SIZE
    )
    base_lrs, scores = BASE_LRS, []
    for seed in SEEDS:
        # The test images are the same for every seed.
        splits = Splits(CLASS_NAMES, Canvases("train", seed), Canvases("val", seed), Canvases("test", 0))
        options = {
            "epochs": EPOCHS,
            "warmup_epochs": 2,
            "batch_size": BATCH_SIZE,
            "seed": seed,
            "optimizer": "adamw",
        }
        recipes = [Recipe(lr, **options) for lr in base_lrs]
        found = search(make_model, splits, recipes, validate_every=EPOCHS, evaluate=TASK.evaluate)
        base_lrs = (found.recipe.base_lr,)
        scores.append(found.test.mean_iou)
    trained = sum(parameter.numel() for parameter in found.model.trainable_parameters())
    return {"method": method, "base_lr": base_lrs[0], "mean_iou": scores, "weights": trained}


def main():
    started = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")  # forked threads of PyTorch can hang
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        results = list(pool.map(run_method, JOBS))
    table = Table("method", "weights trained", "learning rate", "mean IoU")
    for result in results:
        mean, spread = statistics.mean(result["mean_iou"]), statistics.stdev(result["mean_iou"])
        table.add_row(
            METHODS[result["method"]].title,
            f"{result['weights']:,}",
            f"{result['base_lr']:g}",
            f"{100 * mean:.1f} ± {100 * spread:.1f}",
        )
    table.title = f"Mean IoU of {COUNTS['test']} test images in %, over {len(SEEDS)} seeds"
    Console().print(table)
    print(f"{time.perf_counter() - started:.0f} s")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
