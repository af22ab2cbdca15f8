"""Launch configurations of the Triton kernels: measured on the GPU that is here, or compiled for another one.

Every kernel has candidates: block sizes, warps, stages. Each must give the right numbers before it is timed,
by itself, over several sets of inputs, in a CUDA graph. What beats the configuration in use by more than the
noise is written to vapt_fast/ops/tuned.json, where launches look it up. Compilation is spread over all cores
and done before anything is timed. With the same --out a run goes on where the last one was cut off.

Without a GPU, --dry compiles all candidates ahead of time for the architecture of --capability, and lists
those that spill registers or need more shared memory than there is. Examples:

    python bench/tune.py --out tuning.jsonl --seconds 150
    python bench/tune.py --out tuning.jsonl --kernels prompt_pool_fwd prompt_projector_fwd --sizes 50x64
    python bench/tune.py --out dry.jsonl --dry --models B --sizes 50x64
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import TOLERANCES, Sizes, outputs_and_gradients
from torch import Tensor

from vapt_fast.files import write_atomically
from vapt_fast.ops.triton_launch import Config, launch
from vapt_fast.ops.tuned import TABLE

Candidates = list[Config]

# Channels and heads of ViT-S, B and L, all with a grid of 14 x 14 patches.
MODELS = {"S": (384, 6), "B": (768, 12), "L": (1024, 16)}
SIZES = ((50, 64), (50, 256), (10, 64), (100, 64), (50, 8), (10, 256), (100, 256))  # prompts x images
BETTER = 1.03  # times as fast as the default: what is less is noise
SETS, REPEATS, REPLAYS = 3, 4, 7
FAILED = "failed"


def blocks(names: str, *choices: tuple[int, ...]) -> Iterator[dict[str, int]]:
    """Yield each combination of block sizes, BLOCK_R to BLOCK_... for the letters or words of ``names``."""
    for values in product(*choices):
        yield {f"BLOCK_{name}": value for name, value in zip(names.split(), values, strict=True)}


def configs(found: Iterator[dict[str, int]], warps: tuple[int, ...], stages: tuple[int, ...]) -> Candidates:
    return [Config(of, w, s) for of in found for w in warps for s in stages]


def candidates(kernel: str, sizes: dict[str, int]) -> Candidates:
    """Return what to try for ``kernel`` where ``sizes`` are those that its table was asked for."""
    rows = min(128, max(16, 1 << (sizes.get("rows", 1) - 1).bit_length()))
    whole = 1 << (sizes.get("channels", 768) - 1).bit_length()
    projector = configs(blocks("ROWS C", (16,), (32, 64, 128, 256)), (4, 8), (1, 2, 3))
    table: dict[str, Callable[[], Candidates]] = {
        "prompt_pool_weights": lambda: configs(blocks("R T", (4, 8, 16), (64, 256)), (4,), (1,)),
        "prompt_pool_fwd": lambda: configs(
            blocks("R T C", (min(rows, 64),), (32, 64), (64, 128)), (4,), (2, 3, 4)
        ),
        "prompt_pool_bwd_grads": lambda: configs(blocks("R C", (8, 16, 32), (64, 128)), (4,), (1,)),
        "prompt_pool_bwd_products": lambda: configs(
            blocks("R T C", (min(rows, 64),), (32, 64), (32, 64)), (4,), (2, 3, 4)
        ),
        "prompt_pool_bwd_tokens": lambda: configs(
            blocks("T R C", (64,), (16, 32, min(rows, 64)), (64, 128)), (4,), (1, 2)
        ),
        "prompt_projector_fwd": lambda: projector,
        "prompt_projector_bwd_rows": lambda: projector,
        "prompt_projector_bwd_weights": lambda: configs(
            blocks("ROWS C", (16, 32), (32, 64, 128)), (4,), (2, 3)
        ),
        "prompt_attention_fwd": lambda: configs(
            blocks("QUERIES TOKENS PROMPTS", (64, 128), (32, 64), (16, 32, 64)), (4, 8), (2, 3)
        ),
        "prompt_attention_bwd_queries": lambda: configs(
            blocks("QUERIES TOKENS PROMPTS", (64, 128), (32, 64), (16, 32, 64)), (4, 8), (2, 3)
        ),
        "prompt_attention_bwd_keys": lambda: configs(
            blocks("QUERIES KEYS", (32, 64), (32, 64, 128)), (4, 8), (2, 3, 4)
        ),
        "add_norm_fwd": lambda: configs(blocks("T C", (1, 2, 4), (256, whole)), (1, 2, 4), (1,)),
        "add_norm_bwd": lambda: configs(blocks("T C", (1, 2, 4), (256, whole)), (1, 2, 4), (1,)),
    }
    unique = {repr(config): config for config in table[kernel]()}
    return list(unique.values())


KERNELS = {
    "prompt_pool": ("weights", "fwd", "bwd_grads", "bwd_products", "bwd_tokens"),
    "prompt_projector": ("fwd", "bwd_rows", "bwd_weights"),
    "prompt_attention": ("fwd", "bwd_queries", "bwd_keys"),
    "add_norm": ("fwd", "bwd"),
}
NAMES = tuple(f"{op}_{kernel}" for op, kernels in KERNELS.items() for kernel in kernels)


@dataclass(frozen=True)
class Case:
    """A kernel of an op at one size."""

    op: str
    kernel: str
    model: str
    prompts: int
    batch: int
    dtype: str

    def sizes(self, device: str) -> Sizes:
        dim, heads = MODELS[self.model]
        dtype = getattr(torch, self.dtype)
        return Sizes(torch.device(device), dtype, self.batch, (14, 14), dim, heads, 4 * dim)


class Tables:
    """The tables of configurations, watched: what they are asked for, and one answer changed."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[Config, dict[str, int]]] = {}
        self.overrides: dict[str, Config] = {}

    def tuned(self, kernel: str, default: Config, **sizes: int) -> Config:
        """Return the override merged into ``default``; remember what was asked."""
        self.asked[kernel] = default, sizes
        found = self.overrides.get(kernel)
        if found is None:
            return default
        return Config(default.blocks | found.blocks, found.num_warps, found.num_stages)

    @contextmanager
    def override(self, kernel: str, config: Config | None) -> Iterator[None]:
        """Let ``kernel`` be launched by ``config``, or by the default for None."""
        modules = [importlib.import_module(f"vapt_fast.ops.{op}.tuning") for op in KERNELS]
        self.overrides = {} if config is None else {kernel: config}
        with mock.patch.multiple(modules[0], tuned=self.tuned):
            patches = [mock.patch.object(module, "tuned", self.tuned) for module in modules[1:]]
            for patch in patches:
                patch.start()
            for module in modules:
                module.config.cache_clear()
            try:
                yield
            finally:
                for patch in patches:
                    patch.stop()
                for module in modules:
                    module.config.cache_clear()


@contextmanager
def recorded(kernel: str) -> Iterator[list[Callable[[], None]]]:
    """Collect the launches of ``kernel`` in the ``with`` block, as functions that launch it again."""
    found: list[Callable[[], None]] = []

    def record(jit: Any, config: Config, programs: int, *args: Any, **constants: Any) -> None:
        launch(jit, config, programs, *args, **constants)
        if jit.__name__.removesuffix("_kernel") == kernel:
            found.append(lambda: launch(jit, config, programs, *args, **constants))

    modules = [importlib.import_module(f"vapt_fast.ops.{op}.triton") for op in KERNELS]
    patches = [mock.patch.object(module, "launch", record) for module in modules]
    for patch in patches:
        patch.start()
    try:
        yield found
    finally:
        for patch in patches:
            patch.stop()


class Runner:
    """An op at one size: its inputs, what is right, and its kernels one at a time."""

    def __init__(self, case: Case, device: str = "cuda", sets: int = SETS) -> None:
        self.case, self.sizes = case, case.sizes(device)
        module = importlib.import_module(f"ops.{case.op}")
        self.job = module.job(self.sizes, case.prompts)
        self.function = module.implementation("triton", self.sizes)
        torch.manual_seed(0)
        self.inputs = [self.job.make() for _ in range(sets)]
        self.right: list[Tensor] | None = None
        self.tables = Tables()

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        return outputs_and_gradients(self.function, inputs)

    def defaults(self, kernel: str) -> tuple[Config, dict[str, int]]:
        with self.tables.override(kernel, None):
            self.run(self.inputs[0])
        return self.tables.asked[kernel]

    def launches(self, kernel: str, config: Config | None) -> list[Callable[[], None]]:
        """Return a launch of ``kernel`` for each set of inputs, after its numbers were found to be right."""
        with self.tables.override(kernel, config), recorded(kernel) as found:
            first = self.run(self.inputs[0])
            self._check(first)
            for inputs in self.inputs[1:]:
                self.run(inputs)
        return found

    def _check(self, ours: list[Tensor]) -> None:
        if self.right is None:
            exact = [t.detach().double().requires_grad_(t.requires_grad) for t in self.inputs[0]]
            self.right = outputs_and_gradients(self.job.definition, exact)
        for mine, right in zip(ours, self.right, strict=True):
            error = ((mine.double() - right).norm() / right.norm()).item()
            if not error <= TOLERANCES[self.sizes.dtype]:
                raise ArithmeticError(f"an output or gradient is off by {error:.1e}")


def microseconds(launches: list[Callable[[], None]]) -> float:
    """Return the median time of a launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPEATS):
            for again in launches:
                again()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / (REPEATS * len(launches))


def cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case(op, f"{op}_{kernel}", model, prompts, batch, dtype)
        for dtype, model, (prompts, batch) in product(options.dtypes, options.models, options.sizes)
        for op, kernels in KERNELS.items()
        for kernel in kernels
        if f"{op}_{kernel}" in options.kernels
        # The norm of a block knows no prompts.
        if op != "add_norm" or prompts == options.sizes[0][0]
    ]


def key_of(case: Case, config: Config | None) -> str:
    return json.dumps([asdict(case), None if config is None else described(config)])


def described(config: Config) -> dict[str, Any]:
    return {"blocks": config.blocks, "num_warps": config.num_warps, "num_stages": config.num_stages}


# ---- with a GPU


def compile_all(options: argparse.Namespace) -> None:
    """Fill Triton's cache, in as many processes as there are cores."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    count = os.cpu_count() or 1
    workers = [subprocess.Popen([*command, "--worker", f"{i}/{count}"]) for i in range(count)]
    for worker in workers:
        worker.wait()


def work(options: argparse.Namespace) -> None:
    """Compile a part of all candidates, by running them once."""
    index, count = map(int, options.worker.split("/"))
    end = time.monotonic() + options.seconds * 0.6
    number = 0
    for case in cases(options):
        runner = None
        for config in [None, *_of(case)]:
            number += 1
            if number % count != index or time.monotonic() > end:
                continue
            runner = runner or Runner(case, sets=1)
            try:
                with runner.tables.override(case.kernel, config):
                    runner.run(runner.inputs[0])
            except Exception as error:  # it shows again, with its reason, where it is measured
                print(f"{case.kernel} {config}: {error}", file=sys.stderr)


UNFIT: set[str] = set()
"""What a dry run found to spill or not to fit, of a kernel, a model and a number of prompts."""


def _fit(of: dict[str, Any]) -> str:
    names = ("kernel", "model", "prompts", "dtype", "blocks", "num_warps", "num_stages")
    return json.dumps([of.get(name) for name in names])


def _of(case: Case) -> Candidates:
    """Return the candidates of a case, which do not depend on the batch."""
    channels = MODELS[case.model][0]
    found = candidates(case.kernel, {"rows": case.prompts, "channels": channels})
    return [config for config in found if _fit(asdict(case) | described(config)) not in UNFIT]


def measure(options: argparse.Namespace, known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a result for each candidate that ``known`` does not have."""
    end = time.monotonic() + options.seconds
    for case in cases(options):
        every = [None, *_of(case)]
        if all(key_of(case, config) in known for config in every):
            continue
        if time.monotonic() > end:
            return
        try:
            runner = Runner(case)
            default, sizes = runner.defaults(case.kernel)
        except Exception as error:  # the other kernels shall be measured
            print(f"{case}: {error}", file=sys.stderr)
            continue
        for config in every:
            if key_of(case, config) in known or time.monotonic() > end:
                continue
            result = {"key": key_of(case, config), **asdict(case), "sizes": sizes}
            result |= {"is_default": config is None, **described(default if config is None else config)}
            try:
                result["us"] = microseconds(runner.launches(case.kernel, config))
            except Exception as error:  # too much shared memory, wrong numbers: a candidate less
                result[FAILED] = str(error).partition("\n")[0]
            yield result
        del runner
        torch.cuda.empty_cache()


def table_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the best of each kernel and sizes as tuned.json has them; nothing where the default is."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if FAILED not in result:
            groups.setdefault(json.dumps([result["kernel"], result["sizes"]]), []).append(result)
    kernels: dict[str, list[dict[str, Any]]] = {}
    for of_sizes in groups.values():
        # The same sizes were measured in several batches: what is best in all, by the mean of the ratios.
        ratios: dict[str, list[float]] = {}
        batches = {result["batch"] for result in of_sizes}
        for batch in batches:
            found = [result for result in of_sizes if result["batch"] == batch]
            base = next((result["us"] for result in found if result["is_default"]), None)
            for result in found if base is not None else []:
                name = json.dumps({k: result[k] for k in ("blocks", "num_warps", "num_stages")})
                ratios.setdefault(name, []).append(base / result["us"])
        complete = {
            name: statistics.geometric_mean(r) for name, r in ratios.items() if len(r) == len(batches)
        }
        if not complete:
            continue
        best = max(complete, key=lambda name: complete[name])
        if complete[best] >= BETTER:
            entry = {"sizes": of_sizes[0]["sizes"], **json.loads(best), "ratio": round(complete[best], 2)}
            kernels.setdefault(of_sizes[0]["kernel"], []).append(entry)
    return kernels


def write_table(results: list[dict[str, Any]]) -> None:
    """Put what was measured on this GPU into the table of the launches; what it has for other sizes stays."""
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    table = json.loads(TABLE.read_text())
    own = table.setdefault(".".join(map(str, capability)), {"kernels": {}})
    own |= {"device": name, "date": str(date.today())}
    for kernel, entries in table_of(results).items():
        measured = [entry["sizes"] for entry in entries]
        kept = [entry for entry in own["kernels"].get(kernel, []) if entry["sizes"] not in measured]
        own["kernels"][kernel] = [*kept, *entries]
    write_atomically(TABLE, (json.dumps(table, indent=1) + "\n").encode())


# ---- without


def dry_run(options: argparse.Namespace, known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Compile each candidate ahead of time; yield what it needs of a multiprocessor."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "tools"))
    from compiled import compile_launch, recorded_launches

    end = time.monotonic() + options.seconds
    for case in cases(options):
        with recorded_launches() as launched:
            runner = Runner(Case(**asdict(case) | {"batch": 2}), device="cpu", sets=1)
            for config in [None, *_of(case)]:
                if key_of(case, config) in known:
                    continue
                if time.monotonic() > end:
                    return
                launched.clear()
                result = {"key": key_of(case, config), **asdict(case)}
                result |= {} if config is None else described(config)
                try:
                    with runner.tables.override(case.kernel, config):
                        runner.run(runner.inputs[0])
                    (own,) = [of for of in launched if of[0].__name__ == f"{case.kernel}_kernel"][:1]
                    result |= compile_launch(own, options.capability)
                except Exception as error:
                    result[FAILED] = str(error).partition("\n")[0]
                yield result


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON lines, one for each candidate; what is there is kept")
    add("--seconds", type=float, default=150.0, help="after which nothing new begins (%(default)s)")
    add("--kernels", nargs="+", choices=NAMES, default=NAMES, help="(all)")
    add("--sizes", type=_sizes, default=SIZES, help="prompts x images, as 50x64,10x256 (seven)")
    add("--models", nargs="+", choices=MODELS, default=["B", "S", "L"], help="ViT-S, B, L (%(default)s)")
    add("--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16", "float16"])
    add("--dry", action="store_true", help="compile ahead of time, without a GPU")
    add("--capability", type=int, default=90, help="to compile for (%(default)s)")
    add("--without", type=Path, help="what --dry wrote: leave out what spilled or failed there")
    add("--no-table", action="store_true", help="leave vapt_fast/ops/tuned.json as it is")
    add("--only", choices=("compile", "measure"), help="compile what is measured by another call, or measure")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    pairs = (size.split("x") for size in text.split(","))
    return tuple((int(num_prompts), int(batch)) for num_prompts, batch in pairs)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    if options.without is not None:
        lines = options.without.read_text().splitlines()
        UNFIT.update(_fit(r) for r in map(json.loads, lines) if FAILED in r or r.get("stack", 0) > 0)
    if options.worker is not None:
        work(options)
        return
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    known = {result["key"]: result for result in map(json.loads, lines)}
    began = time.monotonic()
    if not options.dry and options.only != "measure":
        compile_all(options)
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        options.seconds -= time.monotonic() - began
        if options.only == "compile":
            return
    with options.out.open("a") as file:
        for result in (dry_run if options.dry else measure)(options, known):
            known[result["key"]] = result
            print(json.dumps(result), file=file, flush=True)
    if options.dry:
        for result in known.values():
            if FAILED in result or result.get("stack", 0) > 0:
                print(result["kernel"], *(f"{k}={v}" for k, v in result.get("blocks", {}).items()), result)
        return
    found = table_of(list(known.values()))
    print(json.dumps(found, indent=1))
    if not options.no_table:
        write_table(list(known.values()))


if __name__ == "__main__":
    main()
