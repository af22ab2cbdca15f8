"""The measurements run, their gate closes, and nothing gets lost. The speeds are of no interest here."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vapt_fast.benchmark import (
    LINEAR_PROBE,
    MODES,
    PRECISIONS,
    Comparison,
    DisagreementError,
    Row,
    Setting,
    Spread,
    Variant,
    Workload,
    as_table,
    in_turns,
)
from vapt_fast.benchmark.agreement import check, relative_errors
from vapt_fast.benchmark.memory import peak_resident
from vapt_fast.cli import app
from vapt_fast.prompts import adaptive

BENCH = Path(__file__).parents[2] / "bench"
TINY = Setting("test_vit", batch=1, device="cpu", threads=1, image_size=32, compiler="eager")


@pytest.fixture
def load(monkeypatch):
    """Import a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


# ---- timing


def test_everything_has_its_turn_in_each_round():
    order = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "AB"}, rounds=3)
    assert order == list("ABABAB")
    assert [len(of) for of in seconds.values()] == [3, 3]


def test_after_the_deadline_there_are_two_rounds():
    assert len(in_turns({"A": lambda: None}, rounds=9, deadline=time.monotonic())["A"]) == 2


def test_on_a_gpu_a_round_is_many_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(time, "perf_counter", lambda: 0.01 * len(calls))  # a call takes 10 ms
    seconds = in_turns({"A": lambda: calls.append(None)}, rounds=2, synchronize=lambda: None)
    assert len(calls) == 1 + 2 * 5
    assert seconds["A"] == pytest.approx([0.01, 0.01])


def test_spread():
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, 1.5, 2.5)
    assert Spread.of_ratio([2.0, 8.0, 6.0], [1.0, 2.0, 2.0]).median == 3.0
    assert str(Spread(1.23456, 1.0, 2.0)) == "1.23 (1 to 2)"


# ---- workloads


def test_workloads_of_one_setting_are_equal():
    first, second = (Workload(TINY, Variant(backend, num_prompts=2)) for backend in ("reference", "torch"))
    assert torch.equal(first.images, second.images)
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(block.token_projection.weight.any() for block in first.model.prompts.blocks[1:])


def test_a_training_step_trains_and_a_forward_pass_does_not():
    workload = Workload(TINY, Variant("torch", num_prompts=2))
    before = [p.clone() for p in workload.model.trainable_parameters()]
    workload.runner("forward")()
    assert all(torch.equal(a, b) for a, b in zip(before, workload.model.trainable_parameters(), strict=True))
    workload.runner("training step")()
    assert workload.model.training
    changed = [
        not torch.equal(a, b) for a, b in zip(before, workload.model.trainable_parameters(), strict=True)
    ]
    assert all(changed)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision):
    workload = Workload(TINY, Variant("torch", num_prompts=2, precision=precision))
    weights = PRECISIONS[precision].weights
    assert {p.dtype for p in workload.model.backbone.parameters()} == {weights}
    assert {p.dtype for p in workload.model.prompts.parameters()} == {
        torch.float64 if weights == torch.float64 else torch.float32
    }
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with workload._conditions():
        assert (torch.get_float32_matmul_precision() == "high") == (precision == "tf32")
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


def test_explicit_attention_and_the_linear_probe():
    explicit = Workload(TINY, Variant("reference", num_prompts=2, attention="explicit"))
    assert not any(block.attn.fused_attn for block in explicit.model.backbone.blocks)
    fused = Workload(TINY, Variant("reference", num_prompts=2))
    assert all(block.attn.fused_attn for block in fused.model.backbone.blocks)
    probe = Workload(TINY, Variant(LINEAR_PROBE))
    trainable = {name for name, p in probe.model.named_parameters() if p.requires_grad}
    assert trainable == {"head.weight", "head.bias"}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_holds_the_activations():
    setting = Setting("test_vit", batch=1, device="cpu", threads=1)
    # One block's tokens alone are 0.03 MB; the whole process is some hundred MB.
    assert 0.1 < peak_resident(setting, Variant("torch", num_prompts=2), "training step") < 200


# ---- the gate


def test_gate_lets_equal_backends_pass():
    variants = [
        Variant("torch", num_prompts=2),
        Variant("torch", num_prompts=2, precision="float64"),
        Variant("torch", num_prompts=2, precision="bfloat16-autocast"),
    ]
    comparison = Comparison(TINY, variants, memory=False)
    for mode in MODES:
        for row in comparison.measure(mode, rounds=2):
            assert row.error is None
            assert len(row.seconds) == 2
    assert row.largest_error > 1e-4  # of bfloat16
    assert comparison.measure("forward", rounds=2)[0].largest_error < 1e-4
    assert comparison.measure("forward", rounds=2)[1].largest_error < 1e-10


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gate_stops_a_wrong_backend_and_only_that(precision, monkeypatch):
    right = adaptive.prompt_projector
    # A factor would not do: the block's LayerNorm takes it away.
    monkeypatch.setattr(adaptive, "prompt_projector", lambda *args, **kwargs: right(*args, **kwargs).relu())
    variants = [Variant(backend, num_prompts=2, precision=precision) for backend in ("reference", "torch")]
    reference, wrong = Comparison(TINY, variants, memory=False).measure("forward", rounds=2)
    assert reference.seconds
    assert not wrong.seconds
    assert wrong.wrong
    assert "DisagreementError" in wrong.error
    assert "is off by" in wrong.error


@pytest.mark.parametrize("value", [float("nan"), 1.01])
def test_gate_stops_wrong_numbers(value):
    expected = {"logits": torch.ones(3, dtype=torch.float64)}
    errors = relative_errors({"logits": value * expected["logits"]}, expected)
    with pytest.raises(DisagreementError, match="logits is off by"):
        check(errors, {"logits": 0.0}, PRECISIONS["float32"])


def test_in_low_precision_the_gate_is_the_literal_method():
    check({"logits": 0.1}, {"logits": 0.045}, PRECISIONS["bfloat16"])
    with pytest.raises(DisagreementError):
        check({"logits": 0.1}, {"logits": 0.04}, PRECISIONS["bfloat16"])
    with pytest.raises(DisagreementError):
        check({"logits": math.inf}, {"logits": math.inf}, PRECISIONS["float16"])


def test_gate_stops_a_missing_gradient():
    with pytest.raises(DisagreementError):
        relative_errors({}, {"logits": torch.ones(3)})


def test_what_fails_is_named_and_the_others_go_on():
    variants = [
        Variant("torch", num_prompts=2),
        Variant("cuda", num_prompts=2),
        Variant("torch", num_prompts=2, attention="cudnn"),
    ]
    comparison = Comparison(TINY, variants, memory=False)
    works, no_backend, no_attention = comparison.measure("forward", rounds=2)
    assert works.seconds
    assert "BackendUnavailableError" in no_backend.error
    assert no_attention.error
    assert not any(row.wrong for row in (works, no_backend, no_attention))
    assert "needs a CUDA GPU" in comparison.measure("forward", rounds=2, graph=True)[0].error


def test_table_and_rows_keep_what_was_measured():
    rows = [
        Row(Variant("reference", num_prompts=2), "forward", False, [0.4, 0.4], 12.3, 0.0),
        Row(Variant("torch", num_prompts=2), "forward", False, [0.1, 0.2], None, 1e-6),
        Row(Variant("cuda", num_prompts=2), "forward", False, error="no GPU"),
        Row(Variant(LINEAR_PROBE), "forward", False, [0.1, 0.1]),
    ]
    header, table = as_table(rows, batch=2, name=lambda variant: variant.backend)
    assert all(len(cells) == len(header) for cells in table)
    assert table[0][:5] == ["reference", "2", "5", "1.00x", "400"]
    assert table[1][:4] == ["torch", "2", "13.33", "3.00x"]
    assert table[2][:3] == ["cuda", "2", "-"]
    assert table[3][:4] == [LINEAR_PROBE, "", "20", ""]
    assert [Row.from_dict(json.loads(json.dumps(row.as_dict()))) for row in rows] == rows


# ---- vapt-fast bench

QUICK = ["bench", "--backbone", "test_vit", "--image-size", "32", "--batch-size", "1", "--device", "cpu"]


def test_command_prints_and_writes_what_it_found(tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--prompts", "2", "--prompts", "3", "--rounds", "2", "--no-memory", "--threads", "1"]
    result = CliRunner().invoke(app, [*QUICK, *arguments, "--output", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["environment"]["torch"] == torch.__version__
    (comparison,) = report["comparisons"]
    assert comparison["setting"]["batch"] == 1
    rows = [Row.from_dict(row) for row in comparison["rows"]]
    backends = [row.variant.backend for row in rows if row.mode == "forward"]
    assert backends == ["reference", "torch", "reference", "torch", LINEAR_PROBE]
    assert all(len(row.seconds) == 2 for row in rows)
    assert "training step, test_vit, batch 1, float32, cpu" in result.stdout
    assert "triton: its kernels need a CUDA GPU" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "resnet18"], "resnet18 can't be measured: TypeError"),
        (["--backbone", "vit_digit"], "got 'vit_digit'; similar: vit_digits_patch4_32"),
        (["--device", "toaster"], "--device 'toaster' is not usable here"),
    ],
)
def test_command_errors(arguments, message):
    result = CliRunner().invoke(app, [*QUICK, "--no-memory", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


# ---- everything that needs a GPU, without one


@pytest.mark.full
def test_gpu_run_without_a_gpu(tmp_path, load):
    """The program is the same; what needs a GPU is in the tables with the reason why it is missing."""
    command = [
        sys.executable,
        BENCH / "gpu.py",
        "--dry",
        "--out",
        tmp_path,
        "--phases",
        "models",
        "compiled",
        "ops",
    ]
    # It may run in a process of pytest-xdist, but is not to take itself for one: then nothing is timed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"results.json", "results.md", "log.txt", "models.png", "ops.png"} <= names
    assert len(names) <= 8
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["torch"] == torch.__version__
    assert not any("error" in record for record in results["phases"].values())

    sets = load("models").SETS
    tables = [(c["set"], c["setting"]["batch"], c["rows"]) for c in results["comparisons"]]
    assert [name for name, _, _ in tables] == ["all", "compiled"]
    for name, _, rows in tables:
        expected = [
            (str(variant), mode, graph) for graph in (False, True) for mode in MODES for variant in sets[name]
        ]
        assert [(row["name"], row["mode"], row["graph"]) for row in rows] == expected
        assert all(bool(row["seconds"]) != bool(row["error"]) for row in rows)
        timed = {row["name"] for row in rows if row["seconds"]}
        assert {"torch, bfloat16", "reference, bfloat16"} <= timed
    ops = {path.stem.removeprefix("test_bench_") for path in BENCH.glob("test_bench_*.py")}
    assert {op["name"].removeprefix("test_").partition("[")[0] for op in results["ops"]} == ops
    assert {
        op["name"].removeprefix("test_").partition("[")[0] for op in results["ops"] if "seconds" in op
    } == ops
    assert all(("seconds" in op) != ("error" in op) for op in results["ops"])
    markdown = (tmp_path / "results.md").read_text()
    assert all(f"| {variant} |" in markdown for name in ("all", "compiled") for variant in sets[name])
    assert "a CUDA graph needs a CUDA GPU" in markdown


def test_what_is_prepared_is_in_its_table(load):
    sets = load("models").SETS
    for table, names in load("gpu").PREPARED.items():
        assert {str(variant) for variant in sets[table]} >= set(names)


def test_a_phase_that_fails_or_overruns_is_recorded_and_the_next_one_runs(load, tmp_path):
    gpu = load("gpu")
    session = gpu.Session(gpu.parse_options(["--out", str(tmp_path), "--dry"]))
    ran = []

    def fails(session, seconds):
        raise ValueError("broken")

    def overruns(session, seconds):
        session.results["code"] = session.call(1.0, sys.executable, "-c", "import time; time.sleep(60)")[0]

    try:
        phases = [
            gpu.Phase("a", 5, fails),
            gpu.Phase("b", 5, overruns),
            gpu.Phase("c", 5, lambda *_: ran.append(1)),
        ]
        gpu.run(session, phases)
    finally:
        session.close()
    assert session.results["code"] is None  # it was stopped
    assert ran
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["phases"]["a"]["error"] == "ValueError: broken"
    assert written["code"] is None


def test_without_time_a_phase_is_left_out(load, tmp_path):
    gpu = load("gpu")
    session = gpu.Session(gpu.parse_options(["--out", str(tmp_path), "--dry", "--minutes", "0"]))
    try:
        gpu.run(session, [gpu.Phase("a", 5, lambda *_: pytest.fail("ran"))])
    finally:
        session.close()
    assert "no time was left" in session.results["phases"]["a"]["error"]


def test_operations_are_those_of_the_method(load):
    """Of the rewritten forward pass: what the products of one block take, by hand."""
    per_image = load("operations").per_image
    setting = Setting("test_vit", batch=8, device="cpu", threads=1)
    literal, rewritten = (
        per_image(setting, Variant(backend, num_prompts=10), "forward") for backend in ("reference", "torch")
    )
    blocks, dim, tokens, prompts, patch = 6, 64, 101, 10, 16 * 16 * 3
    rows = tokens + prompts
    # Joint projection, scores and values, projection, MLP (3 times as wide, test_vit's) of every row.
    block = 2 * rows * dim * 3 * dim + 4 * rows * rows * dim + 2 * rows * dim * dim + 4 * rows * dim * 3 * dim
    pooling = 2 * 81 * prompts * dim + 2 * 81 * 4 * dim + 4 * prompts * dim * 8
    expected = blocks * block + (blocks - 1) * pooling + 2 * 100 * patch * dim + 2 * dim * 100
    assert literal == pytest.approx(expected, rel=0.01)
    assert 0.5 * literal < rewritten < literal


# ---- the README


def test_readme_says_what_the_results_say(load):
    report = load("report")
    readme = report.README.read_text()
    assert readme == report.rewrite(readme, report.section()), "run python bench/report.py"


def test_tables_hold_whatever_is_missing(load):
    text = load("report").to_markdown(
        {"dry": False, "phases": {"install": {"error": "x"}}, "comparisons": []}
    )
    assert "| install |" in text
