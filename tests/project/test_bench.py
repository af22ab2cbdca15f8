"""The measurements run, their gate closes, and nothing gets lost. The speeds are of no interest here."""

import json
import math
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from replaying import replaying_on_cpu
from tiny import assert_same
from typer.testing import CliRunner

from vapt_fast.adapters.mixing import Heads
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
from vapt_fast.benchmark.memory import allocated, peak_allocated, peak_resident
from vapt_fast.cli import app
from vapt_fast.ops.base import OPS as ALL_OPS
from vapt_fast.prompts import adaptive

BENCH = Path(__file__).parents[2] / "bench"
OPS = {path.stem for path in (BENCH / "ops").glob("[!_]*.py")}
TINY = Setting("test_vit", batch=1, device="cpu", threads=1, image_size=32, compiler="eager")


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


def test_a_workload_trains_from_the_same_start_under_every_backend():
    reference, workload = (Workload(TINY, Variant(name, num_prompts=2)) for name in ("reference", "torch"))
    assert torch.equal(reference.images, workload.images)
    assert_same(dict(workload.model.state_dict()), dict(reference.model.state_dict()), 0)
    assert all(block.token_projection.weight.any() for block in workload.model.prompts.blocks[1:])
    for mode, trains in (("forward", False), ("training step", True)):
        workload.runner(mode)()
        assert workload.model.training == trains
        pairs = zip(
            workload.model.trainable_parameters(), reference.model.trainable_parameters(), strict=True
        )
        assert {torch.equal(ours, start) for ours, start in pairs} == {not trains}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision):
    workload = Workload(TINY, Variant("torch", num_prompts=2, precision=precision))
    weights = PRECISIONS[precision].weights
    assert {p.dtype for p in workload.model.backbone.parameters()} == {weights}
    assert workload.model.backbone_precision == PRECISIONS[precision].backbone
    learned = torch.float64 if weights == torch.float64 else torch.float32
    assert {p.dtype for p in workload.model.prompts.parameters()} == {learned}
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with workload._conditions():
        assert (torch.get_float32_matmul_precision() == "high") == ("tf32" in precision)
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


def test_a_runner_says_when_its_model_is_in_another_mode():
    workload = Workload(TINY, Variant("torch", num_prompts=2))
    step, forward = (workload.runner(mode) for mode in MODES)
    forward()
    with pytest.raises(RuntimeError, match="no longer in the mode of a training step"):
        step()


@pytest.mark.parametrize("allowed", [False, True])
def test_a_models_own_cuda_graphs(allowed):
    """The gate's outputs come from them, as what is timed does; a variant without has none."""
    variants = [Variant("torch", num_prompts=2, cuda_graphs=allowed), Variant("reference", num_prompts=2)]
    assert ("no CUDA graphs" in str(variants[0])) != allowed
    expected = Workload(TINY, variants[1]).outputs()
    with replaying_on_cpu():
        workload = Workload(TINY, variants[0])
        actual = workload.outputs()
        assert workload.model.cuda_graph_report().count("repeated") == 2 * allowed  # with gradients, without
        assert all(error < 1e-4 for error in relative_errors(actual, expected).values())
        (row,) = Comparison(TINY, variants[:1], memory=False).measure("forward", rounds=2)
        assert row.error is None


def test_peak_memory_on_a_gpu_holds_what_graphs_keep(monkeypatch):
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 7_000_000, "allocated_size": 0},  # cached, for anyone
        {"segment_pool_id": (0, 1), "total_size": 5_000_000, "allocated_size": 1_000_000},
    ]
    gpu = {"memory_snapshot": lambda: segments, "memory_allocated": lambda device: 2_000_000}
    gpu |= {"max_memory_allocated": lambda device: 3_000_000}
    gpu |= dict.fromkeys(("synchronize", "reset_peak_memory_stats"), lambda device: None)
    for name, function in gpu.items():
        monkeypatch.setattr(torch.cuda, name, function)
    setting, ran = replace(TINY, device="cuda"), []
    assert allocated(setting) == 6_000_000
    assert allocated(TINY) == 0
    assert peak_allocated(lambda: ran.append(1), setting, before=2_000_000) == 5.0
    assert ran


@pytest.mark.parametrize("attention", [None, "explicit"])
def test_explicit_attention(attention):
    workload = Workload(TINY, Variant("reference", num_prompts=2, attention=attention))
    assert {block.attn.fused_attn for block in workload.model.backbone.blocks} == {attention is None}


def test_a_linear_probe_trains_the_head():
    probe = Workload(TINY, Variant(LINEAR_PROBE))
    assert {n for n, p in probe.model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_holds_the_activations():
    setting = Setting("test_vit", batch=1, device="cpu", threads=1)
    # One block's tokens alone are 0.03 MB; the whole process is some hundred MB.
    assert 0.1 < peak_resident(setting, Variant("torch", num_prompts=2), "training step") < 200


# ---- the gate


def test_gate_lets_equal_backends_pass():
    precisions = {"float32": 1e-4, "float64": 1e-10, "bfloat16-autocast": 1e-1}
    variants = [Variant("torch", num_prompts=2, precision=precision) for precision in precisions]
    comparison = Comparison(TINY, variants, memory=False)
    for row in (row for mode in MODES for row in comparison.measure(mode, rounds=2)):
        assert row.error is None
        assert len(row.seconds) == 2
        assert row.largest_error < precisions[row.variant.precision]
    assert row.largest_error > 1e-4  # of bfloat16


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gate_stops_a_wrong_backend_and_only_that(precision, monkeypatch):
    right = adaptive.prompt_projector
    # A factor would not do: the block's LayerNorm takes it away.
    monkeypatch.setattr(adaptive, "prompt_projector", lambda *args, **kwargs: right(*args, **kwargs).relu())
    variants = [Variant(backend, num_prompts=2, precision=precision) for backend in ("reference", "torch")]
    reference, wrong = Comparison(TINY, variants, memory=False).measure("forward", rounds=2)
    assert reference.seconds
    assert (wrong.seconds, wrong.wrong) == ([], True)
    assert re.match("DisagreementError: .* is off by", wrong.error)


@pytest.mark.parametrize(
    ("precision", "error", "literal", "passes"),
    [
        ("float32", 1e-4, 0.0, True),
        ("float32", 1e-2, 1.0, False),
        ("bfloat16", 0.1, 0.045, True),
        ("bfloat16", 0.1, 0.04, False),
        ("float16", math.inf, math.inf, False),
    ],
)
def test_in_low_precision_the_gate_is_the_literal_method(precision, error, literal, passes):
    with nullcontext() if passes else pytest.raises(DisagreementError, match="logits is off by"):
        check({"logits": error}, {"logits": literal}, PRECISIONS[precision])


def test_errors_of_nan_are_infinite_and_a_missing_gradient_is_no_agreement():
    ones = torch.ones(3, dtype=torch.float64)
    assert relative_errors({"logits": 1.01 * ones}, {"logits": ones}) == {"logits": pytest.approx(0.01)}
    assert relative_errors({"logits": math.nan * ones}, {"logits": ones}) == {"logits": math.inf}
    with pytest.raises(DisagreementError):
        relative_errors({}, {"logits": ones})


def test_what_fails_is_named_and_the_others_go_on():
    variants = [
        Variant("torch", num_prompts=2),
        Variant("cuda", num_prompts=2),
        Variant("torch", num_prompts=2, attention="cudnn"),
    ]
    comparison = Comparison(TINY, variants, memory=False)
    rows = comparison.measure("forward", rounds=2)
    assert [bool(row.seconds) for row in rows] == [True, False, False]
    assert "BackendUnavailableError" in rows[1].error
    assert rows[2].error
    assert not any(row.wrong for row in rows)
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
    assert "its kernels need a CUDA GPU" in result.stdout


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


@pytest.mark.full
def test_what_the_host_takes_is_measured(tmp_path):
    """In a process of its own: nothing is launched in it any more."""
    command = [
        sys.executable,
        str(BENCH / "host.py"),
        "--calls=2",
        "--rounds=1",
        f"--out={tmp_path / 'host.json'}",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = json.loads((tmp_path / "host.json").read_text())
    assert set(measured) - {"block"} == set(ALL_OPS) - {"prompt_attention"}  # which a block calls packed
    assert all(name in printed for name in measured)
    assert all(mode > 0 for op in set(measured) - {"block"} for mode in measured[op].values())


def test_a_loop_whose_losses_are_wrong_is_noticed(load, monkeypatch, tmp_path):
    loop = load("loop")
    arguments = ["--out", str(tmp_path / "loop.json"), "--device", "cpu", "--tiny"]
    monkeypatch.setattr(loop, "ROUNDS", 1)
    right = adaptive.prompt_projector

    def wrong(*args, **kwargs):
        prompts = right(*args, **kwargs)
        return prompts + torch.linspace(0, 3, prompts.shape[-1])

    monkeypatch.setattr(adaptive, "prompt_projector", wrong)
    with pytest.raises(SystemExit, match="the losses of the first 2 steps differ by"):
        loop.main(arguments)
    monkeypatch.undo()
    loop.main(arguments)
    assert len(json.loads((tmp_path / "loop.json").read_text())["rows"]) == 3


# ---- the page


def test_adapters_in_one_batch_are_compared(load, monkeypatch, tmp_path):
    bench, out = load("adapters"), tmp_path / "adapters.json"
    bench.main(["--out", str(out), "--tiny"])
    results = json.loads(out.read_text())
    ways = {(row["way"], row["adapters"]) for row in results["inference"]}
    assert {("one adapter", 1), ("mixed, AdapterStack", 4), ("adapter by adapter", 4)} <= ways
    assert results["many"]["adapters"] == 10
    call = Heads.__call__
    monkeypatch.setattr(Heads, "__call__", lambda self, *args: call(self, *args) + 1)
    with pytest.raises(SystemExit, match="no time is reported"):
        bench.main(["--out", str(out), "--tiny"])


def test_page_says_what_the_results_say(load):
    report = load("report")
    page = report.PAGE.read_text()
    assert page == report.rewrite(page, report.section()), "run python bench/report.py"


def test_tables_hold_whatever_is_missing(load):
    text = load("report").to_markdown(
        {"dry": False, "phases": {"install": {"error": "x"}}, "comparisons": []}
    )
    assert "| install |" in text
