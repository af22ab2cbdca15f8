"""A training loop as anyone writes it, timed from outside: what a user gets who does nothing for speed.

The model trains in bfloat16 with learned prompts in float32, on images that are on the device already. The
same loop runs with the library's defaults, without CUDA graphs of its own, and with the literal method, in
turns.

Example:
    python bench/loop.py --out loop.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vapt_fast
from vapt_fast.files import write_atomically

VARIANTS = {
    "the library's defaults": {},
    "without CUDA graphs": {"cuda_graphs": False},
    "the literal method, without CUDA graphs": {"cuda_graphs": False, "backend": "reference"},
}
ROUNDS = 5
# By how much losses may differ: a few units in the last place of bfloat16, in which they are too.
AGREE = {torch.bfloat16: 0.03, torch.float32: 1e-3}


class Loop:
    """A model in training, and how long that takes."""

    def __init__(self, options: argparse.Namespace, **settings: Any) -> None:
        self.dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
        torch.manual_seed(0)
        self.model = vapt_fast.AdaptiveViT(
            options.model, num_prompts=options.prompts, num_classes=100, **settings
        )
        self.model.to(options.device, self.dtype).prompts.float()
        self.optimizer = torch.optim.SGD(self.model.trainable_parameters(), lr=0.01, momentum=0.9)
        self.model.train()

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        losses = []
        for images, labels in batches:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return losses


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON file, written after each round")
    add("--device", default="cuda", help="(%(default)s)")
    add("--model", default="vit_base_patch16_224", help="timm's name of the backbone (%(default)s)")
    add("--prompts", type=int, default=50, help="(%(default)s)")
    add("--batch", type=int, default=64, help="images (%(default)s)")
    add("--steps", type=int, default=20, help="of a round (%(default)s)")
    add("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.prompts, options.batch, options.steps = "test_vit", 3, 2, 2
    return options


def timed(loop: Loop, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, list[float]]:
    """Return the seconds of a step and the losses."""
    on_gpu = batches[0][0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    losses = loop.train(batches)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(batches), [loss.item() for loss in losses]


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    loops = {name: Loop(options, **settings) for name, settings in VARIANTS.items()}
    dtype = next(iter(loops.values())).dtype
    size = next(iter(loops.values())).model.default_cfg["input_size"]
    torch.manual_seed(1)
    batches = [
        (
            torch.randn(options.batch, *size).to(options.device, dtype),
            torch.randint(100, (options.batch,)).to(options.device),
        )
        for _ in range(options.steps)
    ]
    results: dict[str, Any] = {"batch": options.batch, "prompts": options.prompts, "model": options.model}
    results["rows"] = {name: {"seconds": []} for name in VARIANTS}
    for index in range(1 + ROUNDS):
        for name, loop in loops.items():
            torch.manual_seed(index)  # the same dropout masks for all
            seconds, losses = timed(loop, batches)
            row = results["rows"][name]
            if index == 0:  # compiles and captures
                row |= {"seconds_of_first_round": seconds, "first_losses": losses}
            else:
                row["seconds"].append(seconds)
            row["graphs"] = loop.model.cuda_graph_report().strip()
        write_atomically(options.out, (json.dumps(results, indent=1) + "\n").encode())
    first, *others = (row["first_losses"] for row in results["rows"].values())
    for other in others:
        worst = max(abs(a - b) / abs(b) for a, b in zip(first, other, strict=True))
        if not worst <= AGREE[dtype]:
            raise SystemExit(f"the losses of the first {options.steps} steps differ by {worst:.1e}")


if __name__ == "__main__":
    main()
