"""The processes of bench/gpu.py, each with a time limit, and what they found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["Process", "Session"]

LONGEST_LOG = 200_000  # characters of one process, the last ones


class Process:
    """A process with children, in a group of its own; what it prints is in a file.

    It does not run in this checkout: there ``python -m`` would import the sources, not what was installed.
    """

    def __init__(self, command: list[str], environment: dict[str, str], scratch: Path) -> None:
        self.command = command
        descriptor, path = tempfile.mkstemp(dir=scratch, suffix=".log")
        self._path = Path(path)
        with os.fdopen(descriptor, "w") as file:
            self._process = subprocess.Popen(
                command, cwd=scratch, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float) -> int | None:
        """Return the exit code; None if it overran, and was interrupted as by Ctrl-C, and at last killed."""
        try:
            return self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            pass
        for sign, patience in ((signal.SIGINT, 8), (signal.SIGKILL, None)):
            os.killpg(self._process.pid, sign)
            try:
                self._process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        return None

    def output(self) -> str:
        return self._path.read_text(errors="replace")


class Session:
    """One run of bench/gpu.py: its results so far and the processes that it starts.

    Attributes:
        results: the content of results.json.
        wrong: every reason to exit with 1.
        left_out: by the names of variants, why they are not measured.
    """

    def __init__(self, out: Path, minutes: float, *, dry: bool = False) -> None:
        self.out, self.dry = out.resolve(), dry
        self.device = "cpu" if self.dry else "cuda"
        self.results: dict[str, Any] = {"dry": self.dry, "phases": {}, "comparisons": []}
        self.wrong: list[str] = []
        self.left_out: dict[str, str] = {}
        self.end = time.monotonic() + 60 * minutes
        self.scratch = Path(tempfile.mkdtemp(prefix="vapt_fast_gpu_"))
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.processes: list[Process] = []
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "log.txt").open("w")

    def start(self, *command: object) -> Process:
        process = Process([str(part) for part in command], self.environment, self.scratch)
        self.processes.append(process)
        return process

    def finish(self, process: Process, seconds: float) -> int | None:
        """Wait at most ``seconds``; return the exit code, or None if it had to be stopped."""
        code = process.wait(seconds)
        printed = process.output()[-LONGEST_LOG:]
        self.log.write(f"\n==== {' '.join(process.command)}\n==== exit code {code}\n{printed}")
        self.log.flush()
        return code

    def call(self, seconds: float, *command: object) -> tuple[int | None, str]:
        """Run a process; return its exit code, None if it had to be stopped, and what it printed."""
        process = self.start(*command)
        return self.finish(process, seconds), process.output()

    def add_to_path(self, folder: Path) -> None:
        paths = [str(folder), self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    def close(self) -> None:
        """Stop whatever still runs: nothing outlives this program."""
        for process in self.processes:
            process.wait(0)
        self.log.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def write(self) -> None:
        """Write the results so far, so that nothing is lost if this process is killed."""
        self.results["wrong"] = self.wrong
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
