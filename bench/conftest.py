"""Options and fixtures of the benchmarks of the ops. See README.md for the commands."""

from __future__ import annotations

import time
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import MODES, Bench, Sizes

from vapt_fast.benchmark import describe

STARTED = time.monotonic()
OPS = sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[!_]*.py"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vapt_fast", "benchmarks of vapt_fast")
    group.addoption("--op", action="append", choices=OPS, help="only this; may be given several times")
    group.addoption("--device", help="cpu or cuda (cuda where there is one)")
    group.addoption("--dtype", help="dtype of the tokens (CPU: float32, GPU: bfloat16)")
    group.addoption("--batch", type=int, help="images (CPU: 2, GPU: 64)")
    group.addoption(
        "--prompts",
        default="50,10,100",
        help="numbers of prompts, compiled rivals with the first (%(default)s)",
    )
    group.addoption("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    group.addoption("--rounds", type=int, default=20, help="timed rounds of each (%(default)s)")
    group.addoption("--seconds", type=float, help="after which nothing new begins")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each op, number of prompts, rival and mode; an op without prompts has no such number."""
    cases = []
    for op in metafunc.config.getoption("--op") or OPS:
        module = import_module(f"ops.{op}")
        numbers = _numbers(metafunc.config) if module.PROMPTS else [None]
        for num_prompts, rival, mode in product(numbers, module.RIVALS, MODES):
            label = [op, *([] if num_prompts is None else [f"P{num_prompts}"]), rival, mode]
            cases.append(pytest.param(op, num_prompts, rival, mode, id="-".join(label)))
    metafunc.parametrize(("op", "num_prompts", "rival", "mode"), cases)


def _numbers(config: pytest.Config) -> list[int]:
    numbers = "3" if config.getoption("--tiny") else config.getoption("--prompts")
    return [int(number) for number in numbers.split(",")]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= describe(_device(config))


def _device(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Sizes:
    """The sizes of a ViT-B/16 at 224 x 224 pixels, or tiny ones."""
    option, device = request.config.getoption, torch.device(_device(request.config))
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, option("--dtype") or ("bfloat16" if on_gpu else "float32"))
    if option("--tiny"):
        return Sizes(device, dtype, batch=2, grid=(4, 4), dim=32, heads=2, hidden=64, compiler="eager")
    batch = option("--batch") or (64 if on_gpu else 2)
    return Sizes(device, dtype, batch=batch, grid=(14, 14), dim=768, heads=12, hidden=3072)


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, sizes: Sizes) -> Bench:
    """The check and the timing of one implementation of one op."""
    seconds = request.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - STARTED > seconds:
        pytest.skip("left out: no time was left")
    parameters = request.node.callspec.params
    first = _numbers(request.config)[0]
    if "compiled" in parameters["rival"] and parameters["num_prompts"] not in (None, first):
        pytest.skip(f"compiled with {first} prompts only, because it takes long")
    return Bench(benchmark, sizes, request.config.getoption("--rounds"))
