"""Timing in turns, and the spread of what was timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["FEWEST_ROUNDS", "Spread", "in_turns"]

FEWEST_ROUNDS = 2  # for a spread

# Seconds of work on a GPU that hide the launches and the wait at the end.
ROUND = 0.05
MOST_CALLS = 20

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def of_ratio(cls, numerators: list[float], denominators: list[float]) -> Spread:
        """Return the spread of the ratios within each round, which are free of drift."""
        return cls.of([a / b for a, b in zip(numerators, denominators, strict=True)])

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def in_turns(
    runs: dict[Key, Callable[[], None]],
    rounds: int,
    *,
    synchronize: Callable[[], None] | None = None,
    deadline: float | None = None,
) -> dict[Key, list[float]]:
    """Time one call of each in every round; everything has its turn in each round: A B C A B C.

    So whatever changes with time (clocks, temperature, other work on the machine) meets all alike.

    Args:
        runs: what to time, warmed up.
        rounds: at least FEWEST_ROUNDS.
        synchronize: waits for a GPU. With it, a round is several calls in a row, enough for ROUND seconds.
        deadline: of ``time.monotonic()``. After it no round begins, but for the first FEWEST_ROUNDS.
    """
    wait = synchronize or (lambda: None)
    calls = dict.fromkeys(runs, 1)
    for key, run in runs.items() if synchronize else ():
        calls[key] = max(1, min(MOST_CALLS, round(ROUND / _time(run, 1, wait))))
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for index in range(rounds):
        if index >= FEWEST_ROUNDS and deadline is not None and time.monotonic() > deadline:
            break
        for key, run in runs.items():
            seconds[key].append(_time(run, calls[key], wait))
    return seconds


def _time(run: Callable[[], None], calls: int, wait: Callable[[], None]) -> float:
    """Return the seconds of one of ``calls`` calls."""
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls
