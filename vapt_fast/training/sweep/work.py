"""The work of a sweep: runs that several processes share, each of which is computed once.

A run is claimed by a lock on a file in its folder, which the system releases when the process that holds it
ends, however it ends. What it leaves is a checkpoint, from which another process goes on to the same bits.
Its result is one file, which is there whole or not at all.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch.distributed import is_torchelastic_launched

from ...files import write_atomically
from ..errors import DivergedError, UserError
from ..inputs import INPUTS_NAME
from ..launch import launch
from ..lora import import_peft
from ..methods import METHODS
from ..options import RESULT_NAME, RunOptions
from ..parallel import joined, rank, wait
from ..run import check_options
from ..run import run as train
from ..search import CHECKPOINT_NAME
from ..suites import open_data_set
from .engines import ENGINES, spread
from .options import SWEEP_NAME, Cell, Run, SweepOptions

__all__ = ["Places", "chosen_run", "free_devices", "is_finished", "perform", "read_result", "sweep"]

CLAIM_NAME = "claim.lock"
WRITER_NAME = "writer.lock"

Progress = Callable[[int, int], None]
"""Called with the number of runs that are finished, and of all runs that the sweep comes to."""


@dataclass(frozen=True)
class Places:
    """Where runs are computed; results do not depend on it, but for the device.

    Attributes:
        devices: by name, as "cuda:1"; each has one run at a time, unless there are more jobs than devices.
        engine: one of ENGINES.
        jobs: runs at the same time; None for as many as there are devices for with joblib, and for what the
            cluster has with Ray.
        workers: processes that read images, of each process that trains.
        save_models: keep the models that are tested, in the folders of their runs.
        poll: seconds between two looks at runs that other processes are at.
    """

    devices: tuple[str, ...] = ("cpu",)
    engine: str = "joblib"
    jobs: int | None = None
    workers: int = 0
    save_models: bool = False
    poll: float = 5.0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"engine must be one of {ENGINES}, got {self.engine!r}")
        if not self.devices:
            raise UserError("devices must name at least one")
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"jobs must be at least 1, got {self.jobs}")

    def groups(self, size: int) -> tuple[tuple[str, ...], ...]:
        """Return the devices of each run that ``size`` processes train: a GPU a process, or one CPU for all.

        With Ray one group, of a single name: it gives each run its GPUs.

        Raises:
            UserError: the devices can't be shared out so.
        """
        if self.engine == "ray" or size == 1:
            return tuple((name,) for name in self.devices)
        names = [name for name in self.devices for _ in range(size if name == "cpu" else 1)]
        groups = [tuple(names[first : first + size]) for first in range(0, len(names), size)]
        for group in groups:
            if len(group) < size or len(set(group)) != (1 if "cpu" in group else size):
                raise UserError(
                    f"each run needs {size} devices for its {size} processes, or the CPU: devices must be a "
                    f"multiple of {size} different GPUs, or cpu, got {', '.join(self.devices)}"
                )
        return tuple(groups)


def sweep(
    options: SweepOptions, folder: Path, places: Places = Places(), progress: Progress | None = None
) -> None:
    """Compute what is left of a sweep: the same call goes on where an earlier one has stopped.

    Several processes, also of several machines that share the folder, may do so at the same time.

    Args:
        options: what to compute; those of the sweep in ``folder``, if there is one.
        folder: where to write.
        places: where to compute it.
        progress: see Progress.

    Raises:
        UserError: another sweep in the folder, lists of images that are missing or wrong, a run that can't be
            carried out, data that has changed, or several processes a run without devices for them.
        ModuleNotFoundError: the engine or PEFT is missing.
        OSError: the disk is full, or the like.
    """
    cells = options.cells()
    groups = places.groups(options.processes_per_run)
    if options.processes_per_run > 1 and is_torchelastic_launched():
        raise UserError(
            f"processes_per_run={options.processes_per_run} can't be had under torchrun, each of whose "
            "processes trains runs of its own: start the sweep without torchrun"
        )
    if options.processes_per_run == 1 and options.run.get("shard"):
        raise UserError(
            "shard spreads weights over the processes of a run: give more than 1 processes_per_run"
        )
    _check_inputs(cells)
    if (folder / SWEEP_NAME).exists():
        _check_same(SweepOptions.read(folder), options, folder)
    else:
        options.write(folder)
    total = sum(len(_to_choose_by(cell)) + len(options.tested_seeds) for cell in cells)
    jobs = places.jobs or (len(groups) if places.engine == "joblib" else None)
    gpu = places.devices[0].startswith("cuda")
    with tempfile.TemporaryDirectory() as slots:
        work = partial(perform, folder, places, options, Path(slots))
        share = partial(spread, places.engine, work, jobs=jobs, gpu=gpu, processes=options.processes_per_run)
        while any(_open_runs(cell, folder) for cell in cells):
            done = sum(is_finished(run, folder) for cell in cells for run in _known_runs(cell, folder))
            computed = False
            # Twice, and each cell when its turn comes: a choice that is made has runs to follow.
            calls = ((run,) for cell in cells * 2 for run in _open_runs(cell, folder))
            for mine in share(calls):
                computed, done = computed or mine, done + mine
                if progress is not None:
                    progress(done, total)
            if not computed:
                time.sleep(places.poll)


def perform(folder: Path, places: Places, options: SweepOptions, slots: Path, run: Run) -> bool:
    """Compute a run, unless its result is there or another process is at it.

    Args:
        folder: of the sweep.
        places: where to compute it.
        options: of the sweep.
        slots: folder of the locks by which processes of one command share the devices.
        run: the run.

    Returns:
        Whether it was computed here.

    Raises:
        UserError: it can't be carried out; the message names it.
        OSError: the disk is full, or the like.
    """
    place = folder / run.name
    place.mkdir(parents=True, exist_ok=True)
    with _claimed(place / CLAIM_NAME) as mine:
        if not mine or is_finished(run, folder):
            return False
        processes = options.processes_per_run
        with free_devices(places, processes, slots) as devices:
            try:
                if processes == 1:
                    _compute(run, place, places, options.threads, devices[0])
                else:
                    launch(_compute_part, run, place, places, options.threads, devices, processes=processes)
            except UserError as error:
                raise UserError(f"{run.name}: {error}") from error
        return is_finished(run, folder)


def _compute_part(run: Run, place: Path, places: Places, threads: int, devices: tuple[str, ...]) -> None:
    """Do the part of one of several processes that ``launch`` has started."""
    with joined(*devices) as device, _only_writer(place):
        wait()
        _compute(run, place, places, threads, device)


def _only_writer(place: Path) -> AbstractContextManager[Any]:
    """Wait for an earlier writer of a run, which may outlive the process with the claim by a moment."""
    return FileLock(place / WRITER_NAME) if rank() == 0 else nullcontext()


def _compute(run: Run, place: Path, places: Places, threads: int, device: str) -> None:
    """Train, from the checkpoint that an earlier process may have left."""
    torch.set_num_threads(threads)
    begun = (place / INPUTS_NAME).exists()  # which is written last before training starts
    if begun and RunOptions.read(place) != run.options:
        raise UserError(f"{place} has a run of other options: give another folder")
    try:
        train(
            run.options,
            place,
            resume=begun,
            device=device,
            workers=places.workers,
            validate_every=run.options.recipes()[0].epochs,
            check=False,
            save=places.save_models and run.last,
        )
    except DivergedError:
        if rank() == 0:
            write_atomically(place / RESULT_NAME, json.dumps({"diverged": True}).encode())
            (place / CHECKPOINT_NAME).unlink(missing_ok=True)


@contextmanager
def free_devices(places: Places, processes: int, slots: Path) -> Iterator[tuple[str, ...]]:
    """Give a run devices that no other run of this command has; Ray gives it those it may use."""
    groups = places.groups(processes)
    if places.engine == "ray":
        yield groups[0]
        return
    jobs = places.jobs or len(groups)
    groups *= -(-jobs // len(groups))
    for index in cycle(range(len(groups))):
        with _claimed(slots / f"{index}.lock") as mine:
            if mine:
                yield groups[index]
                return


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Hold the lock on a file; yield whether this process got it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_finished(run: Run, folder: Path) -> bool:
    """Return whether a run's result is in the folder of its sweep."""
    return (folder / run.name / RESULT_NAME).exists()


def read_result(run: Run, folder: Path) -> dict[str, Any] | None:
    """Return the result of a run, {"diverged": True} of one that diverged, None if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / run.name / RESULT_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; remove it, and the run is computed again") from error


def chosen_run(cell: Cell, folder: Path) -> Run | None:
    """Return the candidate that did best on the validation images; of several, the one of the least rate.

    A further tie is for the smaller weight decay and the smaller number of prompts. None as long as not all
    have results, or if all diverged.
    """
    candidates = cell.candidates()
    if len(candidates) == 1:
        return candidates[0]
    results = [read_result(run, folder) for run in candidates]
    known = [result for result in results if result is not None]
    if len(known) < len(results):
        return None

    def merit(of: tuple[Run, dict[str, Any]]) -> tuple[float, ...]:
        run, result = of
        recipe = run.options.recipes()[0]
        number = run.options.prompts.get("num_prompts", 0)
        return (result["validation_accuracy"], -recipe.base_lr, -recipe.weight_decay, -number)

    able = [of for of in zip(candidates, known, strict=True) if not of[1].get("diverged")]
    return max(able, key=merit)[0] if able else None


def _to_choose_by(cell: Cell) -> list[Run]:
    candidates = cell.candidates()
    return candidates if len(candidates) > 1 else []


def _known_runs(cell: Cell, folder: Path) -> list[Run]:
    """Return the runs of a cell that are known so far: the tested ones are when the choice is made."""
    chosen = chosen_run(cell, folder)
    return [*_to_choose_by(cell), *([] if chosen is None else cell.last(chosen))]


def _open_runs(cell: Cell, folder: Path) -> list[Run]:
    """Return the runs without a result: those to choose by, or when there are none left, the tested ones."""
    searched = [run for run in _to_choose_by(cell) if not is_finished(run, folder)]
    if searched:
        return searched
    chosen = chosen_run(cell, folder)
    return [] if chosen is None else [run for run in cell.last(chosen) if not is_finished(run, folder)]


def _check_inputs(cells: list[Cell]) -> None:
    """Check what would otherwise show when a sweep is half done."""
    if any(METHODS[cell.method].lora for cell in cells):
        import_peft()
    first = [cell.candidates()[0].options for cell in cells]
    for chosen in {options.data: options for options in first}.values():
        open_data_set(chosen.data, chosen.root, other_sizes=chosen.other_sizes)
    for chosen in {(options.method, options.image_size): options for options in first}.values():
        check_options(chosen)


def _check_same(then: SweepOptions, now: SweepOptions, folder: Path) -> None:
    for name, before in asdict(then).items():
        if before != asdict(now)[name]:
            raise UserError(
                f"the sweep in {folder} was started with {name}={before}, got {asdict(now)[name]}: leave the "
                "options out to go on with it, or give another folder"
            )
