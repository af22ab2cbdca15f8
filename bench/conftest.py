"""Options of the benchmarks, and the fixtures that measure. See README.md for the commands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from agreement import models_agree
from environment import describe
from memory import peak_memory
from workload import Setting, Variant


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vapt_fast", "benchmarks of vapt_fast")
    Setting.add_options(group.addoption)
    group.addoption("--prompts", default="10,50,100", help="numbers of prompts to measure (%(default)s)")
    group.addoption("--rounds", type=int, help="timed runs of each model (CPU: 5, GPU: 30)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "num_prompts" in metafunc.fixturenames:
        numbers = [int(number) for number in metafunc.config.getoption("--prompts").split(",")]
        metafunc.parametrize("num_prompts", numbers, ids="P{}".format)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= describe(Setting.from_options(config.option).device)


@pytest.fixture(scope="session")
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting.from_options(request.config.option)


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest, setting: Setting) -> int:
    return request.config.getoption("--rounds") or (5 if setting.device == "cpu" else 30)


@pytest.fixture
def measure(benchmark, setting: Setting, rounds: int) -> Callable:
    """``measure(run, group, rounds)``: time ``run``, which returns when the device is done."""

    def measure(run: Callable[[], None], group: str, rounds: int = rounds) -> None:
        benchmark.group = group
        benchmark.pedantic(run, setup=setting.synchronize, rounds=rounds, warmup_rounds=2)

    return measure


@pytest.fixture
def record_memory(benchmark, setting: Setting) -> Callable[[Variant, str], None]:
    """``record_memory(variant, mode)``: put the peak memory into the benchmark's extra_info."""

    def record(variant: Variant, mode: str) -> None:
        if benchmark.enabled:
            benchmark.extra_info["peak_memory_mb"] = peak_memory(setting, variant, mode)

    return record


@pytest.fixture
def models_gate(benchmark, setting: Setting) -> Callable[[str, int], None]:
    """``models_gate(kind, num_prompts)`` fails the benchmark unless the backends agree."""

    def gate(kind: str, num_prompts: int) -> None:
        benchmark.extra_info["largest_error"] = models_agree(setting, kind, num_prompts)

    return gate
