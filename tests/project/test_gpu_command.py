"""bench/gpu.py without a GPU: it runs, says what is missing, and whatever happens leaves what it has."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from vapt_fast.benchmark import MODES
from vapt_fast.ops.base import OPS as ALL_OPS

BENCH = Path(__file__).parents[2] / "bench"
OPS = {path.stem for path in (BENCH / "ops").glob("[!_]*.py")}


@pytest.fixture
def session(load, tmp_path):
    session = load("session").Session(tmp_path / "out", 60, dry=True)
    yield session
    session.close()


@pytest.fixture
def installation(load):
    return load("installation")


def written(session):
    return json.loads((session.out / "results.json").read_text())


# ---- all of it


@pytest.mark.full
def test_gpu_run_without_a_gpu(tmp_path, load):
    """The program is the same; what needs a GPU is in the tables with the reason why it is missing."""
    # It may run in a process of pytest-xdist, but is not to take itself for one: then nothing is timed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    phases = ["gate", "models", "compiled", "loop", "profile", "ops"]
    command = [sys.executable, BENCH / "gpu.py", "--dry", "--out", tmp_path, "--phases", *phases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + "".join(log.read_text() for log in tmp_path.glob("logs/*"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "results.md", "parts", "logs", "models.png", "ops.png"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["torch"] == torch.__version__
    assert not results["missing"]
    assert not any("error" in record for record in results["phases"].values())
    assert list(results["phases"]) == ["install", "environment", *phases, "report"]

    assert results["gate"]["ops"]["agree"] >= 2 * len(OPS)
    markdown, sets = (tmp_path / "results.md").read_text(), load("models").SETS
    assert "a CUDA graph needs a CUDA GPU" in markdown
    assert [comparison["set"] for comparison in results["comparisons"]] == ["all", "compiled"]
    for comparison in results["comparisons"]:
        rows, variants = comparison["rows"], [str(variant) for variant in sets[comparison["set"]]]
        expected = [(name, mode, graph) for graph in (False, True) for mode in MODES for name in variants]
        assert [(row["name"], row["mode"], row["graph"]) for row in rows] == expected
        assert all(bool(row["seconds"]) != bool(row["error"]) for row in rows)
        assert {"torch, bfloat16", "reference, bfloat16"} <= {row["name"] for row in rows if row["seconds"]}
        assert all(f"| {name} |" in markdown for name in variants)
    loops = results["loop"]["rows"]
    assert all(len(row["seconds"]) == 5 and f"| {name} |" in markdown for name, row in loops.items())
    profiled = {profile["name"]: profile["host"] for profile in results["profile"]}
    assert list(profiled) == list(load("kernel_times").NAMES)
    assert all(any(row["name"] == "aten::addmm" and row["us"] > 0 for row in of) for of in profiled.values())
    assert {op["name"].partition("-")[0] for op in results["ops"] if "seconds" in op} == OPS
    assert all(("seconds" in op) != ("error" in op) for op in results["ops"])


def test_every_op_has_a_benchmark():
    assert set(ALL_OPS) - {"prompt_attention_packed"} == OPS


def test_what_is_prepared_is_in_its_table(load):
    sets = load("models").SETS
    for table, names in load("gpu").PREPARED.items():
        assert {str(variant) for variant in sets[table]} >= set(names)


def test_phases_come_in_the_order_of_their_worth(load):
    names = [phase.name for phase in load("gpu").PHASES]
    order = ["install", "environment", "gate", "models", "profile", "tests", "sanitizer", "report"]
    assert [name for name in names if name in order] == order


@pytest.mark.parametrize("minutes", [3, 11.75, 60])
def test_there_is_time_for_all_phases(minutes, load):
    """Even if each takes all that it may."""
    gpu = load("gpu")
    phases = [phase for phase in gpu.PHASES if phase.name != "autotuned"]
    left = 60 * minutes
    ratio = left / sum(phase.seconds for phase in phases)
    for index, phase in enumerate(phases):
        seconds = gpu.time_limit(phase, phases[index + 1 :], left, ratio)
        assert seconds >= 0.999 * gpu.SHARE_LEFT * ratio * phase.seconds
        left -= seconds
    assert left >= -1e-6


# ---- what is missing


def with_versions(monkeypatch, **versions):
    """Let these packages, with _ for -, have these versions; None: they are not installed."""
    real = importlib.metadata.version

    def version(name):
        if (key := name.replace("-", "_")) not in versions:
            return real(name)
        if versions[key] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[key]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_nothing_is_said_where_nothing_is_missing(installation, session):
    installation.check_packages(session, 60)
    assert session.results["missing"] == []


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        (
            {"timm": "1.0.15"},
            "timm 1.0.15 is installed, and timm>=1.0.31 is needed: vapt_fast may not",
        ),
        ({"torch": "2.7.1+cu128"}, "torch 2.7.1+cu128 is installed, and torch>=2.8 is needed: "),
        (
            {"pytest_xdist": None},
            "pytest-xdist is not installed, and pytest-xdist>=3.6 is needed: the tests ",
        ),
        ({"pytest": None}, "no gate and no benchmarks of the ops, and no tests."),
        ({"matplotlib": "3.7"}, "no pictures."),
    ],
)
def test_versions_are_compared(versions, said, installation, session, monkeypatch, capsys):
    with_versions(monkeypatch, **versions)
    installation.check_packages(session, 60)
    sentence, wheels = session.results["missing"]
    assert said in sentence
    name = next(iter(versions)).replace("_", "-")
    assert f"pip download --no-deps --dest WHEELS '{name}>=" in wheels
    assert said in capsys.readouterr().out


def test_a_version_of_today_or_a_nightly_build_is_enough(installation, session, monkeypatch):
    with_versions(monkeypatch, torch="2.16.0.dev20261101+cu130", timm="1.0.31")
    installation.check_packages(session, 60)
    assert session.results["missing"] == []


def test_wheels_are_taken_from_the_folder(installation, session, monkeypatch, tmp_path):
    session.wheels = tmp_path
    monkeypatch.setattr(
        installation, "requirements", lambda: {Requirement(f"vapt-test-{name}>=2"): "x" for name in "ab"}
    )
    with zipfile.ZipFile(tmp_path / "vapt_test_b-2.1-py3-none-any.whl", "w") as wheel:
        folder = "vapt_test_b-2.1.dist-info"
        wheel.writestr("vapt_test_b.py", "")
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: vapt-test-b\nVersion: 2.1\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    installation.check_packages(session, 60)
    sentence, _ = session.results["missing"]
    assert sentence.startswith("vapt-test-a is not installed")
    assert session.call(60, sys.executable, "-c", "import vapt_test_b")[0] == 0


@pytest.fixture
def bare(monkeypatch, installation):
    """A machine with no tools, where this checkout is not installed."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(installation, "_is_installed", lambda: False)
    for variable in ("CC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)


def imported(session):
    code, printed = session.call(60, sys.executable, "-c", "import vapt_fast; print(vapt_fast.__path__[0])")
    assert code == 0, printed
    return Path(printed.splitlines()[-1])


@pytest.mark.usefixtures("bare")
def test_without_tools_the_rest_runs(installation, session, load):
    installation.check_tools(session)
    assert installation.install(session, 60) == "links to this checkout"
    assert [sentence.partition(":")[0] for sentence in session.results["missing"]] == [
        "There is no C compiler (gcc, clang or CC)",
        "There is no compute-sanitizer",
        "There is no nvcc",
    ]
    assert imported(session).is_relative_to(session.scratch)
    load("gpu").sanitizer(session, 60)
    assert session.results["sanitizer"] == {"all": "compute-sanitizer is not installed"}
    assert not session.wrong


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("in_a_wheel", [False, True])
def test_compiled_kernels_from_elsewhere(in_a_wheel, installation, session, tmp_path):
    session.wheels, name = tmp_path, f"_C{EXTENSION_SUFFIXES[0]}"
    if in_a_wheel:
        with zipfile.ZipFile(tmp_path / "vapt_fast-0.1.0-cp311-cp311-linux_x86_64.whl", "w") as wheel:
            wheel.writestr(f"vapt_fast/{name}", "compiled")
            wheel.writestr("vapt_fast/model.py", "from an older checkout")
    else:
        (tmp_path / name).write_text("compiled")
    assert f"and {name} of {tmp_path}" in installation.install(session, 60)
    assert session.results["missing"] == []
    package = imported(session)
    assert (package / name).read_text() == "compiled"
    assert len([path for path in package.iterdir() if path.name.startswith("_C")]) == 1
    assert (package / "model.py").samefile(BENCH.parent / "vapt_fast" / "model.py")


@pytest.mark.usefixtures("bare")
def test_kernels_for_another_python_are_left_out(installation, session, tmp_path):
    session.wheels = tmp_path
    (tmp_path / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    assert installation.install(session, 60) == "links to this checkout"
    assert "_C.cpython-27-x86_64-linux-gnu.so" in session.results["missing"][0]


@pytest.mark.parametrize("there", [False, True])
def test_tests_run_in_one_process_without_xdist(there, load, session, monkeypatch):
    gpu, commands = load("gpu"), []
    session.dry = False
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object() if there else None)
    monkeypatch.setattr(session, "call", lambda _, *command: commands.append(command) or (0, "1 passed"))
    gpu.tests(session, 60)
    assert ("--numprocesses" in commands[0]) == there


# ---- what goes wrong

SLEEPS = "import time; print('began', flush=True); time.sleep(60)"


def test_a_phase_that_fails_or_overruns_is_recorded_and_the_next_one_runs(load, session):
    gpu, ran = load("gpu"), []

    def fails(*_):
        raise ValueError("broken")

    def overruns(session, _):
        session.results["code"] = session.call(1.0, sys.executable, "-c", SLEEPS)[0]

    steps = {"a": fails, "b": overruns, "c": lambda *_: ran.append(1)}
    gpu.run(session, [gpu.Phase(name, 5, step) for name, step in steps.items()])
    assert session.results["code"] is None  # it was stopped
    assert ran
    assert written(session)["phases"]["a"]["error"] == "ValueError: broken"
    assert written(session)["code"] is None
    session.end = time.monotonic()
    gpu.run(session, [gpu.Phase("d", 5, lambda *_: pytest.fail("ran"))])
    assert "no time was left" in session.results["phases"]["d"]["error"]


def test_processes_at_once_and_what_overruns(session, load, monkeypatch, tmp_path):
    """The results so far are written before the last one has ended; what ignores Ctrl-C is killed."""
    found = session.results["found"] = {}
    began = tmp_path / "began"
    # Time is over as soon as what ends has ended and what overruns has begun, however busy the machine is.
    clock = SimpleNamespace(monotonic=lambda: 9.0 * ("fails" in found and began.exists()), sleep=time.sleep)
    monkeypatch.setattr(load("session"), "time", clock)
    monkeypatch.setattr(load("session"), "PATIENCE", 0.2)
    deaf = (
        "import pathlib, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"print('began', flush=True); pathlib.Path({str(began)!r}).touch(); time.sleep(60)"
    )
    commands = {"fails": "raise SystemExit(3)", "deaf": deaf, "never": "raise SystemExit(4)"}
    seen = []

    def ended(name, code, printed):
        seen.append(written(session)["found"] if (session.out / "results.json").exists() else {})
        found[name] = [code, printed.strip()]

    by_name = {name: [sys.executable, "-c", code] for name, code in commands.items()}
    session.together({name: by_name[name] for name in ("fails", "deaf")}, 3, ended, at_once=2)
    began.unlink()
    session.together({name: by_name[name] for name in ("deaf", "never")}, 1, ended, at_once=1)
    assert found == {"fails": [3, ""], "deaf": [None, "began"], "never": [None, ""]}
    assert seen[1] == {"fails": [3, ""]}
    assert written(session)["found"] == found


@pytest.mark.full
def test_a_killed_run_leaves_what_it_has(tmp_path):
    command = [sys.executable, BENCH / "gpu.py", "--dry", "--out", tmp_path, "--phases", "gate"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for line in process.stdout:
            if line.startswith("gate"):
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["phases"]) == ["install", "environment"]
    assert results["environment"]["torch"] == torch.__version__
    assert list((tmp_path / "logs").iterdir())


def test_a_table_is_written_part_by_part(load, tmp_path):
    models = load("models")
    arguments = "--only torch,_bfloat16 --sizes 2x1 --model test_vit --image-size 32 --device cpu --rounds 2"
    options = models.parse_options(
        [*(word.replace("_b", " b") for word in arguments.split()), "--out", str(tmp_path / "out.json")]
    )
    (first, table), *others = models.measure(options)
    assert first == 0
    assert [row["error"] for row in table["rows"]] == [None, *3 * [models.NOT_YET]]
    assert [row["error"] is None for row in others[0][1]["rows"]] == [True, True, False, False]
    assert len(others) == 3


RACE = """\
========= Error: Race reported between {0} access at {2}+0x70 in kernels.py:1
=========     and {1} access at {2}+0x{3} in kernels.py:1 [9 hazards]
"""
OURS = "vapt_fast::pool<vapt_fast::Half, 2>(x)"


@pytest.mark.parametrize(
    ("first", "second", "kernel", "offset", "replicated"),
    [
        ("Write", "Write", "project", "70", True),
        ("Write", "Write", "project", "90", False),
        ("Write", "Read", "project", "70", False),
        ("Write", "Write", OURS, "70", False),
    ],
)
def test_stores_of_replicated_values_are_no_races(first, second, kernel, offset, replicated, load):
    printed = 2 * RACE.format(first, second, kernel, offset)
    assert load("gpu").races(printed) == ((2, 0) if replicated else (0, 2))
    assert load("gpu").races("========= ERROR SUMMARY: 0 errors") == (0, 0)
