"""What several adapters in one batch cost: against one adapter, a loop over groups, and PEFT's LoRA.

Every image of a batch has one of N adapters. The same batch is computed with one adapter for all; with the
adapters mixed, by an AdaptiveViT and by an AdapterStack; adapter by adapter, as groups of images; and by
PEFT's LoRA on the same timm model, where PEFT is installed. All in turns, so that ratios are free of drift.
Then an AdapterStack is filled with many adapters: bytes, and the time to add, load and switch.

Example:
    python bench/adapters.py --out adapters.json
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import vapt_fast
from vapt_fast.benchmark.environment import describe
from vapt_fast.benchmark.timing import Spread, in_turns
from vapt_fast.files import write_atomically

try:
    import peft
except ImportError:  # it is compared where it is there
    peft = None

ONE = "one adapter"
AGREE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # largest difference of logits, whose size is about 1


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON file")
    add("--device", default="cpu", help="(%(default)s)")
    add("--model", default="vit_small_patch16_224", help="timm's name of the backbone (%(default)s)")
    add("--prompts", type=int, default=10, help="(%(default)s)")
    add("--batch", type=int, default=32, help="images (%(default)s)")
    add("--adapters", type=int, nargs="+", default=[1, 2, 8, 32], help="how many (%(default)s)")
    add("--rounds", type=int, default=11, help="(%(default)s)")
    add("--many", type=int, default=1000, help="adapters in an AdapterStack (%(default)s)")
    add("--classes", type=int, default=100, help="of each (%(default)s)")
    add("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.batch, options.adapters = "vit_tiny_patch16_224", 4, [1, 4]
        options.rounds, options.many, options.classes = 2, 10, 3
    return options


class Rivals:
    """One batch, computed in every way."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.most = options, max(options.adapters)
        self.dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        self.backbone = timm.create_model(
            options.model, num_classes=options.classes, **_small(options)
        ).eval()
        self.model = vapt_fast.AdaptiveViT(
            copy.deepcopy(self.backbone), num_prompts=options.prompts, channel_dropout=0, projector_dropout=0
        ).eval()
        self._add_adapters()
        self.model.to(options.device, self.dtype)
        for adapter in self.model.adapters.values():
            adapter.prompts.float()
        self.stack = vapt_fast.AdapterStack(self.model, capacity=self.most)
        for name in self.model.adapters:
            self.stack.add_adapter(name)
        self.names = list(self.model.adapters)
        self.images = torch.randn(
            options.batch, *self.model.pretrained_cfg["input_size"], device=options.device, dtype=self.dtype
        )
        self.labels = torch.randint(options.classes, (options.batch,), device=options.device)
        self.lora = None if peft is None else self._lora()

    def _add_adapters(self) -> None:
        for i in range(1, self.most):
            self.model.add_adapter(f"a{i}")
        with torch.no_grad():
            for adapter in self.model.adapters.values():
                for name, parameter in adapter.named_parameters():
                    if not name.endswith("norm.weight"):
                        parameter.normal_(std=0.02)

    def _lora(self) -> Any:
        def config() -> Any:
            return peft.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])

        model = peft.get_peft_model(self.backbone, config(), adapter_name=self.names[0])
        for name in self.names[1:]:
            model.add_adapter(name, config())
        return model.to(self.options.device, self.dtype).eval()

    def given(self, number: int) -> list[str]:
        """The adapter of each image, ``number`` of them in turn."""
        return [self.names[i % number] for i in range(self.options.batch)]

    def by_groups(self, number: int) -> Tensor:
        """Adapter by adapter, as one does without mixed batches."""
        names, logits = self.given(number), []
        for name in self.names[:number]:
            self.model.set_adapter(name)
            logits.append(self.model(self.images[names.index(name) :: number]))
        self.model.set_adapter(self.names[0])
        return (
            torch.stack(logits, dim=1).flatten(0, 1)
            if self.options.batch % number == 0
            else torch.cat(logits)
        )

    def inference(self) -> dict[tuple[str, int], Callable[[], Any]]:
        """Every way, by its name and the number of adapters."""
        runs: dict[tuple[str, int], Callable[[], Any]] = {(ONE, 1): lambda: self.model(self.images)}
        for number in self.options.adapters:
            names = self.given(number)
            places = self.stack.places(names)
            runs["mixed, AdapterStack", number] = lambda places=places: self.stack(self.images, places)
            runs["mixed, AdaptiveViT", number] = lambda names=names: self.model(
                self.images, adapter_names=names
            )
            runs["adapter by adapter", number] = lambda number=number: self.by_groups(number)
            if self.lora is not None:
                runs["PEFT's LoRA", number] = lambda names=names: self.lora(self.images, adapter_names=names)
        return {key: _without_gradients(run) for key, run in runs.items()}

    def training(self) -> dict[tuple[str, int], Callable[[], Any]]:
        """Training steps without an optimizer, which costs the same for all. PEFT can't mix in training."""

        def step(logits: Callable[[], Tensor]) -> Callable[[], None]:
            def run() -> None:
                self.model.zero_grad()
                F.cross_entropy(logits(), self.labels).backward()

            return run

        runs = {(ONE, 1): step(lambda: self.model(self.images))}
        for number in self.options.adapters:
            names = self.given(number)
            runs["mixed, AdaptiveViT", number] = step(
                lambda names=names: self.model(self.images, adapter_names=names)
            )
            runs["adapter by adapter", number] = step(lambda number=number: self.by_groups(number))
        return runs

    def check(self) -> float:
        """Return the largest difference of mixed logits from those adapter by adapter.

        Raises:
            SystemExit: it is too large for any time to be reported.
        """
        worst = 0.0
        with torch.no_grad():
            for number in self.options.adapters:
                if self.options.batch % number:
                    raise SystemExit(f"--adapters must divide --batch, got {number} and {self.options.batch}")
                names, expected = self.given(number), self.by_groups(number)
                for logits in (self.model(self.images, adapter_names=names), self.stack(self.images, names)):
                    worst = max(worst, (logits - expected).abs().max().item())
        if not worst <= AGREE[self.dtype]:
            raise SystemExit(f"mixed logits are off by {worst}: no time is reported")
        return worst


def _small(options: argparse.Namespace) -> dict[str, Any]:
    return {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3} if options.tiny else {}


def _without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
    def quiet() -> None:
        with torch.no_grad():
            run()

    return quiet


def ratios(
    runs: dict[tuple[str, int], Callable[[], Any]], rounds: int, synchronize: Any
) -> list[dict[str, Any]]:
    """Time all of it in turns; return seconds, and the ratio to one adapter within each round."""
    for run in runs.values():
        run()
        run()
    seconds = in_turns(runs, rounds, synchronize=synchronize)
    rows = []
    for (way, number), times in seconds.items():
        ratio = Spread.of_ratio(times, seconds[ONE, 1])
        rows.append({"way": way, "adapters": number, "seconds": times, "ratio": vars(ratio)})
        print(f"  {way:24} {number:3} adapters: {Spread.of(times)} s, {ratio} of one adapter", flush=True)
    return rows


def fill(rivals: Rivals, many: int) -> dict[str, Any]:
    """Fill an AdapterStack with ``many`` adapters; return bytes and seconds of each."""
    model, seconds = rivals.model, {"add": [], "load": [], "switch": []}

    def timed(what: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        run()
        seconds[what].append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder)
        stack = vapt_fast.AdapterStack(model, capacity=many)
        for i in range(many):
            timed("add", lambda i=i: stack.add_adapter(f"b{i}", model.adapters[rivals.names[0]]))
        for i in range(min(many, 20)):
            timed("load", lambda i=i: stack.load_adapter(folder, name=f"b{i}"))
    given = [f"b{i * many // rivals.options.batch}" for i in range(rivals.options.batch)]
    for _ in range(20):
        timed("switch", lambda: stack.places(given))
    spreads = {what: vars(Spread.of(times)) for what, times in seconds.items()}
    print(f"  {many} adapters, {stack.bytes_per_adapter} bytes each; seconds {spreads}", flush=True)
    return {"adapters": many, "bytes": stack.bytes_per_adapter, "seconds": spreads}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the JSON file after each part."""
    options = parse_options(arguments)
    rivals = Rivals(options)
    synchronize = torch.cuda.synchronize if options.device != "cpu" else None
    results: dict[str, Any] = {
        "options": {key: str(value) for key, value in vars(options).items()},
        "environment": describe(options.device) | {"peft": getattr(peft, "__version__", None)},
        "largest_difference": rivals.check(),
    }
    parts = {
        "inference": lambda: ratios(rivals.inference(), options.rounds, synchronize),
        "training": lambda: ratios(rivals.training(), options.rounds, synchronize),
        "many": lambda: fill(rivals, options.many),
    }
    for name, measure in parts.items():
        print(name, flush=True)
        results[name] = measure()
        write_atomically(options.out, json.dumps(results, indent=1).encode())


if __name__ == "__main__":
    main()
