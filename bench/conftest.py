"""Options and fixtures of the benchmarks of the ops. See README.md for the commands."""

from __future__ import annotations

import time

import pytest
import torch
from harness import Bench, Sizes

from vapt_fast.benchmark import describe

STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vapt_fast", "benchmarks of vapt_fast")
    group.addoption("--device", help="cpu or cuda (cuda where there is one)")
    group.addoption("--dtype", help="of tokens (CPU: float32, GPU: bfloat16)")
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
    if "num_prompts" in metafunc.fixturenames:
        metafunc.parametrize("num_prompts", _numbers(metafunc.config), ids="P{}".format)


def _numbers(config: pytest.Config) -> list[int]:
    numbers = "3" if config.getoption("--tiny") else config.getoption("--prompts")
    return [int(number) for number in numbers.split(",")]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= describe(_device(config))


def _device(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Sizes:
    """Of a ViT-B/16 at 224 x 224 pixels, or tiny."""
    option, device = request.config.getoption, torch.device(_device(request.config))
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, option("--dtype") or ("bfloat16" if on_gpu else "float32"))
    if option("--tiny"):
        return Sizes(device, dtype, batch=2, grid=(4, 4), dim=32, heads=2, hidden=64, compiler="eager")
    batch = option("--batch") or (64 if on_gpu else 2)
    return Sizes(device, dtype, batch=batch, grid=(14, 14), dim=768, heads=12, hidden=3072)


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark, sizes: Sizes) -> Bench:
    """What checks and times one implementation of one op."""
    seconds = request.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - STARTED > seconds:
        pytest.skip("left out: no time was left")
    parameters = request.node.callspec.params
    first = _numbers(request.config)[0]
    if "compiled" in parameters["rival"] and parameters.get("num_prompts", first) != first:
        pytest.skip(f"compiled with {first} prompts only, because it takes long")
    return Bench(benchmark, sizes, request.config.getoption("--rounds"))
