"""Everything that needs a GPU in one command and a fixed time: tests, memory checker, benchmarks, plots.

It installs nothing into the environment that it finds and needs no network. Each phase is a process with its
own time limit; what fails or overruns is recorded and the next one runs. Writes to --out:

    results.json   everything, with versions, device and date
    results.md     the tables
    models.png, ops.png
    tests.xml      every test (JUnit)
    log.txt        what the phases printed

The exit code is 1 where something computes wrong numbers or a test fails. Examples:

    python bench/gpu.py --out results
    python bench/gpu.py --out results --phases autotuned     # the long compilations
    python bench/gpu.py --out results --dry                  # the same on a CPU, tiny, to see that it runs
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from session import Process, Session

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
NEEDED = ("torch", "timm", "safetensors", "typer", "rich", "pytest", "pytest_benchmark")
SANITIZERS = ("memcheck", "initcheck", "racecheck", "synccheck")
FOUND_ERRORS = 86  # exit code of compute-sanitizer, so that it is told from a crash

# What is prepared beside the tests, each in a process: it compiles, and a crash shows before it can take
# the other figures along.
PREPARED = {
    "all": ("triton, bfloat16", "triton, bfloat16-autocast", "cuda, bfloat16", "auto, bfloat16"),
    "compiled": tuple(f"{name}, bfloat16, compiled" for name in ("reference", "torch", "triton")),
}


@dataclass(frozen=True)
class Phase:
    """A step with its time limit in seconds; ``run`` puts what it found into the results."""

    name: str
    seconds: float
    run: Callable[[Session, float], None]


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results")
    add("--minutes", type=float, help="for everything (8.75; dry: 60, for slow machines)")
    add("--phases", nargs="+", choices=[p.name for p in PHASES], help="all but autotuned")
    add("--long", action="store_true", help="also autotuned, whose compilations take long")
    add("--dry", action="store_true", help="on the CPU with tiny sizes")
    return parser.parse_args(arguments)


# ---- the phases


def install(session: Session, seconds: float) -> None:
    """Install the package for the processes that follow, in a folder of its own."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    site = session.scratch / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site)
    if missing:  # perhaps PIP_FIND_LINKS has them
        if session.call(seconds / 3, *pip, *missing)[0] != 0:
            raise SystemExit(
                f"missing here: {', '.join(missing)}. Carry them as wheels: set PIP_FIND_LINKS to a folder "
                "that has them, or PYTHONPATH to one where they are installed"
            )
        session.add_to_path(site)
    if _is_installed():
        session.results["installation"] = "this checkout was installed already"
        return
    # Compiled for the GPU that is here alone.
    probe = "import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}{b}' + 'a' * (a == 9))"
    code, printed = session.call(seconds / 3, sys.executable, "-c", probe)
    if code == 0:
        session.environment.setdefault("VAPT_FAST_CUDA_ARCHS", printed.split()[-1])
    code, printed = session.call(seconds, *pip, "--no-build-isolation", ROOT)
    session.results["installation"] = "pip install --no-build-isolation --target"
    if code != 0:  # then without what has to be built
        session.results["installation"] = f"links; pip failed: {printed.strip()[-500:]}"
        site = session.scratch / "links"
        (site / "vapt_fast").mkdir(parents=True)
        for path in (*(ROOT / "vapt_fast").iterdir(), ROOT / "kernels"):
            (site / "vapt_fast" / path.name).symlink_to(path)
    session.add_to_path(site)


def _is_installed() -> bool:
    """Whether this checkout is installed, in editable mode."""
    try:
        origin = importlib.metadata.distribution("vapt_fast").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    return origin is not None and json.loads(origin)["url"] == ROOT.as_uri()


def environment(session: Session, seconds: float) -> None:
    """Record versions, driver, clocks, device, date, and what vapt_fast says would run."""
    code, printed = session.call(seconds, sys.executable, BENCH / "environment.py", session.device)
    if code != 0:
        raise RuntimeError(f"vapt_fast can't be imported: {printed.strip()[-500:]}")
    session.results |= json.loads(printed.splitlines()[-1])


def tests(session: Session, seconds: float) -> None:
    """Run the tests that need a GPU. Beside them, since nothing is timed, compute-sanitizer watches every op,
    and what takes long to compile, or might crash, is prepared."""
    until = time.monotonic() + seconds
    watched = _start_sanitizer(session)
    prepared = {} if session.dry else _start_preparing(session)
    command = [sys.executable, "-m", "pytest", ROOT / "tests" / "gpu", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={session.out / 'tests.xml'}", "-m", "gpu"]
    if not session.dry and importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", "10", "--dist", "worksteal"]
    code, printed = session.call(seconds, *command)
    session.results["tests"] = {"exit_code": code, "summary": printed.strip().splitlines()[-1:]}
    if code != 0:
        session.wrong.append("tests: " + ("they took too long" if code is None else f"exit code {code}"))
    for name, process in prepared.items():
        _judge(session, name, session.finish(process, until - time.monotonic()))
    for name, process in watched.items():
        code = session.finish(process, until - time.monotonic())
        last = "".join(process.output().strip().splitlines()[-1:])
        found = "it took too long" if code is None else f"exit code {code}: {last}"
        session.results["sanitizer"][name] = found
        if code == FOUND_ERRORS:
            session.wrong.append(f"compute-sanitizer {name}: {last}")


def _start_sanitizer(session: Session) -> dict[str, Process]:
    """Start compute-sanitizer's tools, each over every op, forward and backward."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        session.results["sanitizer"] = dict.fromkeys(SANITIZERS, "compute-sanitizer is not installed")
        return {}
    session.results["sanitizer"] = {}
    script = ROOT / "tests" / "gpu" / "sanitized.py"
    options = ("--error-exitcode", FOUND_ERRORS)
    return {
        name: session.start(tool, "--tool", name, *options, sys.executable, script) for name in SANITIZERS
    }


def _start_preparing(session: Session) -> dict[str, Process]:
    return {
        name: session.start(
            *(sys.executable, BENCH / "models.py", "--out", session.scratch / f"{name}.json"),
            *("--set", table, "--only", name, "--sizes", "50x64"),
            *("--rounds", 2, "--seconds", 0),
        )
        for table, names in PREPARED.items()
        for name in names
    }


def _judge(session: Session, name: str, code: int | None) -> None:
    """Leave out what crashed or did not come back. Other failures show again, with their reasons."""
    if code is None:
        session.left_out[name] = "left out: it was not ready in time"
    elif code != 0:
        session.left_out[name] = f"left out: its process ended with exit code {code}, see log.txt"
        session.wrong.append(f"{name}: its process ended with exit code {code}")


def ops(session: Session, seconds: float) -> None:
    """Run the benchmarks of the ops, each op in a process of its own: a crash takes no other along."""
    names = sorted(path.stem for path in (BENCH / "ops").glob("[!_]*.py"))
    groups = [names] if session.dry else [[name] for name in names]
    until = time.monotonic() + seconds
    session.results["ops"] = []
    problems = []
    for index, group in enumerate(groups):
        path, log = (session.scratch / f"ops-{index}.{kind}" for kind in ("json", "xml"))
        share = (until - time.monotonic()) / (len(groups) - index)
        command = [sys.executable, "-m", "pytest", BENCH / "test_ops.py", "-q", "-p", "no:cacheprovider"]
        command += [f"--op={name}" for name in group]
        command += [f"--benchmark-json={path}", f"--junitxml={log}"]
        command += [f"--device={session.device}", f"--seconds={0.7 * share}"]
        code, printed = session.call(share, *command, *(["--tiny", "--rounds=2"] if session.dry else []))
        not_timed = _not_timed(log)
        session.results["ops"] += [*_timed(path), *not_timed]
        # What the gate of the benchmarks says. Another failure is a rival that can't run here.
        session.wrong += [f"{op['name']}: {op['error']}" for op in not_timed if "is off by" in op["error"]]
        if code != 0:
            summary = "took too long" if code is None else f"exit code {code}: {printed.strip()[-300:]}"
            problems.append(f"{', '.join(group)}: {summary}")
    if problems:
        raise RuntimeError("; ".join(problems))


def _timed(path: Path) -> list[dict[str, Any]]:
    """Return what pytest-benchmark wrote; nothing if it did not come to that."""
    try:
        benchmarks = json.loads(path.read_text())["benchmarks"]
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    return [{"name": _label(one["name"]), "group": one["group"], **one["extra_info"]} for one in benchmarks]


def _label(test: str) -> str:
    """Return what identifies a benchmark: the parameters in pytest's name of it."""
    return test.partition("[")[2].removesuffix("]")


def _not_timed(log: Path) -> list[dict[str, str]]:
    """Return the benchmarks that were left out or failed, with the reason, from pytest's JUnit file."""
    if not log.is_file():
        return []
    return [
        {"name": _label(case.get("name", "")), "error": problem.get("message", "").partition("\n")[0]}
        for case in ElementTree.parse(log).iter("testcase")
        for problem in case
        if problem.tag in ("skipped", "failure", "error")
    ]


def _models(which: str) -> Callable[[Session, float], None]:
    def run(session: Session, seconds: float) -> None:
        path = session.scratch / f"{which}.json"
        command = [sys.executable, BENCH / "models.py", "--out", path, "--set", which]
        command += ["--left-out", json.dumps(session.left_out), "--device", session.device]
        command += ["--seconds", 0.85 * seconds]
        if which != "all":
            command += ["--sizes", "50x64"]
        if session.dry:
            tiny = "--sizes 3x2 --model test_vit --image-size 32 --compiler eager --rounds 2"
            command += tiny.split()
        code, printed = session.call(seconds, *command)
        comparisons = json.loads(path.read_text())["comparisons"] if path.is_file() else []
        session.results["comparisons"] += comparisons
        for comparison in comparisons:
            for row in comparison["rows"]:
                if row["wrong"]:
                    session.wrong.append(f"{row['name']}: {row['error']}")
        if code != 0:
            raise RuntimeError("it took too long" if code is None else printed.strip()[-500:])

    return run


def report(session: Session, seconds: float) -> None:
    """Write the tables and pictures of what is in results.json."""
    session.write()
    code, printed = session.call(seconds, sys.executable, BENCH / "report.py", session.out)
    if code != 0:
        raise RuntimeError(printed.strip()[-500:])


# In this order; the benchmarks get the GPU for themselves.
PHASES = (
    Phase("install", 80, install),
    Phase("environment", 30, environment),
    Phase("tests", 180, tests),
    Phase("models", 145, _models("all")),
    Phase("compiled", 90, _models("compiled")),
    Phase("ops", 110, ops),
    Phase("autotuned", 480, _models("autotuned")),
    Phase("report", 20, report),
)
ESSENTIAL = ("install", "environment")  # nothing runs without them
ALWAYS = (*ESSENTIAL, "report")
# The time limits add up to more than there is: this much of it is kept for the later phases.
SHARE_LEFT = 0.6


def run(session: Session, phases: list[Phase]) -> None:
    """Run each phase and write what was found so far after it; a failing phase is recorded."""
    # Where there is more time than the limits add up to, they are longer.
    stretch = max(1.0, (session.end - time.monotonic()) / sum(phase.seconds for phase in phases))
    for index, phase in enumerate(phases):
        later = sum(SHARE_LEFT * stretch * p.seconds for p in phases[index + 1 :])
        seconds = min(stretch * phase.seconds, session.end - time.monotonic() - later)
        print(f"{phase.name}: at most {seconds:.0f} s", flush=True)
        started = time.monotonic()
        record = session.results["phases"].setdefault(phase.name, {})
        record["limit"] = round(seconds, 1)
        try:
            if seconds <= 0:
                raise RuntimeError("left out: no time was left")
            phase.run(session, seconds)
        except Exception as error:  # whatever it is, the next phase shall run
            record["error"] = f"{type(error).__name__}: {error}"
            print(f"{phase.name}: {record['error']}", flush=True)
            if phase.name in ESSENTIAL:
                session.wrong.append(f"{phase.name}: {record['error']}")
                return
        finally:
            record["seconds"] = round(time.monotonic() - started, 1)
            session.write()


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    minutes = (60 if options.dry else 8.75) if options.minutes is None else options.minutes
    session = Session(options.out, minutes, dry=options.dry)
    chosen = options.phases or [p.name for p in PHASES if options.long or p.name != "autotuned"]
    try:
        run(session, [p for p in PHASES if p.name in (*ALWAYS, *chosen)])
    finally:
        session.write()
        session.close()
    print(f"wrote {', '.join(sorted(path.name for path in session.out.iterdir()))} to {session.out}")
    for reason in session.wrong:
        print(f"wrong: {reason}")
    sys.exit(1 if session.wrong else 0)


if __name__ == "__main__":
    main()
