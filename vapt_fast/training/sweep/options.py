"""SweepOptions: everything that decides what a sweep computes, and the runs that it comes to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...config import PromptConfig
from ...files import write_atomically
from ..errors import UserError, check_types
from ..methods import METHODS, method_name
from ..options import RunOptions
from ..suites import SUITES, find_data_set, is_suite_data
from .protocols import PROTOCOLS

__all__ = ["SWEEP_NAME", "Cell", "Run", "SweepOptions"]

SWEEP_NAME = "sweep.json"

BACKBONE = "vit_base_patch16_224.orig_in21k"
"""The default: the published checkpoint, of which ``augreg_in21k`` is another that scores differently."""


@dataclass(frozen=True)
class Run:
    """One training of a sweep.

    Attributes:
        name: of its folder within the sweep's.
        options: what it computes.
        last: it is one of the trainings that are tested, and not one to choose by.
    """

    name: str
    options: RunOptions
    last: bool


@dataclass(frozen=True)
class SweepOptions:
    """The options of a sweep, kept in its folder.

    Attributes:
        data: names of data sets, as "vtab:cifar"; "vtab" and "fgvc" stand for all of a suite.
        methods: keys of METHODS.
        protocol: key of PROTOCOLS.
        seeds: of the trainings that are tested, the first of them of those to choose by too; None for the
            protocol's.
        train_shares: shares of the training images, each a column of its own; 1 is all.
        num_prompts: numbers of prompts to choose one of, for methods with prompts; None for the default.
        run: what differs from the protocol's, as RunOptions has it, with ``recipe`` and ``prompts``.
        threads: of each process on the CPU. The last bits of results depend on it.
        processes_per_run: how many train each run together, each with its part of every batch and on its own
            device. The last bits depend on it, and dropout, which each process draws by itself.

    Raises:
        UserError: an unknown name, a value out of range or of the wrong type, or nothing to do.
    """

    data: list[str]
    methods: list[str]
    protocol: str = "paper"
    seeds: list[int] | None = None
    train_shares: list[float] = field(default_factory=lambda: [1.0])
    num_prompts: list[int] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    processes_per_run: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        data = [name for given in self.data for name in _expanded(given)]
        object.__setattr__(self, "data", _unique("data", data))
        object.__setattr__(self, "methods", _unique("methods", [method_name(name) for name in self.methods]))
        object.__setattr__(self, "train_shares", _unique("train_shares", map(float, self.train_shares)))
        if self.protocol not in PROTOCOLS:
            raise UserError(f"protocol must be one of {tuple(PROTOCOLS)}, got {self.protocol!r}")
        for name in ("seeds", "num_prompts"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _unique(name, getattr(self, name)))
        for name in ("threads", "processes_per_run"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for cell in self.cells():  # what is wrong with the options of a run shows here
            cell.candidates()

    @classmethod
    def read(cls, folder: Path) -> SweepOptions:
        """Return the options of the sweep in ``folder``.

        Raises:
            UserError: there is none, or another version of this library started it.
        """
        path = folder / SWEEP_NAME
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
            version = options.pop("library_version")
        except FileNotFoundError as error:
            raise UserError(
                f"{path} does not exist: there is no sweep in {folder}; give data to start one"
            ) from error
        except (ValueError, AttributeError, KeyError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if version != __version__:
            raise UserError(f"{path} was written by vapt_fast {version}, and this is {__version__}")
        return cls(**options)

    def write(self, folder: Path) -> None:
        """Keep the options in ``folder``."""
        options = {"library_version": __version__, **asdict(self)}
        write_atomically(folder / SWEEP_NAME, json.dumps(options, indent=2).encode())

    @property
    def tested_seeds(self) -> tuple[int, ...]:
        """The seeds of the trainings that are tested."""
        return PROTOCOLS[self.protocol].seeds if self.seeds is None else tuple(self.seeds)

    def cells(self) -> list[Cell]:
        """Return the cells of the table, one for each data set, method and share."""
        return [Cell(self, *of) for of in product(self.data, self.methods, self.train_shares)]


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep's table: a method on a share of a data set."""

    sweep: SweepOptions
    data: str
    method: str
    share: float

    @property
    def name(self) -> str:
        """The name of its folder within the sweep's."""
        share = "" if self.share == 1 else f"-{_digits(self.share)}"
        return f"runs/{self.data.replace(':', '-')}/{self.method}{share}"

    def candidates(self) -> list[Run]:
        """Return the trainings to choose by, which never look at a test image; one if there is no choice."""
        given, training = self.sweep.run, PROTOCOLS[self.sweep.protocol].training(self.method)
        base_lrs = given.get("base_lrs") or training.base_lrs
        weight_decays = given.get("weight_decays") or training.weight_decays
        numbers: list[int | None] = [None]
        if self.sweep.num_prompts is not None and _has_prompts(self.method):
            numbers = [*self.sweep.num_prompts]
        return [self._candidate(*of) for of in product(base_lrs, weight_decays, numbers)]

    def last(self, chosen: Run) -> list[Run]:
        """Return the trainings that are tested, one for each seed, of the candidate that was chosen."""
        suite = find_data_set(self.data)[0].name
        both = suite in PROTOCOLS[self.sweep.protocol].train_on_validation
        return [
            Run(
                f"{self.name}/seed-{seed}",
                replace(
                    chosen.options,
                    recipe={**chosen.options.recipe, "seed": seed},
                    train_on_validation=both,
                    test=True,
                ),
                last=True,
            )
            for seed in self.sweep.tested_seeds
        ]

    def _candidate(self, base_lr: float, weight_decay: float, num_prompts: int | None) -> Run:
        protocol, given = PROTOCOLS[self.sweep.protocol], self.sweep.run
        training, suite = protocol.training(self.method), find_data_set(self.data)[0].name
        number = {} if num_prompts is None else {"num_prompts": num_prompts}
        default = {"num_prompts": PromptConfig.num_prompts}
        prompts = {**default, **training.prompts, **given.get("prompts", {}), **number}
        changes = {
            "data": self.data,
            "method": self.method,
            "base_lrs": [base_lr],
            "weight_decays": [weight_decay],
            "train_share": None if self.share == 1 else self.share,
            "recipe": {**training.recipe, **given.get("recipe", {}), "seed": self.sweep.tested_seeds[0]},
            "prompts": prompts if _has_prompts(self.method) else {},
            "test": False,
        }
        try:
            options = RunOptions(**{"backbone": BACKBONE, **protocol.suites[suite], **given, **changes})
            options.recipes()
            PromptConfig(**options.prompts)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        places = "" if num_prompts is None else f"-prompts-{num_prompts}"
        name = f"{self.name}/lr-{_digits(base_lr)}-decay-{_digits(weight_decay)}{places}"
        return Run(name, options, last=False)


def _digits(number: float) -> str:
    """Return a number as short as it can be told from all others."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _has_prompts(method: str) -> bool:
    changes = METHODS[method].prompts
    return changes is not None and "num_prompts" not in changes


def _expanded(name: str) -> list[str]:
    """Return the data sets that a name stands for."""
    if name in SUITES:
        return [f"{name}:{member}" for member in SUITES[name].data_sets]
    if not is_suite_data(name):
        raise UserError(
            f"data must be one of {tuple(SUITES)} or name a data set, as 'vtab:cifar', got {name!r}"
        )
    find_data_set(name)
    return [name]


def _unique(name: str, values: Iterable[Any]) -> list[Any]:
    found = list(dict.fromkeys(values))
    if not found:
        raise UserError(f"{name} must have at least one entry")
    return found
