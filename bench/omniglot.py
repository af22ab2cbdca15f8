"""The methods compared on Omniglot by the protocol of docs/omniglot.md, which says where to get the drawings.

    python bench/omniglot.py FOLDER

FOLDER has images_background_small1.zip and images_background_small2.zip. All runs go to
bench/results/omniglot.json, the results to docs/omniglot.md and docs/figures/omniglot.svg. Stopped, it goes
on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from report import table
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from vapt_fast import PromptConfig
from vapt_fast.benchmark import describe, in_turns
from vapt_fast.demo.pretrain import jitter
from vapt_fast.files import write_atomically
from vapt_fast.names import create_backbone
from vapt_fast.training import METHODS, Recipe, Trainer, build_model, evaluate

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURE = ROOT / "docs" / "omniglot.md", ROOT / "docs" / "figures" / "omniglot.svg"
BEGIN = "<!-- written by bench/omniglot.py -->\n"
END = "<!-- end of what bench/omniglot.py writes -->\n"

ARCHIVES = ("images_background_small1.zip", "images_background_small2.zip")
SIZE = 48
BACKBONE = "vit_tiny_patch16_224"  # made small by these:
SHAPE = {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 2, "in_chans": 1}
Drawings = dict[str, Tensor]
"""By alphabet, (characters, 20 people, 1, SIZE, SIZE), 1 where there is ink."""


@dataclass(frozen=True)
class Protocol:
    """What docs/omniglot.md says; tests make it smaller."""

    pretraining: tuple[str, ...] = ("Greek", "Japanese_(katakana)", "Korean", "Latin")
    validation: tuple[str, ...] = ("Tagalog",)
    test: tuple[str, ...] = ("Balinese", "Early_Aramaic", "Sanskrit")
    pretraining_epochs: int = 60
    methods: tuple[str, ...] = ("vapt", "vpt-deep", "lora", "linear", "full")
    epochs: dict[int, int] = field(default_factory=lambda: {1: 100, 3: 60, 5: 40, 10: 30})
    rates: tuple[float, ...] = (0.08, 0.02, 0.005, 0.00125, 0.0003)
    full_rates: tuple[float, ...] = (0.005, 0.00125, 0.0003, 0.00008, 0.00002)
    most_rates: int = 9
    validation_seeds: tuple[int, ...] = (100, 101, 102)
    test_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    batch_size: int = 32
    num_prompts: int = 10

    def rates_of(self, method: str) -> tuple[float, ...]:
        return self.full_rates if method == "full" else self.rates


@dataclass(frozen=True)
class Run:
    """One training: what it is, before it has run."""

    method: str
    alphabet: str
    shots: int
    seed: int
    rate: float


# ---- drawings


def read_drawings(folder: Path) -> tuple[Drawings, dict[str, str]]:
    """Return the drawings of both archives, and the archives' SHA-256."""
    sums, by_alphabet = {}, {}
    for name in ARCHIVES:
        sums[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        with zipfile.ZipFile(folder / name) as archive:
            for path in sorted(archive.namelist()):  # <archive>/<alphabet>/<character>/<number>_<person>.png
                if path.endswith(".png") and "__MACOSX" not in path:
                    _, alphabet, character, file = path.split("/")
                    with archive.open(path) as opened, Image.open(opened) as image:
                        ink = 1 - pil_to_tensor(image.convert("L")).float() / 255
                    by_alphabet.setdefault(alphabet, {}).setdefault(character, {})[file[-6:-4]] = ink
    drawings = {}
    for alphabet, characters in sorted(by_alphabet.items()):
        whole = torch.stack([torch.stack([c[who] for who in sorted(c)]) for c in characters.values()])
        small = F.interpolate(whole.flatten(0, 1), size=(SIZE, SIZE), mode="bilinear", antialias=True)
        drawings[alphabet] = small.view(*whole.shape[:2], 1, SIZE, SIZE)
    return drawings, sums


def labelled(drawings: Tensor) -> TensorDataset:
    """Return (characters, drawings, 1, H, W) as images with their characters' numbers."""
    return TensorDataset(
        drawings.flatten(0, 1), torch.arange(len(drawings)).repeat_interleave(drawings.shape[1])
    )


def few_drawings(drawings: Tensor, shots: int, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Return the training drawings, of people 1 to 10, and the measured ones, of people 11 to 20."""
    generator = torch.Generator().manual_seed(seed)
    people = torch.stack([torch.randperm(10, generator=generator)[:shots] for _ in drawings])
    chosen = drawings[torch.arange(len(drawings))[:, None], people]
    return labelled(chosen), labelled(drawings[:, 10:])


# ---- pre-training


def initialise(model: torch.nn.Module) -> None:
    """Start from larger weights than timm's, with which so narrow a model hardly learns."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    torch.nn.init.xavier_uniform_(model.patch_embed.proj.weight.view(SHAPE["embed_dim"], -1), gain=3)
    torch.nn.init.normal_(model.pos_embed, std=0.3)


def pretrain(drawings: Drawings, protocol: Protocol, path: Path) -> dict[str, Any]:
    """Pre-train the backbone into ``path``; return how well it names held-out drawings.

    One thread, because the order of sums and so the weights would depend on their number.
    """
    torch.manual_seed(0)
    characters = torch.cat([drawings[alphabet] for alphabet in protocol.pretraining])
    model = create_backbone(BACKBONE, num_classes=len(characters), **SHAPE)
    initialise(model)
    images, labels = labelled(characters[:, :18]).tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = protocol.pretraining_epochs * math.ceil(len(images) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    started = time.perf_counter()
    with Progress() as progress:
        for _ in progress.track(range(protocol.pretraining_epochs), description="pre-training"):
            for batch in torch.randperm(len(images)).split(64):
                loss = F.cross_entropy(model(jitter(images[batch])), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()
    images, labels = labelled(characters[:, 18:]).tensors
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    save_file(model.state_dict(), path)
    return {
        "held_out_accuracy": right.double().mean().item(),
        "last_loss": loss.item(),
        "seconds": round(time.perf_counter() - started),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


# ---- runs


def make_model(protocol: Protocol, method: str, num_classes: int, weights: Path) -> torch.nn.Module:
    prompts = PromptConfig(num_prompts=protocol.num_prompts)
    model = build_model(method, BACKBONE, num_classes, prompts=prompts, weights=weights, **SHAPE)
    return model.train()


def trained(model: torch.nn.Module, protocol: Protocol, run: Run, data: TensorDataset) -> float:
    """Train; return the seconds."""
    epochs = protocol.epochs[run.shots]
    recipe = Recipe(
        run.rate * 256 / protocol.batch_size,
        weight_decay=1e-4,
        optimizer="adamw",
        epochs=epochs,
        warmup_epochs=epochs // 10,
        batch_size=protocol.batch_size,
        seed=run.seed,
    )
    trainer = Trainer(model, recipe, data)
    return sum(trainer.run_epoch().seconds for _ in iter(lambda: trainer.finished, True))


def carry_out(protocol: Protocol, run: Run, weights: Path, drawings: Tensor) -> dict[str, Any]:
    """Train and measure one run."""
    data, measured = few_drawings(drawings, run.shots, run.seed)
    torch.manual_seed(run.seed)
    model = make_model(protocol, run.method, len(drawings), weights)
    seconds = trained(model, protocol, run, data)
    score = evaluate(model, measured, batch_size=256)
    return {**asdict(run), "accuracy": score.accuracy, "loss": score.loss, "seconds": round(seconds, 2)}


class Results:
    """The results' file: each run once, written as soon as it is there."""

    def __init__(self, path: Path, protocol: Protocol, sums: dict[str, str]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "protocol": json.loads(json.dumps(asdict(protocol))),
            "data": sums,
            "environment": describe("cpu"),
            "runs": [],
        }
        if path.exists():
            found = json.loads(path.read_text())
            for name in ("protocol", "data"):
                if found[name] != self.content[name]:
                    raise SystemExit(f"{path} is of another {name}: move it away to start anew")
            self.content = found

    def write(self) -> None:
        write_atomically(
            self.path, (json.dumps(self.content) + "\n").replace('{"method', '\n{"method').encode()
        )

    def of(self, run: Run) -> dict[str, Any] | None:
        return next((r for r in self.content["runs"] if r.items() >= asdict(run).items()), None)

    def accuracies(self, runs: Iterable[Run]) -> list[float]:
        return [found["accuracy"] for run in runs if (found := self.of(run)) is not None]


Do = Callable[[Sequence[Run]], None]
"""Carries runs out, but for those that the results have already."""


def choose(protocol: Protocol, results: Results, do: Do) -> dict[tuple[str, int], float]:
    """Return the learning rate of each method and number of drawings, by the validation alphabets alone."""
    candidates = {(m, k): list(protocol.rates_of(m)) for m in protocol.methods for k in protocol.epochs}

    def runs(method: str, shots: int, rate: float) -> list[Run]:
        return [
            Run(method, alphabet, shots, seed, rate)
            for alphabet in protocol.validation
            for seed in protocol.validation_seeds
        ]

    while True:
        do([run for (m, k), rates in candidates.items() for rate in rates for run in runs(m, k, rate)])
        chosen, more = {}, False
        for (method, shots), rates in candidates.items():
            merit = {rate: mean(results.accuracies(runs(method, shots, rate))) for rate in sorted(rates)}
            best = chosen[method, shots] = max(merit, key=lambda rate: merit[rate])  # the smaller of equals
            if len(rates) < protocol.most_rates and best in (min(rates), max(rates)):
                rates.append(float(f"{best * (4 if best == max(rates) else 0.25):.3g}"))
                more = True
        if not more:
            return chosen


def test_runs(protocol: Protocol, chosen: dict[tuple[str, int], float]) -> Iterator[Run]:
    for (method, shots), rate in chosen.items():
        for alphabet in protocol.test:
            yield from (Run(method, alphabet, shots, seed, rate) for seed in protocol.test_seeds)


def time_steps(protocol: Protocol, weights: Path, drawings: Tensor, rounds: int = 41) -> dict[str, Any]:
    """Return the milliseconds of a step on one thread and the weights trained besides the head, by method."""
    torch.set_num_threads(1)
    steps, trained_weights = {}, {}
    labels = torch.arange(protocol.batch_size) % len(drawings)
    images = drawings[labels, torch.arange(protocol.batch_size) % 10]
    for method in protocol.methods:
        model = make_model(protocol, method, len(drawings), weights)
        parameters = [p for p in model.parameters() if p.requires_grad]
        head = len(drawings) * (SHAPE["embed_dim"] + 1)
        trained_weights[method] = sum(p.numel() for p in parameters) - head
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)

        def step(model=model, optimizer=optimizer) -> None:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for _ in range(5):
            step()
        steps[method] = step
    seconds = in_turns(steps, rounds)
    return {
        method: {"ms": round(1000 * median(seconds[method]), 2), "weights": trained_weights[method]}
        for method in steps
    }


# ---- the page


def by_seed(protocol: Protocol, results: Results, method: str, shots: int) -> list[float]:
    """Return the mean accuracy over the test alphabets, in %, of each seed."""
    rate = results.content["chosen"][f"{method} {shots}"]
    return [
        100 * mean(results.accuracies(Run(method, a, shots, seed, rate) for a in protocol.test))
        for seed in protocol.test_seeds
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95% interval."""
    from scipy.stats import t

    return mean(values), t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def section(protocol: Protocol, results: Results) -> str:
    """Return the page's section of results."""
    shots = list(protocol.epochs)
    scores = {(m, k): by_seed(protocol, results, m, k) for m in protocol.methods for k in shots}
    title = {method: METHODS[method].title for method in protocol.methods}
    times, backbone = results.content["times"], results.content["backbone"]
    first, *others = protocol.methods
    header = ["method", "weights besides the head", "step", *(f"k = {k}" for k in shots)]
    rows, paired, rates, apart = [], [], [], []
    for method in protocol.methods:
        cells = ["{:.1f} ± {:.1f}".format(*interval(scores[method, k])) for k in shots]
        rows.append([title[method], f"{times[method]['weights']:,}", f"{times[method]['ms']:.0f} ms", *cells])
        rates.append([title[method], *(f"{results.content['chosen'][f'{method} {k}']:g}" for k in shots)])
        for alphabet in protocol.test:
            means = []
            for k in shots:
                rate = results.content["chosen"][f"{method} {k}"]
                runs = [Run(method, alphabet, k, seed, rate) for seed in protocol.test_seeds]
                means.append(f"{100 * mean(results.accuracies(runs)):.1f}")
            apart.append([title[method], alphabet.replace("_", " "), *means])
    for method in others:
        differences = {
            k: [a - b for a, b in zip(scores[first, k], scores[method, k], strict=True)] for k in shots
        }
        cells = ["{:+.1f} ± {:.1f}".format(*interval(differences[k])) for k in shots]
        paired.append([f"{title[first]} - {title[method]}", *cells])
    short = [f"k = {k}" for k in shots]
    return (
        f"Accuracy in %, mean of {len(protocol.test)} alphabets, over {len(protocol.test_seeds)} seeds with "
        f"the 95% interval:\n\n{table(header, rows)}\n\n"
        "A step has a batch of 32 and one thread of a CPU. The differences, paired by seed:\n\n"
        f"{table(['', *short], paired)}\n\n![Accuracy over the number of drawings](figures/omniglot.svg)\n\n"
        f"By alphabet:\n\n{table(['method', 'alphabet', *short], apart)}\n\n"
        f"Learning rates chosen on {', '.join(protocol.validation)}:\n\n"
        f"{table(['method', *short], rates)}\n\n"
        f"The backbone names {backbone['held_out_accuracy']:.1%} of the held-out drawings of the characters "
        "that it was trained on.\n"
    )


def draw(protocol: Protocol, results: Results, path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "vapt_fast"}  # the same file each time
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for place, method in enumerate(protocol.methods):
        scores = [interval(by_seed(protocol, results, method, k)) for k in protocol.epochs]
        axis.errorbar(
            [k * (1 + 0.02 * (place - 2)) for k in protocol.epochs],  # side by side
            [score for score, _ in scores],
            [half for _, half in scores],
            label=METHODS[method].title,
            capsize=2,
        )
    axis.set(xscale="log", xlabel="drawings of each character", ylabel="accuracy, %")
    axis.set_xticks(list(protocol.epochs), [str(k) for k in protocol.epochs])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))


# ---- all of it

_in_process: dict[str, Any] = {}


def _start(protocol: Protocol, weights: Path, drawings: Drawings) -> None:
    torch.set_num_threads(1)
    _in_process.update(protocol=protocol, weights=weights, drawings=drawings)


def _carry_out(run: Run) -> dict[str, Any]:
    drawings = _in_process["drawings"][run.alphabet]
    return carry_out(_in_process["protocol"], run, _in_process["weights"], drawings)


def compare(protocol: Protocol, folder: Path, out: Path, processes: int, stop: str = "") -> Results | None:
    """Carry out the protocol, all that ``out`` doesn't have yet; with ``stop="choice"`` nothing is tested."""
    torch.set_num_threads(1)
    drawings, sums = read_drawings(folder)
    results, weights = Results(out, protocol, sums), out.with_suffix(".backbone.safetensors")
    if not weights.exists():
        results.content["backbone"] = pretrain(drawings, protocol, weights)
        results.write()
    found = results.content.get("backbone", {}).get("sha256")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != found:
        raise SystemExit(f"{out} is of another backbone than {weights}: move both away to start anew")
    initial = (protocol, weights, drawings)
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), _start, initial) as pool,
        Progress() as progress,
    ):

        def do(runs: Sequence[Run]) -> None:
            left = [run for run in runs if results.of(run) is None]
            left.sort(key=lambda run: len(drawings[run.alphabet]) * run.shots * protocol.epochs[run.shots])
            futures = [pool.submit(_carry_out, run) for run in reversed(left)]  # the longest first
            for future in progress.track(as_completed(futures), total=len(futures), description="runs"):
                results.content["runs"].append(future.result())
                results.write()

        chosen = choose(protocol, results, do)
        results.content["chosen"] = {f"{method} {shots}": rate for (method, shots), rate in chosen.items()}
        results.write()
        if stop == "choice":
            return None
        do(list(test_runs(protocol, chosen)))
    if "times" not in results.content:
        results.content["times"] = time_steps(protocol, weights, drawings[protocol.test[-1]])
        results.write()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with the two archives")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "omniglot.json")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="each with one thread")
    parser.add_argument("--stop", choices=["choice"], default="", help="end before anything is tested")
    options = parser.parse_args()
    protocol = Protocol()
    results = compare(protocol, options.folder, options.out, options.processes, options.stop)
    if results is None:
        return
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{section(protocol, results)}\n{END}{after}")
    draw(protocol, results, FIGURE)


if __name__ == "__main__":
    main()
