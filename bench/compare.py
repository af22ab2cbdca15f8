"""Compare whole models end to end: reference, torch backend and linear probe, in turn, in one process.

The rounds are interleaved, A B C A B C, so that whatever changes with time (clocks, temperature, other work
on the machine) meets all alike, and a ratio is the median over rounds of the ratio within a round. Writes
<out>/<model>.json with every timing and <out>/<model>.md with the tables. Example:

    python bench/compare.py --out bench/results/cpu
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from agreement import models_agree
from environment import describe
from memory import peak_memory
from rich.console import Console
from rich.progress import track
from rich.table import Table
from workload import LINEAR_PROBE, MODES, Setting, Variant, Workload

WARM_UP = 1


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def of_ratio(cls, numerators: list[float], denominators: list[float]) -> Spread:
        return cls.of([a / b for a, b in zip(numerators, denominators, strict=True)])

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    description = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=description)
    Setting.add_options(parser.add_argument)
    add = parser.add_argument
    add("--prompts", default="10,100", help="numbers of prompts (%(default)s)")
    add(
        "--kind", default="adaptive", choices=("adaptive", "deep", "shallow"), help="of prompts (%(default)s)"
    )
    add("--modes", nargs="+", default=MODES, choices=MODES, help="what to time (all)")
    add("--rounds", type=int, default=6, help="interleaved rounds, at least 2 (%(default)s)")
    add("--no-memory", dest="memory", action="store_false", help="don't measure peak memory")
    add("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("a spread needs --rounds of at least 2")
    return options


def measure(workloads: dict[Variant, Workload], mode: str, rounds: int) -> dict[Variant, list[float]]:
    """Seconds of every round, by variant."""
    seconds = {variant: [] for variant in workloads}
    for index in track(range(WARM_UP + rounds), f"{mode}: time"):
        for variant, workload in workloads.items():
            elapsed = _time(workload.runner(mode), workload.setting)
            if index >= WARM_UP:
                seconds[variant].append(elapsed)
    return seconds


def _time(run: Callable[[], None], setting: Setting) -> float:
    setting.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(measured: dict[Variant, list[float]], kind: str, numbers: list[int]) -> dict[str, Spread]:
    """The figures that people ask for, by what they say."""

    def seconds(backend: str, num_prompts: int) -> list[float]:
        return measured[Variant(backend, kind, num_prompts)]

    found = {
        f"speed of torch over reference, P = {p}": Spread.of_ratio(
            seconds("reference", p), seconds("torch", p)
        )
        for p in numbers
    }
    fewest, most = min(numbers), max(numbers)
    if fewest < most:
        for backend in ("torch", "reference"):
            name = f"time of {backend} at P = {most} over P = {fewest}"
            found[name] = Spread.of_ratio(seconds(backend, most), seconds(backend, fewest))
    return found


def to_tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of each table of the report."""
    tables = []
    for mode, results in report["results"].items():
        rows = []
        for name, result in results["variants"].items():
            spread, memory = result["seconds_spread"], result["peak_memory_mb"]
            images = report["setting"]["batch"] / spread["median"]
            quartiles = f"{spread['low']:.4g} to {spread['high']:.4g}"
            megabytes = "" if memory is None else f"{memory:.0f}"
            rows.append([name, f"{spread['median']:.4g}", quartiles, f"{images:.4g}", megabytes])
        tables.append((mode, ["", "seconds", "quartiles", "images/s", "peak memory (MB)"], rows))
        rows = [[name, str(Spread(**ratio))] for name, ratio in results["ratios"].items()]
        tables.append((f"{mode}: ratios", ["", "median (quartiles)"], rows))
    return tables


def to_markdown(report: dict) -> str:
    facts = report["setting"] | report["environment"]
    parts = [
        f"# {facts['model']}, batch {facts['batch']}, {facts['amp'] or facts['dtype']}, {facts['device']}"
    ]
    for title, header, rows in to_tables(report):
        lines = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]
        parts += [f"## {title.capitalize()}", "\n".join(lines)]
    errors = ", ".join(f"{error:.1e} (P = {p})" for p, error in report["largest_error"].items())
    parts.append(f"Largest relative error of logits and gradients, torch against reference: {errors}.")
    on_cpu = facts["device"] == "cpu"
    kind_of_memory = "growth of resident memory from the model on" if on_cpu else "all allocations"
    parts.append(
        "Training step: forward, loss, backward and SGD step, all dropouts on; loading of data excluded. "
        "Forward: inference mode. Linear probe: the timm model without prompts, everything frozen but the "
        "head, so without a backward pass through the blocks. Ratios: within a round, then the median over "
        "rounds. "
        f"Peak memory: a fresh process for each figure, {kind_of_memory}."
    )
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    setting = Setting.from_options(options)
    environment = describe(setting.device)
    numbers = [int(number) for number in options.prompts.split(",")]
    variants = [Variant(backend, options.kind, p) for p in numbers for backend in ("reference", "torch")]
    variants.append(Variant(LINEAR_PROBE))

    errors = {
        p: models_agree(setting, options.kind, p) for p in track(numbers, "gate: do the backends agree?")
    }
    workloads = {variant: Workload(setting, variant) for variant in variants}
    results = {}
    for mode in options.modes:
        measured = measure(workloads, mode, options.rounds)
        memory = dict.fromkeys(variants)
        if options.memory:
            memory = {v: peak_memory(setting, v, mode) for v in track(variants, f"{mode}: peak memory")}
        results[mode] = {
            "variants": {
                str(variant): asdict(variant)
                | {
                    "seconds": seconds,
                    "seconds_spread": asdict(Spread.of(seconds)),
                    "peak_memory_mb": memory[variant],
                }
                for variant, seconds in measured.items()
            },
            "ratios": {
                name: asdict(spread) for name, spread in ratios(measured, options.kind, numbers).items()
            },
        }
    report = {
        "setting": asdict(setting),
        "environment": environment,
        "largest_error": errors,
        "results": results,
    }

    console = Console()
    for title, header, rows in to_tables(report):
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{setting.model}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    path.with_suffix(".md").write_text(to_markdown(report))
    console.print(f"Wrote {path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
