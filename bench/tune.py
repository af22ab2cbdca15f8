"""Launch configurations of the Triton kernels: measured on the GPU that is here, or compiled for another one.

Every kernel has candidates: block sizes, warps, stages. Each must give the right numbers before it is timed,
by itself and in turns with the default, over several sets of inputs, in CUDA graphs. What is slower than the
default at one size is not tried at others that share an entry of the table. What beats the default by more
than the noise is written to vapt_fast/ops/tuned.json, where launches look it up. Compilation is spread over
all cores and done before anything is timed. With the same --out a run goes on where the last one was cut off.

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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from candidates import KERNELS, NAMES, Candidates, candidates
from harness import TOLERANCES, Sizes, outputs_and_gradients
from torch import Tensor

from vapt_fast.benchmark.agreement import relative_error
from vapt_fast.files import write_atomically
from vapt_fast.ops.triton_launch import Config, launch
from vapt_fast.ops.tuned import TABLE

# Patches, and channels and heads of ViT-S, B and L.
GRID = (14, 14)
MODELS = {"S": (384, 6), "B": (768, 12), "L": (1024, 16)}
SIZES = ((50, 64), (50, 256), (10, 64), (100, 64), (50, 8), (10, 256), (100, 256))  # prompts x images
BETTER = 1.03  # times as fast as the default: what is less is noise
SETS, REPEATS, REPLAYS = 3, 4, 5
FAILED = "failed"
CONFIG = ("blocks", "num_warps", "num_stages")


@dataclass(frozen=True)
class Case:
    """An op at one size."""

    op: str
    model: str
    prompts: int
    batch: int
    dtype: str

    def sizes(self, device: str) -> Sizes:
        dim, heads = MODELS[self.model]
        dtype = getattr(torch, self.dtype)
        return Sizes(torch.device(device), dtype, self.batch, GRID, dim, heads, 4 * dim)


# ---- what is launched


class Question(NamedTuple):
    """What a table of configurations is asked: a kernel, and the sizes that an entry would be for."""

    kernel: str
    sizes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, to be repeated: its arguments are kept alive."""

    jit: Any
    config: Config
    programs: int
    args: tuple
    constants: dict[str, Any]

    def __call__(self) -> None:
        launch(self.jit, self.config, self.programs, *self.args, **self.constants)

    def compile(self) -> None:
        """Put the kernel into Triton's cache, and run nothing."""
        self.jit.warmup(*self.args, grid=(1,), **self.constants, **self.config.options)


@contextmanager
def watched(
    configs: dict[Question, Config], change: dict[Question, Config], launching: bool
) -> Iterator[dict[Question, list[Launch]]]:
    """Collect the launches of ops in the ``with`` block by what their configuration was asked for.

    Args:
        configs: the answers. The default is added where there is none, as an object of its own: it tells
            what a launch was asked for.
        change: other answers to some questions, that take the place of those.
        launching: whether the kernels run. Without, what the ops return is what their memory held before.
    """
    found: dict[Question, list[Launch]] = {}

    def tuned(kernel: str, default: Config, **sizes: int) -> Config:
        question = Question(kernel, tuple(sizes.items()))
        default = configs.setdefault(question, replace(default))
        return change.get(question, default)

    def record(jit: Any, config: Config, programs: int, *args: Any, **constants: Any) -> None:
        one = Launch(jit, config, programs, args, constants)
        for question, own in (configs | change).items():
            if own is config and jit.__name__.startswith(question.kernel):
                found.setdefault(question, []).append(one)
        if launching:
            one()

    with ExitStack() as patches:
        for op in KERNELS:
            tuning, triton = (
                importlib.import_module(f"vapt_fast.ops.{op}.{name}") for name in ("tuning", "triton")
            )
            patches.callback(tuning.config.cache_clear)  # last of all
            patches.enter_context(mock.patch.object(tuning, "tuned", tuned))
            patches.enter_context(mock.patch.object(triton, "launch", record))
            tuning.config.cache_clear()
        yield found


class Runner:
    """An op at one size: its inputs, what is right, and its launches."""

    def __init__(self, case: Case, device: str, sets: int) -> None:
        self.case, self.sizes = case, case.sizes(device)
        module = importlib.import_module(f"ops.{case.op}")
        self.job = module.job(self.sizes, case.prompts)
        self.function = module.implementation("triton", self.sizes)
        torch.manual_seed(0)
        self.inputs = [self.job.make() for _ in range(sets)]
        self.right: list[Tensor] = []
        self.limits: list[float] = []
        self.configs: dict[Question, Config] = {}

    def launches(
        self, change: dict[Question, Config] | None = None, launching: bool = True
    ) -> dict[Question, list[Launch]]:
        """Run the op on each set of inputs, and return its launches.

        The first run, by the defaults, must agree with the definition in float64. A ``change`` of
        configurations must not be further off than twice as much, or a tenth of what is allowed.
        """
        changed = {question: self.merged(question, config) for question, config in (change or {}).items()}
        with watched(self.configs, changed, launching) as found, empty_is_nan():
            for inputs in self.inputs:
                values = outputs_and_gradients(self.function, inputs)
                if launching and inputs is self.inputs[0]:
                    self._check(values)
        return {question: of for question, of in found.items() if question.kernel in self.kernels}

    @property
    def kernels(self) -> list[str]:
        return [f"{self.case.op}_{kernel}" for kernel in KERNELS[self.case.op]]

    def merged(self, question: Question, config: Config) -> Config:
        return replace(config, blocks=self.configs[question].blocks | config.blocks)

    def candidates(self, question: Question) -> Candidates:
        """Return what is to be tried besides the default."""
        return [
            config
            for config in candidates(question.kernel, dict(question.sizes))
            if self.merged(question, config) != self.configs[question]
            and without_batch(key_of(self.case, question, config)) not in UNFIT
        ]

    def _check(self, ours: list[Tensor]) -> None:
        tolerance = TOLERANCES[self.sizes.dtype]
        if not self.right:
            exact = [t.detach().double().requires_grad_(t.requires_grad) for t in self.inputs[0]]
            self.right = outputs_and_gradients(self.job.definition, exact)
        pairs = zip(ours, self.right, strict=True)
        errors = [relative_error(mine.double(), right) for mine, right in pairs]
        limits = self.limits or [tolerance] * len(errors)
        for error, limit in zip(errors, limits, strict=True):
            if not error <= limit:
                raise ArithmeticError(f"an output or gradient is off by {error:.1e}, allowed is {limit:.1e}")
        self.limits = self.limits or [max(2 * error, tolerance / 10) for error in errors]


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """Fill what ``torch.empty`` returns, which may hold what is right from the run before."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def captured(launches: list[Launch]) -> torch.cuda.CUDAGraph:
    """Return a graph of the launches, each of them several times.

    ``torch.cuda.graph`` would return all cached memory to the device, which takes longer than all the rest.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for again in launches * REPEATS:
                again()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def in_turns(*graphs: torch.cuda.CUDAGraph) -> list[float]:
    """Return the median time of each graph in microseconds."""
    turns = []
    for graph in graphs * (1 + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        turns.append((start, end))
    torch.cuda.synchronize()
    times = [1e3 * start.elapsed_time(end) for start, end in turns[len(graphs) :]]
    return [statistics.median(times[i :: len(graphs)]) for i in range(len(graphs))]


def cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case(op, model, prompts, batch, dtype)
        for dtype, model, (prompts, batch) in product(options.dtypes, options.models, options.sizes)
        for op, kernels in KERNELS.items()
        if any(f"{op}_{kernel}" in options.kernels for kernel in kernels)
        # The norm of a block knows no prompts.
        if op != "add_norm" or prompts == options.sizes[0][0]
    ]


def described(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in CONFIG}


def key_of(case: Case, question: Question, config: Config | None) -> str:
    """Return what a result is known by."""
    return json.dumps([asdict(case), *question, None if config is None else described(config)])


def without_batch(key: str) -> str:
    """Return what all results have in common that only differ in their batch, as those of --dry are."""
    case, *rest = json.loads(key)
    return json.dumps([case | {"batch": None}, *rest])


def is_unfit(result: dict[str, Any]) -> bool:
    """Whether a candidate spills or does not fit, as --dry found."""
    return FAILED in result or result.get("stack", 0) > 0


UNFIT: set[str] = set()
"""The keys of what a dry run found to spill or not to fit."""


# ---- with a GPU


def compile_all(options: argparse.Namespace) -> None:
    """Fill Triton's cache, in as many processes as there are cores."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    count = os.cpu_count() or 1
    workers = [subprocess.Popen([*command, "--worker", f"{i}/{count}"]) for i in range(count)]
    for worker in workers:
        worker.wait()


def work(options: argparse.Namespace, device: str = "cuda") -> None:
    """Compile a part of all candidates: each at all sizes, which share what is compiled."""
    index, count = map(int, options.worker.split("/"))
    end = time.monotonic() + options.seconds * 0.6
    numbers: dict[str, int] = {}
    for case in cases(options):
        runner = Runner(case, device, 1)
        for question in runner.launches(launching=False):
            if question.kernel not in options.kernels:
                continue
            for config in [runner.configs[question], *runner.candidates(question)]:
                key = json.dumps([case.dtype, question.kernel, described(config)])
                if numbers.setdefault(key, len(numbers)) % count != index:
                    continue
                if time.monotonic() > end:
                    return
                try:
                    for one in runner.launches({question: config}, launching=False)[question]:
                        one.compile()
                except Exception as error:  # it shows again, with its reason, where it is measured
                    print(f"{question} {config}: {error}", file=sys.stderr)


def is_slower(result: dict[str, Any]) -> bool:
    """Whether a candidate lost to the default, so that it can't be the best of all sizes."""
    return FAILED in result or result["us"] > BETTER * result["default_us"]


def name_of(result: dict[str, Any]) -> str:
    """Return a candidate's name among all sizes that share an entry."""
    return json.dumps([result[key] for key in ("kernel", "sizes", *CONFIG)])


def measure(
    options: argparse.Namespace, known: dict[str, dict[str, Any]], device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """Yield a result for each candidate that neither is ``known`` nor lost at another size."""
    end = time.monotonic() + options.seconds
    lost = {name_of(result) for result in known.values() if is_slower(result)}
    for case in cases(options):
        if time.monotonic() > end:
            return
        try:
            runner = Runner(case, device, SETS)
            defaults = runner.launches()
        except Exception as error:  # the other kernels shall be measured
            print(f"{case}: {error}", file=sys.stderr)
            continue
        for question, launches in defaults.items():
            if question.kernel not in options.kernels:
                continue
            if time.monotonic() > end:  # not in between: only what all sizes have can be compared
                return
            default = None
            for config in runner.candidates(question):
                result = {"key": key_of(case, question, config), **asdict(case), "kernel": question.kernel}
                result |= {"sizes": dict(question.sizes), **described(config)}
                if result["key"] in known or name_of(result) in lost:
                    continue
                try:
                    changed = runner.launches({question: config})[question]
                    default = default or captured(launches)
                    times = in_turns(default, captured(changed))
                    result["default_us"], result["us"] = (us / REPEATS / len(changed) for us in times)
                except Exception as error:  # too much shared memory, wrong numbers: a candidate less
                    result[FAILED] = str(error).partition("\n")[0]
                if is_slower(result):
                    lost.add(name_of(result))
                yield result
                if FAILED in result and device == "cuda":
                    torch.cuda.synchronize()  # fails too if the process can't use the GPU any more
        del runner, defaults
        torch.cuda.empty_cache()


def table_of(results: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return entries of tuned.json for what was measured, by kernel; without blocks where the default won.

    Cases that share an entry, as those of several batches do, were measured one by one. The best candidate
    has the largest mean of its ratios to the default, and is nowhere slower.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for result in results:
        case = json.dumps(json.loads(result["key"])[0])
        ratio = 0.0 if is_slower(result) else result["default_us"] / result["us"]
        question = json.dumps([result["kernel"], result["sizes"]])
        found.setdefault(question, {}).setdefault(name_of(result), {})[case] = ratio
    table: dict[str, list[dict[str, Any]]] = {}
    for question, of in found.items():
        every = set().union(*of.values())
        means = {
            statistics.geometric_mean(ratios.values()): name
            for name, ratios in of.items()
            if ratios.keys() == every and all(ratios.values())
        }
        kernel, sizes = json.loads(question)
        entry = {"sizes": sizes, "ratio": 1.0}
        if means and (ratio := max(means)) >= BETTER:
            chosen = dict(zip(CONFIG, json.loads(means[ratio])[2:], strict=True))
            entry = {"sizes": sizes, **chosen, "ratio": round(ratio, 2)}
        table.setdefault(kernel, []).append(entry)
    return table


def write_table(found: dict[str, list[dict[str, Any]]]) -> None:
    """Put what was measured on this GPU into the table of the launches; what it has for other sizes stays."""
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    table = json.loads(TABLE.read_text())
    own = table.setdefault(".".join(map(str, capability)), {"kernels": {}})
    own |= {"device": name, "date": str(date.today())}
    for kernel, entries in found.items():
        measured = [entry["sizes"] for entry in entries]
        kept = [entry for entry in own["kernels"].get(kernel, []) if entry["sizes"] not in measured]
        own["kernels"][kernel] = kept + [entry for entry in entries if "blocks" in entry]
    write_atomically(TABLE, (json.dumps(table, indent=1) + "\n").encode())


# ---- without


def dry_run(options: argparse.Namespace, known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Compile each candidate ahead of time; yield what it needs of a multiprocessor."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "tools"))
    from compiled import compile_launch, recorded_launches

    end = time.monotonic() + options.seconds
    for case in cases(options):
        with recorded_launches():  # tensors of the CPU are taken
            runner = Runner(replace(case, batch=2), "cpu", 1)
            for question in runner.launches(launching=False):
                for config in [None, *runner.candidates(question)]:
                    key = key_of(case, question, config)
                    if key in known or question.kernel not in options.kernels:
                        continue
                    if time.monotonic() > end:
                        return
                    result = {"key": key, **asdict(case), **question._asdict()}
                    result |= {} if config is None else described(config)
                    try:
                        change = {} if config is None else {question: config}
                        for one in runner.launches(change, launching=False)[question]:
                            launched = one.jit, one.args, one.constants | one.config.options
                            needs = compile_launch(launched, options.capability)
                            result |= {key: max(of, result.get(key, 0)) for key, of in needs.items()}
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
        UNFIT.update(without_batch(r["key"]) for r in map(json.loads, lines) if is_unfit(r))
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
            if is_unfit(result):
                print(result["kernel"], *(f"{k}={v}" for k, v in result.get("blocks", {}).items()), result)
        return
    found = table_of(known.values())
    print(json.dumps(found, indent=1))
    if not options.no_table:
        write_table(found)


if __name__ == "__main__":
    main()
