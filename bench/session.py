"""The processes of bench/gpu.py, each with a time limit, and what they found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Process", "Session"]

PATIENCE = 8.0  # seconds that an interrupted process has to end by itself


class Process:
    """A process with children, in a group of its own; what it prints is in a file.

    It does not run in this checkout: there ``python -m`` would import the sources, not what was installed.
    """

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            print("$", *command, file=file, flush=True)
            self._header = file.tell()
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float | None) -> int | None:
        """Return the exit code; None if it still runs after ``seconds`` (None: however long it takes)."""
        try:
            return self._process.wait(None if seconds is None else max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None

    def send(self, sign: signal.Signals) -> None:
        os.killpg(self._process.pid, sign)

    def output(self) -> str:
        with self._log.open(errors="replace") as file:
            file.seek(self._header)
            return file.read()


class Session:
    """One run of bench/gpu.py: its results so far and the processes that it starts.

    Whatever is in ``out`` is written while it comes: a run that is cut off leaves what it has.

    Attributes:
        results: the content of results.json.
        wrong: every reason to exit with 1.
        left_out: by the names of variants, why they are not measured.
        parts: the folder where processes write their own results.
        phase: the name of the running phase, after which logs are named.
    """

    def __init__(self, out: Path, minutes: float, *, dry: bool = False, wheels: Path | None = None) -> None:
        self.out, self.dry = out.resolve(), dry
        self.wheels = None if wheels is None else wheels.resolve()
        self.device = "cpu" if self.dry else "cuda"
        self.results: dict[str, Any] = {"dry": self.dry, "missing": [], "phases": {}, "comparisons": []}
        self.wrong: list[str] = []
        self.left_out: dict[str, str] = {}
        self.end = time.monotonic() + 60 * minutes
        self.scratch = Path(tempfile.mkdtemp(prefix="vapt_fast_gpu_"))
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if dry:  # more threads only wait for each other in tiny models
            self.environment["OMP_NUM_THREADS"] = "1"
        self.processes: list[Process] = []
        self.parts, self._logs = self.out / "parts", self.out / "logs"
        self.phase = "start"
        for folder in (self.parts, self._logs):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def missing(self, sentence: str) -> None:
        """Record what this machine lacks, and what that means."""
        print(f"missing: {sentence}", flush=True)
        self.results["missing"].append(sentence)

    def start(self, *command: object) -> Process:
        log = self._logs / f"{len(self.processes):02}-{self.phase}.txt"
        process = Process([str(part) for part in command], self.environment, self.scratch, log)
        self.processes.append(process)
        return process

    def call(self, seconds: float, *command: object) -> tuple[int | None, str]:
        """Run a process; return its exit code, None if it had to be stopped, and what it printed."""
        process = self.start(*command)
        code = process.wait(seconds)
        if code is None:
            stop([process])
        return code, process.output()

    def together(
        self,
        commands: Mapping[str, Sequence[object]],
        seconds: float,
        ended: Callable[[str, int | None, str], None],
        at_once: int | None = None,
    ) -> None:
        """Run several processes at once, and write the results after each.

        Args:
            commands: by names of their own.
            seconds: for all of them together.
            ended: gets each one's name, exit code (None: it was stopped, or never ran) and output.
            at_once: how many; as many as there are CPUs.
        """
        until = time.monotonic() + seconds
        waiting, running = list(commands), dict[str, Process]()
        at_once = at_once or os.cpu_count() or 1
        while waiting or running:
            if time.monotonic() > until:
                stop(list(running.values()))
                for name in (*running, *waiting):
                    ended(name, None, running[name].output() if name in running else "")
                break
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                running[name] = self.start(*commands[name])
            for name, code in [(name, process.wait(0)) for name, process in running.items()]:
                if code is not None:
                    ended(name, code, running.pop(name).output())
            self.write()
            time.sleep(0.1)
        self.write()

    def add_to_path(self, folder: Path) -> None:
        paths = [str(folder), self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    def close(self) -> None:
        """Stop whatever still runs: nothing outlives this program."""
        stop(self.processes)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def write(self) -> None:
        """Write the results so far, whole or not at all."""
        self.results["wrong"] = self.wrong
        new = self.out / "results.json.new"
        new.write_text(json.dumps(self.results, indent=1) + "\n")
        new.replace(self.out / "results.json")


def stop(processes: Sequence[Process]) -> None:
    """Interrupt all that run, as by Ctrl-C, and kill those that take no notice."""
    for sign, patience in ((signal.SIGINT, PATIENCE), (signal.SIGKILL, None)):
        running = [process for process in processes if process.wait(0) is None]
        for process in running:
            process.send(sign)
        until = None if patience is None else time.monotonic() + patience
        for process in running:
            process.wait(None if until is None else until - time.monotonic())
