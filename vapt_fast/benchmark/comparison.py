"""Several variants of one model, checked against the literal method and timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .agreement import DisagreementError, check, relative_errors
from .memory import allocated, peak_allocated, peak_resident
from .timing import Spread, in_turns
from .workload import LINEAR_PROBE, MODES, WARM_UP, Setting, Variant, Workload, backbone_of

__all__ = ["Comparison", "Row", "as_table"]


@dataclass(frozen=True)
class Row:
    """The measurements of one variant, or why there are none.

    Attributes:
        variant: what ran.
        mode: one of MODES.
        graph: whether all of it ran as one CUDA graph, captured by hand.
        seconds: of one call, in each round; empty where nothing was timed.
        peak_memory_mb: see ``memory``; None where it was not measured.
        largest_error: of logits and gradients against the literal method in float32 (float64 for float64),
            relative to each one's norm; None for a linear probe.
        error: why nothing was timed, or None.
        wrong: whether that is because its numbers are wrong.
    """

    variant: Variant
    mode: str
    graph: bool
    seconds: list[float] = field(default_factory=list)
    peak_memory_mb: float | None = None
    largest_error: float | None = None
    error: str | None = None
    wrong: bool = False

    @property
    def spread(self) -> Spread | None:
        """The median and quartiles of the seconds; None if there are none."""
        return Spread.of(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON, with the spread of the seconds."""
        spread = self.spread
        return asdict(self) | {"seconds_spread": None if spread is None else asdict(spread)}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Row:
        """Return the row whose ``as_dict`` is ``given``; unknown keys are left out."""
        known = {name: given[name] for name in cls.__dataclass_fields__ if name in given}
        return cls(**known | {"variant": Variant(**given["variant"])})


class Comparison:
    """Variants side by side: each is made, checked and warmed up, then all are timed in turns.

    A variant that fails, for whatever reason, is reported with the reason and left out; the others go on.

    Args:
        setting: what they share.
        variants: what to compare.
        modes: of MODES, what will be measured.
        memory: whether to measure peak memory (on a CPU this takes a process for each figure).
        progress: called with a line about what is being done.
    """

    def __init__(
        self,
        setting: Setting,
        variants: Sequence[Variant],
        modes: Sequence[str] = MODES,
        *,
        memory: bool = True,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.setting = setting
        self.variants = list(variants)
        self._progress = progress
        self._failures: dict[Variant, tuple[str, bool]] = {}
        self._errors: dict[Variant, float] = {}
        self._memory: dict[tuple[Variant, str], float | None] = {}
        self._workloads: dict[Variant, Workload] = {}
        self._expected: dict[Variant, dict[str, Tensor]] = {}
        self._pool: Any = None
        for variant in self.variants:
            progress(f"{variant}, P = {variant.num_prompts}: check and warm up")
            self._attempt(variant, partial(self._prepare, variant, modes, memory))
        self._expected.clear()

    def measure(
        self, mode: str, *, rounds: int, graph: bool = False, deadline: float | None = None
    ) -> list[Row]:
        """Time one mode, all variants in turns; see ``timing.in_turns``.

        Args:
            mode: one of MODES.
            rounds: at least 2.
            graph: time CUDA graphs, all of them.
            deadline: of ``time.monotonic()``, after which no more rounds begin.
        """
        runs: dict[Variant, Callable[[], None]] = {}
        if graph and self.setting.on_gpu:
            self._pool = torch.cuda.graph_pool_handle()  # that of graphs which are gone takes no others
        for variant, workload in list(self._workloads.items()):
            if graph and variant not in self._failures:
                self._progress(f"{variant}, P = {variant.num_prompts}: capture the {mode}")
                run = self._attempt(variant, partial(self._capture, workload, mode))
            else:
                run = workload.runner(mode)
            if variant not in self._failures:
                runs[variant] = run
        self._progress(f"{mode}: time {len(runs)} in turns")
        synchronize = self.setting.synchronize if self.setting.on_gpu else None
        seconds = in_turns(runs, rounds, synchronize=synchronize, deadline=deadline) if runs else {}
        return [
            Row(
                variant=variant,
                mode=mode,
                graph=graph,
                seconds=seconds.get(variant, []),
                peak_memory_mb=self._memory.get((variant, mode)),
                largest_error=self._errors.get(variant),
                error=self._failures[variant][0] if variant in self._failures else None,
                wrong=variant in self._failures and self._failures[variant][1],
            )
            for variant in self.variants
        ]

    def _prepare(self, variant: Variant, modes: Sequence[str], memory: bool) -> None:
        backbone_of(self.setting)
        is_probe = variant.backend == LINEAR_PROBE
        expected, literal = ({}, {}) if is_probe else self._yardstick(variant)
        gc.collect()
        before = allocated(self.setting)
        workload = Workload(self.setting, variant)
        if not is_probe:
            errors = relative_errors(workload.outputs(), expected)
            self._errors[variant] = check(errors, literal, workload.precision)
        for mode in modes:
            run = workload.runner(mode)
            for _ in range(WARM_UP):
                run()
            if memory:
                self._memory[variant, mode] = (
                    peak_allocated(run, self.setting, before)
                    if self.setting.on_gpu
                    else peak_resident(self.setting, variant, mode)
                )
        self.setting.synchronize()
        self._workloads[variant] = workload

    def _yardstick(self, variant: Variant) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the literal method's outputs in full precision, and its errors in that of ``variant``."""
        literal = Variant("reference", variant.kind, variant.num_prompts, variant.precision)
        exact = replace(literal, precision="float64" if variant.precision == "float64" else "float32")
        expected = self._outputs(exact)
        return expected, relative_errors(self._outputs(literal), expected)

    def _outputs(self, variant: Variant) -> dict[str, Tensor]:
        if variant not in self._expected:
            self._expected[variant] = Workload(self.setting, variant).outputs()
        return self._expected[variant]

    def _capture(self, workload: Workload, mode: str) -> Callable[[], None]:
        if not self.setting.on_gpu:
            raise RuntimeError("a CUDA graph needs a CUDA GPU")
        return workload.captured(mode, self._pool)

    def _attempt(self, variant: Variant, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever it is, the others' figures shall not be lost
            message = str(error).strip().partition("\n")[0]
            self._failures[variant] = (
                f"{type(error).__name__}: {message}",
                isinstance(error, DisagreementError),
            )
        gc.collect()
        if self.setting.on_gpu:
            torch.cuda.empty_cache()
        return None


def as_table(
    rows: Sequence[Row], batch: int, name: Callable[[Variant], str] = str
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of rows of one mode; the speed is relative to the first row of equal P."""
    header = ["", "P", "images/s", "speed", "ms", "quartiles", "peak MB", "error"]
    first: dict[int, list[float]] = {}
    table = []
    for row in rows:
        prompts, spread = row.variant.num_prompts, row.spread
        cells = [name(row.variant), str(prompts) if prompts else ""]
        if spread is None:
            table.append([*cells, "-", "", "", "", "", ""])
            continue
        ratio = Spread.of_ratio(first.setdefault(prompts, row.seconds), row.seconds)
        table.append(
            [
                *cells,
                f"{batch / spread.median:.4g}",
                "" if row.variant.backend == LINEAR_PROBE else f"{ratio.median:.2f}x",
                f"{1e3 * spread.median:.4g}",
                f"{1e3 * spread.low:.3g} to {1e3 * spread.high:.3g}",
                "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}",
                "" if row.largest_error is None else f"{row.largest_error:.0e}",
            ]
        )
    return header, table
