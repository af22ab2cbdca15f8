"""bench/tune.py without a GPU: what is tried, what is refused, and what gets into the table of launches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from vapt_fast.ops.triton_launch import Config

PROGRAM = Path(__file__).parents[2] / "bench" / "tune.py"
OPS = ("prompt_pool", "prompt_projector", "add_norm", "prompt_attention")


@pytest.fixture
def tune(load, monkeypatch):
    """The module, with tiny sizes that are interpreted."""
    tune = load("tune")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tune, "GRID", (3, 3))
    monkeypatch.setattr(tune, "MODELS", {"S": (16, 1), "B": (32, 2)})
    monkeypatch.setattr(tune, "UNFIT", set())
    monkeypatch.setattr(tune, "SETS", 2)
    return tune


@pytest.fixture
def timed(tune, monkeypatch):
    """What each configuration takes, in place of a GPU's time; other configurations take 10 us."""
    times = []

    def us(launches):
        return next((us for config, us in times if config == launches[0].config), 10.0)

    def in_turns(*graphs):
        return [us(launches) * len(launches) * tune.REPEATS for launches in graphs]

    monkeypatch.setattr(tune, "captured", lambda launches: launches)
    monkeypatch.setattr(tune, "in_turns", in_turns)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return times


@pytest.fixture
def few(tune, monkeypatch):
    """Three candidates for each kernel that has channels in blocks."""
    found = [Config({"BLOCK_C": size}, 2, 1) for size in (16, 32, 64)]
    monkeypatch.setattr(tune, "candidates", lambda kernel, sizes: found)
    return found


def options(tune, tmp_path, *arguments):
    return tune.parse_options(["--out", str(tmp_path / "out.jsonl"), "--dtypes", "float32", *arguments])


def small(tune, tmp_path, *arguments):
    """The forward kernel of the projector at two batches, whose entry is the same."""
    wanted = ["--kernels", "prompt_projector_fwd", "--models", "B", "--sizes", "3x1,3x2"]
    return options(tune, tmp_path, *wanted, *arguments)


def tensors(arguments):
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors(argument)


# ---- candidates


@pytest.mark.parametrize("op", OPS)
def test_a_candidate_takes_the_place_of_one_default(tune, op):
    """What else is launched stays, the numbers are right, and a launch may be repeated."""
    runner = tune.Runner(tune.Case(op, "B", 3, 2, "float32"), "cpu", 1)
    defaults = runner.launches()
    assert {question.kernel for question in defaults} == set(runner.kernels)
    for question, of in defaults.items():
        assert all(one.config is runner.configs[question] for one in of)
        candidate = runner.candidates(question)[0]
        changed = runner.launches({question: candidate})
        assert changed.keys() == defaults.keys()
        for other, launches in changed.items():
            expected = runner.merged(question, candidate) if other == question else runner.configs[other]
            assert [one.config for one in launches] == [expected] * len(defaults[other])
        for one in changed[question]:
            before = [tensor.clone() for tensor in tensors(one.args)]
            one()
            for old, new in zip(before, tensors(one.args), strict=True):
                torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_tables_are_asked_as_ever_afterwards(tune):
    from vapt_fast.ops.add_norm import tuning

    before = tuning.config("fwd", torch.float32, 32)
    runner = tune.Runner(tune.Case("add_norm", "B", 3, 1, "float32"), "cpu", 1)
    for question in runner.launches(launching=False):
        runner.launches({question: Config({"BLOCK_T": 1}, 1, 1)}, launching=False)
    assert tuning.config("fwd", torch.float32, 32) == before


def test_every_candidate_is_compiled_by_one_process(tune, tmp_path, monkeypatch):
    """Nothing is launched, and all sizes of one are compiled by the same."""
    monkeypatch.setattr(tune, "launch", None)
    by = {}
    for index in range(3):
        part = f"{index}/3"

        def keep(self, part=part):
            by.setdefault(repr(self.config), []).append(part)

        monkeypatch.setattr(tune.Launch, "compile", keep)
        tune.work(small(tune, tmp_path, "--worker", part), "cpu")
    runner = tune.Runner(tune.Case("prompt_projector", "B", 3, 2, "float32"), "cpu", 1)
    question = next(q for q in runner.launches(launching=False) if q.kernel == "prompt_projector_fwd")
    wanted = [runner.configs[question], *(runner.merged(question, c) for c in runner.candidates(question))]
    assert by.keys() == set(map(repr, wanted))
    assert all(len(parts) == 2 and len(set(parts)) == 1 for parts in by.values())
    assert {part for parts in by.values() for part in parts} == {"0/3", "1/3", "2/3"}


# ---- results


def test_what_loses_at_one_size_is_not_tried_at_another(tune, timed, few, tmp_path):
    wanted = small(tune, tmp_path)
    runner = tune.Runner(tune.Case("prompt_projector", "B", 3, 2, "float32"), "cpu", 1)
    (question,) = [q for q in runner.launches(launching=False) if q.kernel == "prompt_projector_fwd"]
    slow, fast, _ = (runner.merged(question, config) for config in few)
    timed += [(slow, 11.0), (fast, 8.0), (runner.configs[question], 10.0)]
    results = list(tune.measure(wanted, {}, "cpu"))
    tried = [(r["batch"], r["blocks"]["BLOCK_C"], r["us"], r["default_us"]) for r in results]
    assert tried[:3] == [(1, 16, 11.0, 10.0), (1, 32, 8.0, 10.0), (1, 64, 10.0, 10.0)]
    assert [(batch, size) for batch, size, *_ in tried[3:]] == [(2, 32), (2, 64)]
    (entry,) = tune.table_of(results)["prompt_projector_fwd"]
    assert entry == {
        **{"sizes": dict(question.sizes), "blocks": {"BLOCK_C": 32}},
        **{"num_warps": 2, "num_stages": 1, "ratio": 1.25},
    }


def test_a_run_goes_on_where_it_was_cut_off(tune, timed, few, tmp_path):
    wanted = small(tune, tmp_path)
    results = list(tune.measure(wanted, {}, "cpu"))
    known = {result["key"]: result for result in results[:2]}
    assert list(tune.measure(wanted, known, "cpu")) == results[2:]
    wanted.seconds = -1
    assert list(tune.measure(wanted, known, "cpu")) == []


@pytest.mark.parametrize("wrong", ["a program is left out", "numbers are a little off"])
def test_wrong_numbers_are_refused(tune, timed, few, tmp_path, monkeypatch, wrong):
    launch = tune.launch

    def launch_wrongly(jit, config, programs, *args, **constants):
        bad = config.num_warps == 2
        launch(jit, config, programs - (bad and "program" in wrong), *args, **constants)
        if bad and "numbers" in wrong:
            args[0].view(-1)[0] += 0.1

    monkeypatch.setattr(tune, "launch", launch_wrongly)
    results = list(tune.measure(small(tune, tmp_path), {}, "cpu"))
    assert len(results) == 3
    assert all("is off by" in result[tune.FAILED] for result in results)
    assert tune.table_of(results) == {
        "prompt_projector_fwd": [{"sizes": results[0]["sizes"], "ratio": 1.0}],
    }


def result(tune, block, us, batch=64, rows=50, **of):
    question = tune.Question("pool", (("rows", rows),))
    config = Config({"BLOCK": block}, 4, 1)
    case = tune.Case("prompt_pool", "B", 50, batch, "bfloat16")
    found = {"key": tune.key_of(case, question, config), "kernel": "pool", "sizes": {"rows": rows}}
    return found | tune.described(config) | {"us": us, "default_us": 10.0} | of


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({64: {16: 8.0, 32: 9.0}, 256: {16: 9.0, 32: 7.5}}, 32),  # the mean
        ({64: {16: 8.0, 32: 9.0}, 256: {16: 9.0}}, 16),  # what all sizes have
        ({64: {16: 5.0, 32: 9.0}, 256: {16: 10.4, 32: 9.0}}, 32),  # nowhere slower
        ({64: {16: 9.8}, 256: {16: 9.8}}, None),  # noise
        ({64: {16: 5.0, 32: 9.0}, 256: {16: "failed", 32: 9.0}}, 32),
    ],
)
def test_the_best(tune, times, best):
    results = [
        result(tune, block, us, batch) | ({"failed": us} if us == "failed" else {})
        for batch, of in times.items()
        for block, us in of.items()
    ]
    (entry,) = tune.table_of(results)["pool"]
    assert entry.get("blocks") == (None if best is None else {"BLOCK": best})


def test_the_table_keeps_what_was_not_measured(tune, tmp_path, monkeypatch):
    old = [{"sizes": {"rows": rows}, "blocks": {"BLOCK": 8}} for rows in (10, 50, 100)]
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"9.0": {"kernels": {"pool": old}}, "8.0": {}}))
    monkeypatch.setattr(tune, "TABLE", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    tune.write_table(tune.table_of([result(tune, 16, 5.0), result(tune, 16, 12.0, rows=100)]))
    table = json.loads(path.read_text())
    assert table["8.0"] == {}
    blocks = {entry["sizes"]["rows"]: entry["blocks"] for entry in table["9.0"]["kernels"]["pool"]}
    assert blocks == {10: {"BLOCK": 8}, 50: {"BLOCK": 16}}


def test_what_a_dry_run_found_unfit_is_left_out(tune, few):
    case = tune.Case("prompt_projector", "B", 3, 2, "float32")
    runner = tune.Runner(case, "cpu", 1)
    for question in runner.launches(launching=False):
        one, two, _ = candidates = runner.candidates(question)
        of_another_batch = tune.key_of(tune.replace(case, batch=64), question, two)
        tune.UNFIT.add(tune.without_batch(of_another_batch))
        assert runner.candidates(question) == [one, *candidates[2:]]


@pytest.mark.full
def test_a_dry_run(tmp_path):
    """In a process of its own, in which kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out, wanted = tmp_path / "dry.jsonl", ["--kernels", "prompt_pool_bwd_grads", "--models", "B"]
    wanted += ["--sizes", "50x64", "--dtypes", "bfloat16"]
    command = [sys.executable, PROGRAM, "--out", out, "--dry", *wanted]
    subprocess.run(command, env=env, capture_output=True, check=True)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(results) >= 4
    assert all(result["registers"] > 0 and result["shared"] >= 0 for result in results)
