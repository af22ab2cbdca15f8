"""Everything that needs a GPU in one command and a fixed time: benchmarks, tests, memory checker, plots.

It installs nothing into the environment that it finds and needs no network. Each phase has its own time
limit; what is missing, fails or overruns is recorded in a sentence and the next one runs. Writes to --out, as
it comes:

    results.json   everything, with versions, device and date
    results.md     the tables
    models.png, ops.png
    tests.xml      every test (JUnit)
    parts, logs    what each process measured and printed

A run that was cut off leaves all but the tables: ``python bench/report.py OUT`` writes them of what is there.

The exit code is 1 where something computes wrong numbers or a test fails. Examples:

    python bench/gpu.py --out results
    python bench/gpu.py --out results --wheels carried       # packages and _C that were built elsewhere
    python bench/gpu.py --out results --phases autotuned     # the long compilations
    python bench/gpu.py --out results --dry                  # the same on a CPU, tiny, to see that it runs
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import installation
from session import Session

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
OPS = sorted(path.stem for path in (BENCH / "ops").glob("[!_]*.py"))
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND_ERRORS = 86  # exit code of compute-sanitizer, so that it is told from a crash
MOST_WORKERS = 10  # each takes about 1 GB of the GPU's memory
TINY = ["--model", "test_vit", "--image-size", "32", "--rounds", "2"]

# What is prepared beside the gate, each in a process: it compiles, and a crash shows before it can take the
# other figures along.
PREPARED = {
    "all": ("triton, bfloat16", "triton, bfloat16-autocast", "cuda, bfloat16", "auto, bfloat16"),
    "compiled": (
        *(f"{name}, bfloat16-tf32, compiled" for name in ("reference", "torch", "triton")),
        "torch, bfloat16, compiled",
    ),
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
    add("--minutes", type=float, help="for everything (11.75; dry: 60, for slow machines)")
    add("--phases", nargs="+", choices=[p.name for p in PHASES], help="all but autotuned")
    add(
        "--wheels",
        type=Path,
        default=os.environ.get("VAPT_FAST_WHEELS"),
        help="folder of wheels, and of vapt_fast/_C*.so, for what is missing here (VAPT_FAST_WHEELS)",
    )
    add("--long", action="store_true", help="also autotuned, whose compilations take long")
    add("--dry", action="store_true", help="on the CPU with tiny sizes")
    options = parser.parse_args(arguments)
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels must be a folder, got {options.wheels}")
    return options


# ---- the phases


def install(session: Session, seconds: float) -> None:
    """Look for what a run needs, and make vapt_fast importable."""
    installation.check_packages(session, seconds / 2)
    if not session.dry:
        installation.check_tools(session)
    session.results["installation"] = installation.install(session, seconds / 2)


def environment(session: Session, seconds: float) -> None:
    """Record versions, driver, clocks, device, date, and what vapt_fast says would run."""
    code, printed = session.call(seconds, sys.executable, BENCH / "environment.py", session.device)
    if code != 0:
        last = "".join(printed.strip().splitlines()[-1:]) or "it took too long"
        raise RuntimeError(f"vapt_fast does not run here: {last}")
    session.results |= json.loads(printed.splitlines()[-1])


def gate(session: Session, seconds: float) -> None:
    """Run every op once, forward and backward, against its definition in float64. Beside it, since nothing is
    timed, what takes long to compile, or might crash, is prepared.
    """
    found: dict[str, Any] = session.results.setdefault("gate", {})

    def ended(name: str, code: int | None, printed: str) -> None:
        if name not in groups:
            _judge(session, name, code)
            return
        cases = _cases(session.parts / f"gate-{name}.xml")
        problems = [f"{case}: {why}" for case, (outcome, why) in cases.items() if outcome == "failed"]
        wrong = [problem for problem in problems if "is off by" in problem]
        right = sum(outcome == "passed" for outcome, _ in cases.values())
        found[name] = {"agree": right, "wrong": wrong, "not_run": [p for p in problems if p not in wrong]}
        session.wrong += wrong
        if code is None or not cases:
            found[name]["error"] = "it took too long" if code is None else printed.strip()[-300:]

    groups = _groups_of_ops(session)
    commands = {
        name: [
            *_pytest(BENCH / "test_ops.py", session.parts / f"gate-{name}.xml"),
            *(f"--op={op}" for op in ops),
            *("--benchmark-disable", "--prompts=50", "-k", "not compiled", f"--device={session.device}"),
            *(["--tiny"] if session.dry else []),
        ]
        for name, ops in groups.items()
    }
    session.together(commands | ({} if session.dry else _preparations(session)), seconds, ended)


def _pytest(path: Path, log: Path) -> list[object]:
    return [sys.executable, "-m", "pytest", path, "-v", "-p", "no:cacheprovider", f"--junitxml={log}"]


def _groups_of_ops(session: Session) -> dict[str, list[str]]:
    """Return the ops by process: each in one of its own, so that a crash takes no other along."""
    return {"ops": OPS} if session.dry else {name: [name] for name in OPS}


def _preparations(session: Session) -> dict[str, list[object]]:
    return {
        name: [
            *(sys.executable, BENCH / "models.py", "--out", session.parts / f"prepared-{name}.json"),
            *("--set", table, "--only", name, "--sizes", "50x64", "--rounds", 2, "--seconds", 0),
        ]
        for table, names in PREPARED.items()
        for name in names
    }


def _judge(session: Session, name: str, code: int | None) -> None:
    """Leave out what crashed or did not come back. Other failures show again, with their reasons."""
    if code is None:
        session.left_out[name] = "left out: it was not ready in time"
    elif code != 0:
        session.left_out[name] = f"left out: its process ended with exit code {code}, see logs"
        session.wrong.append(f"{name}: its process ended with exit code {code}")


def _cases(log: Path) -> dict[str, tuple[str, str]]:
    """Return passed, skipped or failed, and why, of each test in pytest's JUnit file; nothing without one."""
    try:
        found = ElementTree.parse(log).iter("testcase")
    except (FileNotFoundError, ElementTree.ParseError):
        return {}
    outcomes = {"skipped": "skipped", "failure": "failed", "error": "failed"}
    cases = {}
    for case in found:
        problem = next((child for child in case if child.tag in outcomes), None)
        outcome = "passed" if problem is None else outcomes[problem.tag]
        why = "" if problem is None else problem.get("message", "").partition("\n")[0]
        cases[_label(case.get("name", ""))] = (outcome, why)
    return cases


def _label(test: str) -> str:
    """Return what identifies a benchmark: the parameters in pytest's name of it."""
    return test.partition("[")[2].removesuffix("]")


def _models(which: str) -> Callable[[Session, float], None]:
    def run(session: Session, seconds: float) -> None:
        path = session.parts / f"models-{which}.json"
        command = [sys.executable, BENCH / "models.py", "--out", path, "--set", which]
        command += ["--left-out", json.dumps(session.left_out), "--device", session.device]
        command += ["--seconds", 0.85 * seconds]
        if which != "all":
            command += ["--sizes", "50x64"]
        if session.dry:
            command += [*TINY, "--sizes", "3x2", "--compiler", "eager"]
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


def _script(name: str, result: str) -> Callable[[Session, float], None]:
    """Return the phase of a script that writes one JSON file after each thing that it has measured."""

    def run(session: Session, seconds: float) -> None:
        path = session.parts / f"{result}.json"
        command = [sys.executable, BENCH / name, "--out", path, "--device", session.device]
        code, printed = session.call(seconds, *command, *(["--tiny"] if session.dry else []))
        if path.is_file():
            session.results[result] = json.loads(path.read_text())
        if code != 0:
            raise RuntimeError("it took too long" if code is None else printed.strip()[-500:])

    return run


def ops(session: Session, seconds: float) -> None:
    """Run the benchmarks of the ops, one after the other."""
    groups = _groups_of_ops(session)
    until = time.monotonic() + seconds
    session.results["ops"] = []
    problems = []
    for index, (name, group) in enumerate(groups.items()):
        path, log = (session.parts / f"ops-{name}.{kind}" for kind in ("json", "xml"))
        share = (until - time.monotonic()) / (len(groups) - index)
        command = [*_pytest(BENCH / "test_ops.py", log), *(f"--op={op}" for op in group)]
        command += [f"--benchmark-json={path}", f"--device={session.device}", f"--seconds={0.7 * share}"]
        code, printed = session.call(share, *command, *(["--tiny", "--rounds=2"] if session.dry else []))
        cases = _cases(log)
        not_timed = [{"name": case, "error": why} for case, (outcome, why) in cases.items() if why]
        session.results["ops"] += [*_timed(path), *not_timed]
        # What the gate of the benchmarks says. Another failure is a rival that can't run here.
        session.wrong += [f"{op['name']}: {op['error']}" for op in not_timed if "is off by" in op["error"]]
        if code != 0:
            summary = "took too long" if code is None else f"exit code {code}: {printed.strip()[-300:]}"
            problems.append(f"{', '.join(group)}: {summary}")
        session.write()
    if problems:
        raise RuntimeError("; ".join(problems))


def _timed(path: Path) -> list[dict[str, Any]]:
    """Return what pytest-benchmark wrote; nothing if it did not come to that."""
    try:
        benchmarks = json.loads(path.read_text())["benchmarks"]
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    return [{"name": _label(one["name"]), "group": one["group"], **one["extra_info"]} for one in benchmarks]


def tests(session: Session, seconds: float) -> None:
    """Run the tests that need a GPU."""
    command = [*_pytest(ROOT / "tests" / "gpu", session.out / "tests.xml"), "-m", "gpu"]
    if not session.dry and importlib.util.find_spec("xdist") is not None:
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        command += ["--numprocesses", workers, "--dist", "worksteal"]
    code, printed = session.call(seconds, *command)
    session.results["tests"] = {"exit_code": code, "summary": printed.strip().splitlines()[-1:]}
    if code != 0:
        session.wrong.append("tests: " + ("they took too long" if code is None else f"exit code {code}"))


def sanitizer(session: Session, seconds: float) -> None:
    """Let compute-sanitizer watch every op, each of its tools and each op in a process."""
    tool = installation.find_tool("compute-sanitizer")
    found: dict[str, str] = session.results.setdefault("sanitizer", {})
    if tool is None:
        found["all"] = "compute-sanitizer is not installed"
        return

    def ended(name: str, code: int | None, printed: str) -> None:
        ran = sum(line.startswith("ran ") for line in printed.splitlines())
        last = "".join(printed.strip().splitlines()[-1:])
        found[name] = f"{ran} cases, " + ("then time was up" if code is None else f"exit code {code}: {last}")
        replicated, others = races(printed)
        if replicated:
            found[name] += f"; {replicated} stores of replicated values by Triton, which are no races"
        if others or (code == FOUND_ERRORS and not replicated):
            session.wrong.append(f"compute-sanitizer {name}: {last}")

    script = ROOT / "tests" / "gpu" / "sanitized.py"
    options = ("--error-exitcode", FOUND_ERRORS, "--print-limit", 20)
    commands = {
        f"{name} {op}": [tool, "--tool", name, *options, sys.executable, script, op]
        for name in SANITIZERS
        for op in OPS
    }
    session.together(commands, seconds, ended)


def races(printed: str) -> tuple[int, int]:
    """Count what racecheck reports: writes of Triton's kernels at one instruction, and other races.

    See tests/gpu/sanitized.py for why the first are none.
    """
    reports = re.split(r"Race reported between ", printed)[1:]
    accesses = [re.findall(r"(Read|Write) access at (.+?\+0x[0-9a-f]+)", report) for report in reports]
    at_one_write = [of[0][1] for of in accesses if len(set(of)) == 1 and of[0][0] == "Write"]
    replicated = sum("vapt_fast::" not in place for place in at_one_write)  # nor in a kernel of csrc
    return replicated, len(reports) - replicated


def report(session: Session, seconds: float) -> None:
    """Write the tables and pictures of what is in results.json."""
    session.write()
    code, printed = session.call(seconds, sys.executable, BENCH / "report.py", session.out)
    if code != 0:
        raise RuntimeError(printed.strip()[-500:])


# In this order: what a cut-off run should rather have comes first. Benchmarks get the GPU for themselves.
PHASES = (
    Phase("install", 80, install),
    Phase("environment", 30, environment),
    Phase("gate", 110, gate),
    Phase("models", 130, _models("all")),
    Phase("compiled", 80, _models("compiled")),
    Phase("loop", 40, _script("loop.py", "loop")),
    Phase("profile", 50, _script("kernel_times.py", "profile")),
    Phase("ops", 90, ops),
    Phase("autotuned", 480, _models("autotuned")),
    Phase("tests", 120, tests),
    Phase("sanitizer", 60, sanitizer),
    Phase("report", 20, report),
)
ESSENTIAL = ("install", "environment")  # nothing runs without them
ALWAYS = (*ESSENTIAL, "report")
# The time limits add up to more than there is: each later phase keeps this much of its part.
SHARE_LEFT = 0.7


def time_limit(phase: Phase, later: list[Phase], left: float, ratio: float) -> float:
    """Return the seconds that a phase may take.

    Args:
        phase, later: it, and those that come after it.
        left: seconds until the end.
        ratio: of the time that there was for all phases to the sum of their limits.
    """
    kept = SHARE_LEFT * ratio * sum(other.seconds for other in later)
    return min(max(1.0, ratio) * phase.seconds, left - kept)


def run(session: Session, phases: list[Phase]) -> None:
    """Run each phase and write what was found so far after it; a failing phase is recorded."""
    ratio = (session.end - time.monotonic()) / sum(phase.seconds for phase in phases)
    for index, phase in enumerate(phases):
        session.phase = phase.name
        seconds = time_limit(phase, phases[index + 1 :], session.end - time.monotonic(), ratio)
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
    # A shell's background jobs ignore Ctrl-C, and so would the processes of this one, which it stops.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    minutes = (60 if options.dry else 11.75) if options.minutes is None else options.minutes
    session = Session(options.out, minutes, dry=options.dry, wheels=options.wheels)
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
