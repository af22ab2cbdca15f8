"""Whole models end to end: every rival and every backend, checked and timed in turns.

One table for each number of prompts and batch, in order of importance, until the time is up; what is left out
is in the results with its reason. Example:

    python bench/models.py --out results.json --seconds 150
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from operations import per_image

from vapt_fast.benchmark import (
    LINEAR_PROBE,
    MODES,
    Comparison,
    Row,
    Setting,
    Variant,
    describe,
    gpu_state,
)
from vapt_fast.files import write_atomically

OURS = ("triton", "cuda", "auto")

# The literal method in all the ways that people run it, then the rewrites in plain PyTorch.
LITERAL = (
    Variant("reference", precision="float32", attention="explicit"),
    Variant("reference", precision="tf32", attention="explicit"),
    Variant("reference", precision="bfloat16-autocast", attention="explicit"),
    Variant("reference", precision="bfloat16"),
    Variant("reference", precision="bfloat16", cuda_graphs=False),
)
REWRITTEN = (
    Variant("torch", precision="bfloat16-autocast"),
    Variant("torch", precision="bfloat16"),
    Variant("torch", precision="bfloat16", attention="cudnn"),
    Variant("torch", precision="bfloat16", attention="flash"),
)
# With TF32 for what float32 weights multiply a compiler comes out fastest.
COMPILED, AUTOTUNED = (
    tuple(
        Variant(name, precision=precision, compile=mode)
        for name, precision in (
            ("reference", "bfloat16-tf32"),
            ("torch", "bfloat16"),
            ("torch", "bfloat16-tf32"),
            ("triton", "bfloat16-tf32"),
        )
    )
    for mode in ("default", "max-autotune-no-cudagraphs")
)
KERNELS = tuple(
    Variant(backend, precision=precision)
    for precision in ("bfloat16", "bfloat16-autocast")
    for backend in OURS
)
FP8 = Variant("auto", precision="bfloat16-fp8")
EAGER = Variant("auto", precision="bfloat16", cuda_graphs=False)
PROBE = Variant(LINEAR_PROBE, precision="bfloat16")

# What is compared in one table. Everything but "all" takes long to compile.
SETS = {
    "all": (*LITERAL, *REWRITTEN, *KERNELS, FP8, EAGER, PROBE),
    "compiled": (Variant("reference", precision="bfloat16"), *COMPILED, REWRITTEN[1], *KERNELS[: len(OURS)]),
    "autotuned": (
        Variant("reference", precision="bfloat16"),
        *AUTOTUNED,
        REWRITTEN[1],
        *KERNELS[: len(OURS)],
    ),
}
EVERY_VARIANT = {str(variant): variant for variants in SETS.values() for variant in variants}

NOT_YET = "left out: cut off before it was measured"

# By importance.
SIZES = ((50, 64), (50, 256), (100, 64), (10, 64), (100, 256), (10, 256))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON file, written after each part of a table")
    add("--set", default="all", choices=SETS, help="what to compare (%(default)s)")
    add("--only", action="append", choices=EVERY_VARIANT, help="only this; may be given several times")
    add("--left-out", type=json.loads, default={}, help='JSON: what is left out and why, {"name": "reason"}')
    add("--sizes", default=SIZES, type=_sizes, help="prompts x batch, as 50x64,10x256 (a few)")
    add("--seconds", type=float, default=150.0, help="after which nothing new begins (%(default)s)")
    add("--rounds", type=int, default=8, help="at most, at least 2 (%(default)s)")
    add("--model", default="vit_base_patch16_224", help="timm's name of the backbone (%(default)s)")
    add("--image-size", type=int, help="pixels (the backbone's own)")
    add("--device", default="cuda", help="(%(default)s)")
    add("--compiler", default="inductor", help="backend of torch.compile (%(default)s)")
    return parser.parse_args(arguments)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    pairs = (size.split("x") for size in text.split(","))
    return tuple((int(num_prompts), int(batch)) for num_prompts, batch in pairs)


def measure(options: argparse.Namespace) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of a table and what is known of it, again after each of its parts.

    A table is its setting and its rows, as JSON takes them.
    """
    end = time.monotonic() + options.seconds
    parts = [(mode, graph) for graph in (False, True) for mode in MODES]
    preparation = 0.0  # seconds that a table took before anything was timed
    for index, (num_prompts, batch) in enumerate(options.sizes):
        setting = Setting(
            model=options.model,
            batch=batch,
            device=options.device,
            threads=torch.get_num_threads(),
            image_size=options.image_size,
            compiler=options.compiler,
        )
        names = options.only or [str(variant) for variant in SETS[options.set]]
        variants = [_with_prompts(EVERY_VARIANT[name], num_prompts) for name in names]
        left_out = {v: options.left_out[str(v)] for v in variants if str(v) in options.left_out}
        chosen = [variant for variant in variants if variant not in left_out]
        if index > 0 and time.monotonic() + preparation > end:
            left_out, chosen = dict.fromkeys(variants, "left out: no time was left"), []
        print(f"P = {num_prompts}, batch {batch}: {len(chosen)} to compare", flush=True)
        began = time.monotonic()
        # On a CPU each figure of memory would take a process of its own.
        comparison = Comparison(setting, chosen, memory=setting.on_gpu, progress=_print)
        preparation = max(preparation, time.monotonic() - began)
        reserved = preparation * (len(options.sizes) - index - 1)
        table = {
            "set": options.set,
            "setting": asdict(setting),
            "operations_per_image": _operations(setting, num_prompts) if chosen else None,
        }
        rows: dict[tuple[Variant, str, bool], Row] = {}
        for number, (mode, graph) in enumerate(parts):
            still = (len(options.sizes) - index) * len(parts) - number
            deadline = time.monotonic() + (end - reserved - time.monotonic()) / still
            for row in comparison.measure(mode, rounds=options.rounds, graph=graph, deadline=deadline):
                rows[row.variant, mode, graph] = row
            for variant, reason in left_out.items():
                rows[variant, mode, graph] = Row(variant, mode, graph, error=reason)
            yield (
                index,
                table
                | {
                    "gpu_state": gpu_state(),  # clocks and temperature under load
                    "rows": [
                        (rows.get((variant, *part)) or Row(variant, *part, error=NOT_YET)).as_dict()
                        | {"name": str(variant)}
                        for part in parts
                        for variant in variants
                    ],
                },
            )
        del comparison  # its models and graphs, before the next ones are made
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()


def _print(line: str) -> None:
    print(f"  {line}", flush=True)


def _with_prompts(variant: Variant, num_prompts: int) -> Variant:
    return variant if variant.backend == LINEAR_PROBE else replace(variant, num_prompts=num_prompts)


def _operations(setting: Setting, num_prompts: int) -> dict[str, dict[str, int]]:
    """Count operations by mode and method, "literal" or "rewritten"; see operations.py."""
    methods = {"literal": "reference", "rewritten": "torch"}
    return {
        mode: {
            method: per_image(setting, Variant(backend, num_prompts=num_prompts), mode)
            for method, backend in methods.items()
        }
        for mode in MODES
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    results: dict[str, Any] = {"environment": describe(options.device), "comparisons": []}
    for index, comparison in measure(options):
        results["comparisons"][index:] = [comparison]
        write_atomically(options.out, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
