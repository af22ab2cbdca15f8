"""Sweeps whose runs are trained by several processes each: the same table, and no process left behind."""

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from functools import partial
from threading import Thread

import pytest
from command import error_of
from suite_folders import vtab_folder
from training_cases import BACKBONE

from vapt_fast.training import UserError
from vapt_fast.training.sweep import Places, SweepOptions, sweep, sweep_table

PLACES = Places(poll=0.05)
RUN = "runs/vtab-svhn/{}/seed-3"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    vtab_folder(folder, "svhn")
    return folder


def options(root, method="vapt", epochs=60, processes=2):
    """Of one run, with dropout if the method has it."""
    run = {"root": str(root), "other_sizes": True, "backbone": BACKBONE, "base_lrs": [1.0]}
    run |= {"weight_decays": [0.0], "recipe": {"epochs": epochs, "batch_size": 5, "warmup_epochs": 1}}
    given = {"data": ["vtab:svhn"], "methods": [method], "seeds": [3], "run": run}
    return SweepOptions(**given, processes_per_run=processes)


def numbers(folder, method):
    """Return all losses, accuracies and rates of a run, to the last bit."""
    lines = (folder / RUN.format(method) / "metrics.jsonl").read_text().splitlines()
    names = ("epoch", "lr", "train_loss", "train_accuracy")
    return [{name: json.loads(line)[name] for name in names} for line in lines]


def table(chosen, folder):
    sweep(chosen, folder, PLACES)
    return sweep_table(chosen, folder).rows[0].accuracies


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The accuracies and all epochs of a sweep without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return table(options(root), folder), numbers(folder, "vapt")


@pytest.mark.full
def test_the_table_is_that_of_one_process(root, tmp_path):
    one, two = (options(root, "linear", 3, processes) for processes in (1, 2))
    assert table(two, tmp_path / "two") == table(one, tmp_path / "one")
    for alone, together in zip(*(numbers(tmp_path / name, "linear") for name in ("one", "two")), strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    result = json.loads((tmp_path / "two" / RUN.format("linear") / "result.json").read_text())
    assert result["processes"] == 2


def when_training(folder, action):
    """Call ``action`` after the first epoch."""

    def wait():
        while not (folder / RUN.format("vapt") / "checkpoint.pt").exists():
            time.sleep(0.01)
        action()

    Thread(target=wait, daemon=True).start()


def check_resumed(chosen, folder, whole):
    assert not (folder / RUN.format("vapt") / "result.json").exists()
    assert (table(chosen, folder), numbers(folder, "vapt")) == whole


@pytest.mark.full
def test_a_process_that_is_killed_ends_its_run_which_goes_on(root, whole, tmp_path):
    chosen = options(root)
    when_training(tmp_path, lambda: multiprocessing.active_children()[1].kill())
    with pytest.raises(UserError, match=r"^runs/vtab-svhn/vapt/seed-3: one of 2 processes .* SIGKILL"):
        sweep(chosen, tmp_path, PLACES)
    assert not multiprocessing.active_children()
    check_resumed(chosen, tmp_path, whole)


@pytest.mark.full
@pytest.mark.parametrize(
    ("number", "code", "jobs"),
    [("SIGINT", 130, 1), ("SIGKILL", -9, 1), ("SIGTERM", -15, 2)],
)
def test_a_stopped_sweep_leaves_no_process_and_goes_on(number, code, jobs, root, whole, tmp_path):
    """Every process has the pipe of the command's output, which is read until all have ended."""
    chosen = options(root)
    chosen.write(tmp_path)
    command = [sys.executable, "-m", "vapt_fast", "sweep", "--output", str(tmp_path), "--jobs", str(jobs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    not_ignored = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, **pipes, preexec_fn=not_ignored)
    when_training(tmp_path, lambda: process.send_signal(getattr(signal, number)))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    assert ("Go on with: vapt-fast sweep" in output) == (number == "SIGINT")
    assert "Traceback" not in output
    check_resumed(chosen, tmp_path, whole)


@pytest.mark.full
def test_an_error_of_a_process_is_that_of_its_run(root, tmp_path):
    vtab_folder(tmp_path, "svhn")
    image = next((tmp_path / "svhn/images/train800").iterdir())
    image.write_bytes(b"none")
    chosen = options(tmp_path, "linear", 1)
    with pytest.raises(UserError, match=rf"^runs/vtab-svhn/linear/seed-3: .*{image.name}"):
        sweep(chosen, tmp_path / "out", PLACES)


# ---- what is refused


@pytest.mark.parametrize(
    ("devices", "size", "groups"),
    [
        (["cuda:0", "cuda:1", "cuda:2", "cuda:3"], 2, [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]),
        (["cuda:0", "cuda:1"], 1, [("cuda:0",), ("cuda:1",)]),
        (["cpu"], 3, [("cpu", "cpu", "cpu")]),
        (["cpu", "cuda:1", "cuda:0"], 2, [("cpu", "cpu"), ("cuda:1", "cuda:0")]),
    ],
)
def test_the_devices_of_each_run(devices, size, groups):
    assert Places(tuple(devices)).groups(size) == tuple(groups)


@pytest.mark.parametrize(
    "devices", [["cuda:0"], ["cuda:0", "cuda:1", "cuda:2"], ["cuda:0", "cuda:0"], ["cuda:0", "cpu", "cuda:1"]]
)
def test_devices_that_runs_cannot_share(devices, root, tmp_path):
    with pytest.raises(UserError, match="devices must be a multiple of 2 different GPUs, or cpu, got cuda:0"):
        sweep(options(root), tmp_path / "out", Places(tuple(devices)))
    assert not (tmp_path / "out").exists()


def test_torchrun_starts_no_sweep_of_several_processes_a_run(root, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    with pytest.raises(UserError, match="start the sweep without torchrun"):
        sweep(options(root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_number_of_processes_is_another_sweep(root, tmp_path):
    options(root, processes=1).write(tmp_path)
    with pytest.raises(UserError, match="was started with processes_per_run=1, got 2"):
        sweep(options(root), tmp_path)
    assert "--data must be given with --processes-per-run" in error_of(
        "sweep", "--output", tmp_path, "--processes-per-run", "2"
    )
    with pytest.raises(UserError, match="processes_per_run must be at least 1, got 0"):
        options(root, processes=0)


@pytest.mark.full
def test_ray_gives_each_run_one_machine(root, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(UserError, match="3 processes needs as many CPUs on one machine"):
            sweep(options(root, "linear", processes=3), tmp_path / "three", Places(engine="ray"))
        sweep(options(root, "linear", 3), tmp_path / "two", Places(engine="ray"))
    finally:
        ray.shutdown()
    result = json.loads((tmp_path / "two" / RUN.format("linear") / "result.json").read_text())
    assert result["processes"] == 2
