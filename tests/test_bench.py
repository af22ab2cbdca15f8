"""The benchmarks run and their gate closes. The speeds are of no interest here."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vapt_fast import schedule

BENCH = Path(__file__).parent.parent / "bench"
TINY = ("--model=test_vit", "--batch=1", "--threads=1", "--device=cpu")


@pytest.fixture
def load(monkeypatch):
    """Import a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(BENCH)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture
def setting(load):
    workload = load("workload")
    return workload.Setting("test_vit", batch=1, device="cpu", dtype="float32", amp=None, threads=1)


def test_comparison_writes_what_it_found(load, tmp_path):
    load("compare").main([*TINY, "--prompts=2,3", "--rounds=2", "--no-memory", f"--out={tmp_path}"])
    report = json.loads((tmp_path / "test_vit.json").read_text())
    assert report["setting"]["batch"] == 1
    assert report["environment"]["torch"] == torch.__version__
    assert list(report["results"]) == ["training step", "forward"]
    for results in report["results"].values():
        names = [f"{backend}, adaptive, P = {p}" for p in (2, 3) for backend in ("reference", "torch")]
        assert list(results["variants"]) == [*names, "linear probe"]
        assert all(len(variant["seconds"]) == 2 for variant in results["variants"].values())
    assert "| speed of torch over reference, P = 3 |" in (tmp_path / "test_vit.md").read_text()


def test_pytest_benchmarks_run():
    command = [sys.executable, "-m", "pytest", BENCH, "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    done = subprocess.run([*command, *TINY, "--prompts=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_holds_the_activations(load, setting):
    peak = load("memory").peak_memory(
        setting, load("workload").Variant("torch", "adaptive", 2), "training step"
    )
    # One block's tokens alone are 0.03 MB; the whole process is some hundred MB.
    assert 0.1 < peak < 200


def test_gate_lets_equal_backends_pass(load, setting):
    assert load("agreement").models_agree.__wrapped__(setting, "adaptive", 2) < 1e-4


def test_gate_stops_a_wrong_backend(load, setting, monkeypatch):
    right = schedule.prompt_projector
    # A factor would not do: the block's LayerNorm takes it away.
    monkeypatch.setattr(schedule, "prompt_projector", lambda *args, **kwargs: right(*args, **kwargs).relu())
    with pytest.raises(AssertionError, match="is off by"):
        load("agreement").models_agree.__wrapped__(setting, "adaptive", 2)


@pytest.mark.parametrize("wrong", [float("nan"), 1.01])
def test_gate_stops_wrong_numbers(load, wrong):
    expected = {"logits": torch.ones(3)}
    with pytest.raises(AssertionError, match="logits is off by"):
        load("agreement").largest_error({"logits": wrong * expected["logits"]}, expected, torch.float32)


def test_gate_stops_a_missing_gradient(load):
    with pytest.raises(AssertionError):
        load("agreement").largest_error({}, {"logits": torch.ones(3)}, torch.float32)
