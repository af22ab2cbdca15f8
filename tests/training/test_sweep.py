"""Sweeps: an honest choice, each run once whoever does it, the same table after any stop."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from command import error_of, succeed
from filelock import FileLock
from peft_import import peft
from suite_folders import fgvc_folder, vtab_folder
from torch.utils.data import Subset, TensorDataset
from training_cases import BACKBONE

from vapt_fast.training import Trainer, UserError
from vapt_fast.training.loader import make_loader
from vapt_fast.training.sweep import PROTOCOLS, Places, SweepOptions, sweep, sweep_table, write_table
from vapt_fast.training.sweep.engines import spread
from vapt_fast.training.sweep.work import CLAIM_NAME, chosen_run, free_devices, is_finished, perform

pytestmark = pytest.mark.full

PLACES = Places(poll=0.05)
TASKS = ("svhn", "eurosat", "kitti")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        vtab_folder(folder, task)
    return folder


def options(root, **changes):
    run = {"root": str(root), "other_sizes": True, "backbone": BACKBONE, "base_lrs": [1.0, 0.1]}
    run |= {"weight_decays": [0.01, 0.0], "recipe": {"epochs": 2, "batch_size": 6, "warmup_epochs": 1}}
    given = {"data": ["vtab:svhn", "vtab:kitti"], "methods": ["linear"], "seeds": [3, 1], "run": run}
    return SweepOptions(**{**given, "run": {**run, **changes.pop("run", {})}, **changes})


def table_of(chosen, folder, places=PLACES):
    """Run a sweep, and return its table with every loss and accuracy of every epoch, to the last bit."""
    sweep(chosen, folder, places)
    write_table(sweep_table(chosen, folder), folder)
    epochs = {
        str(path.relative_to(folder)): [
            {name: value for name, value in json.loads(line).items() if name != "seconds"}
            for line in path.read_text().splitlines()
        ]
        for path in folder.rglob("metrics.jsonl")
    }
    return (folder / "table.json").read_bytes(), (folder / "table.csv").read_bytes(), epochs


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A sweep without a stop: its options, its folder and its table."""
    chosen, folder = options(root), tmp_path_factory.mktemp("whole")
    return chosen, folder, table_of(chosen, folder)


def results(folder, pattern):
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"runs/*/*/{pattern}/result.json"))]


# ---- what is computed


def test_candidates_never_see_the_test_and_the_last_trainings_use_all_images(whole):
    _, folder, _ = whole
    candidates, last = results(folder, "lr-*"), results(folder, "seed-*")
    assert len(candidates) == 2 * 4
    assert {json.dumps(result["num_images"]) for result in candidates} == {
        json.dumps({"train": 12, "validation": 6, "test": 0})
    }
    assert {result["test_accuracy"] for result in candidates} == {None}
    assert len(last) == 2 * 2
    assert {json.dumps(result["num_images"]) for result in last} == {
        json.dumps({"train": 18, "validation": 0, "test": 6})
    }
    assert {result["validation_accuracy"] for result in last} == {None}
    assert {result["recipe"]["seed"] for result in candidates} == {3}
    assert not list(folder.rglob("*.safetensors"))
    assert not list(folder.rglob("checkpoint.pt"))


def test_validation_chooses_and_ties_go_to_the_smaller_rate(whole, tmp_path):
    chosen, _, _ = whole
    cell = chosen.cells()[0]
    candidates = cell.candidates()
    assert [run.options.base_lrs + run.options.weight_decays for run in candidates] == [
        [1.0, 0.01],
        [1.0, 0.0],
        [0.1, 0.01],
        [0.1, 0.0],
    ]

    def write(index, **result):
        folder = tmp_path / candidates[index].name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(result))

    for index, accuracy in enumerate((0.5, 0.7, 0.7)):
        write(index, validation_accuracy=accuracy)
    assert chosen_run(cell, tmp_path) is None  # one is missing
    write(3, validation_accuracy=0.7)
    assert chosen_run(cell, tmp_path) == candidates[3]
    write(3, diverged=True)
    assert chosen_run(cell, tmp_path) == candidates[2]
    write(0, validation_accuracy=0.8)
    assert chosen_run(cell, tmp_path) == candidates[0]
    for index in range(4):
        write(index, diverged=True)
    assert chosen_run(cell, tmp_path) is None


def test_the_last_trainings_are_by_the_recipe_that_was_chosen(whole):
    chosen, folder, _ = whole
    for cell in chosen.cells():
        best = chosen_run(cell, folder)
        for run in cell.last(best):
            result = json.loads((folder / run.name / "result.json").read_text())
            assert [result["recipe"]["base_lr"]] == best.options.base_lrs
            assert [result["recipe"]["weight_decay"]] == best.options.weight_decays
            assert result["recipe"]["seed"] == run.options.recipe["seed"]


def test_without_a_choice_nothing_is_searched(root, tmp_path):
    chosen = options(root, protocol="adamw", run={"base_lrs": None, "weight_decays": None})
    table_of(chosen, tmp_path)
    assert results(tmp_path, "lr-*") == []
    assert {result["normalize"] for result in results(tmp_path, "seed-*")} == {"model"}
    recipe = results(tmp_path, "seed-1")[0]["recipe"]
    assert (recipe["optimizer"], recipe["base_lr"], recipe["weight_decay"]) == ("adamw", 0.004, 0.0001)


def test_the_protocols():
    paper, new = PROTOCOLS["paper"], PROTOCOLS["adamw"]
    assert (len(paper.training("vapt").base_lrs), len(paper.training("vapt").weight_decays)) == (10, 4)
    assert (len(paper.seeds), len(new.seeds)) == (5, 3)
    assert paper.training("full").base_lrs != paper.training("linear").base_lrs
    # AdamW's rate at a batch size of 64
    assert new.training("vapt").base_lrs[0] * 64 / 256 == pytest.approx(1e-3)
    assert new.training("full").base_lrs[0] * 64 / 256 == pytest.approx(1e-4)


def test_numbers_of_prompts_are_chosen_too_where_there_are_prompts(root):
    chosen = options(root, methods=["vapt", "vpt-deep", "linear"], num_prompts=[2, 5])
    by_method = {cell.method: cell.candidates() for cell in chosen.cells()}
    assert [len(runs) for runs in by_method.values()] == [8, 8, 4]
    assert {run.options.prompts["num_prompts"] for run in by_method["vapt"]} == {2, 5}
    assert by_method["vpt-deep"][0].options.prompts["prompt_dropout"] == 0.1
    assert len({run.name for runs in by_method.values() for run in runs}) == 20


lora = pytest.param("lora", marks=pytest.mark.skipif(peft is None, reason="needs peft"))


@pytest.mark.parametrize("method", ["vapt", "vpt-shallow", "full", lora])
def test_every_method_runs(method, root, tmp_path):
    run = {"base_lrs": [0.1], "weight_decays": [0.0]}
    chosen = options(root, data=["vtab:kitti"], methods=[method], seeds=[0], run=run)
    table_of(chosen, tmp_path, replace(PLACES, save_models=True))
    (row,) = sweep_table(chosen, tmp_path).rows
    assert 0 <= row.accuracy.mean <= 1
    assert row.accuracy.std is None
    assert row.num_trained > row.num_trained_in_head == 4 * 65
    assert (row.num_trained == row.num_parameters) == (method == "full")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_shares_of_the_training_images(root, tmp_path):
    run = {"base_lrs": [0.1], "weight_decays": [0.0]}
    chosen = options(root, data=["vtab:svhn"], train_shares=[0.3, 1.0], run=run)
    table_of(chosen, tmp_path)
    sizes = {row.share: row for row in sweep_table(chosen, tmp_path).rows}
    assert sizes.keys() == {0.3, 1.0}
    few = json.loads((tmp_path / "runs/vtab-svhn/linear-0.3/seed-3/result.json").read_text())
    assert few["num_images"] == {"train": 6, "validation": 0, "test": 6}  # of 18


def test_fgvc(tmp_path):
    """As in the paper, the last training is on the training images alone."""
    fgvc_folder(tmp_path / "data", "oxfordflower")
    run = {"base_lrs": [0.1, 1.0], "weight_decays": [0.0], "recipe": {"epochs": 1, "batch_size": 64}}
    chosen = options(tmp_path / "data", data=["fgvc:oxfordflower"], seeds=[0], run=run)
    table_of(chosen, tmp_path / "out")
    (last,) = results(tmp_path / "out", "seed-*")
    assert last["num_images"] == {"train": 102, "validation": 102, "test": 102}
    assert [cell.candidates()[0].options.augment for cell in chosen.cells()] == ["crop-flip"]
    (_, means), *_ = sweep_table(chosen, tmp_path / "out").means()
    assert means["mean_of_tasks"] == means["mean_of_groups"]


def test_a_method_that_diverges_is_reported_and_stops_nothing(root, tmp_path):
    run = {"base_lrs": [1e30, 1e29], "weight_decays": [0.0]}
    chosen = options(root, data=["vtab:svhn", "vtab:kitti"], methods=["full"], run=run)
    table_of(chosen, tmp_path)
    table = sweep_table(chosen, tmp_path)
    assert [(row.complete, row.accuracy, row.chosen) for row in table.rows] == [(True, None, None)] * 2
    assert table.means()[0][1]["mean_of_tasks"] is None


# ---- the table


def test_both_means_and_their_deviations(root, tmp_path):
    """Over tasks and over groups, by seed first; against numbers that are written by hand."""
    chosen = options(root, data=[f"vtab:{task}" for task in ("svhn", "cifar", "kitti")], seeds=[0, 1])
    accuracies = {"svhn": (0.9, 0.7), "cifar": (0.5, 0.7), "kitti": (0.2, 0.4)}
    for cell in chosen.cells():
        best = cell.candidates()[0]
        for run in (*cell.candidates(), *cell.last(best)):
            result = {"data": {"name": cell.data}, "train_seconds": 1.0, "peak_memory": None}
            result |= {"test_accuracy": None, "validation_accuracy": float(run == best)}
            if run.last:
                seed = run.options.recipe["seed"]
                result["test_accuracy"] = accuracies[cell.data.partition(":")[2]][seed]
            (tmp_path / run.name).mkdir(parents=True)
            (tmp_path / run.name / "result.json").write_text(json.dumps(result))
    table = sweep_table(chosen, tmp_path)
    ((key, means),) = table.means()
    assert key["data_sets"] == 3
    tasks, groups = [1.6 / 3, 1.8 / 3], [(0.7 + 0.2) / 2, (0.7 + 0.4) / 2]
    for name, values in (("mean_of_tasks", tasks), ("mean_of_groups", groups), ("natural", [0.7, 0.7])):
        assert means[name].mean == pytest.approx(statistics.fmean(values))
        assert means[name].std == pytest.approx(statistics.stdev(values))
    assert table.rows[0].accuracy.std == pytest.approx(statistics.stdev((0.9, 0.7)))
    assert (table.rows[0].search_seconds, table.rows[0].train_seconds) == (4.0, 1.0)

    (tmp_path / run.name / "result.json").unlink()  # of kitti
    ((_, means),) = sweep_table(chosen, tmp_path).means()
    assert means["mean_of_tasks"] is means["mean_of_groups"] is means["structured"] is None
    assert means["natural"].mean == pytest.approx(0.7)


def test_results_of_different_lists_are_not_mixed(whole, tmp_path):
    chosen, folder, _ = whole
    subprocess.run(["cp", "-r", folder, tmp_path / "copy"], check=True)
    path = tmp_path / "copy/runs/vtab-svhn/linear/seed-1/result.json"
    result = json.loads(path.read_text())
    result["data"]["sha256"]["test.txt"] = "0" * 64
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match="results for vtab:svhn are of different lists"):
        sweep_table(chosen, tmp_path / "copy")


# ---- stopped and shared


class Stop(Exception):
    pass


@pytest.mark.parametrize("steps", [1, 9, 17])
def test_a_stopped_sweep_goes_on_to_the_same_table(whole, steps, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch, several times, it gives the same bits as without."""
    chosen, _, table = whole
    step = Trainer._step
    stops = 0
    while True:
        left = iter(range(steps))

        def counted(*arguments, left=left):
            if next(left, None) is None:
                raise Stop
            return step(*arguments)

        with monkeypatch.context() as patch:
            if stops < 3:
                patch.setattr(Trainer, "_step", counted)
            try:
                assert table_of(chosen, tmp_path) == table
                break
            except Stop:
                stops += 1
    assert stops == 3


def test_nothing_is_computed_twice(whole, monkeypatch, tmp_path):
    chosen, folder, table = whole
    monkeypatch.setattr(Trainer, "run_epoch", None)  # would fail
    assert table_of(chosen, folder) == table


SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch
from vapt_fast.training import Trainer
from vapt_fast.training.sweep import Places, SweepOptions, sweep

torch.set_num_threads(1)
folder, log, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
run_epoch = Trainer.run_epoch
def logged(self):
    with open(log, "a") as file:
        file.write(json.dumps([os.getpid(), self.recipe.seed, self.recipe.base_lr, self.epoch]) + "\\n")
    time.sleep(pause)
    return run_epoch(self)
Trainer.run_epoch = logged
sweep(SweepOptions.read(folder), folder, Places(poll=0.05))
"""


def start(folder, log, pause):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(log), str(pause)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_share_a_sweep(whole, tmp_path):
    """Each run is computed once, both do some, and the table is the same."""
    chosen, _, table = whole
    chosen.write(tmp_path)
    log = tmp_path / "log"
    processes = [start(tmp_path, log, 0.15) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(lines(log)) == 12 * 2  # epochs of all runs
    assert len({line[0] for line in lines(log)}) == 2
    assert table_of(chosen, tmp_path) == table


def test_the_claim_of_a_dead_process_is_taken_over(whole, tmp_path):
    """A process that is killed in a run leaves its checkpoint, from which another goes on at once."""
    chosen, _, table = whole
    chosen.write(tmp_path)
    log = tmp_path / "log"
    process = start(tmp_path, log, 1e6)
    wait_until(lambda: lines(log))
    first = chosen.cells()[0].candidates()[0]
    assert (tmp_path / first.name / CLAIM_NAME).exists()
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not is_finished(first, tmp_path)
    assert table_of(chosen, tmp_path) == table


def test_a_run_that_is_claimed_is_left_alone(whole, tmp_path):
    chosen, _, _ = whole
    run = chosen.cells()[0].candidates()[0]
    (tmp_path / run.name).mkdir(parents=True)
    with FileLock(tmp_path / run.name / CLAIM_NAME):
        assert not perform(tmp_path, PLACES, chosen, tmp_path, run)
        assert not is_finished(run, tmp_path)
    assert perform(tmp_path, PLACES, chosen, tmp_path, run)
    assert is_finished(run, tmp_path)
    assert not perform(tmp_path, PLACES, chosen, tmp_path, run)  # it is there already


def test_runs_at_the_same_time_take_different_devices(tmp_path):
    places = Places(devices=("cuda:0", "cuda:1"), jobs=3)
    with ExitStack() as stack:
        taken = [stack.enter_context(free_devices(places, 1, tmp_path)) for _ in range(3)]
    assert taken == [("cuda:0",), ("cuda:1",), ("cuda:0",)]
    with free_devices(places, 1, tmp_path) as first:
        assert first == ("cuda:0",)


# ---- engines


@pytest.mark.full
def test_joblib_shares_a_sweep(whole, tmp_path):
    pytest.importorskip("joblib")
    chosen, _, table = whole
    assert table_of(chosen, tmp_path, replace(PLACES, jobs=2)) == table
    with pytest.raises(UserError, match="a process was ended from outside"):
        list(spread("joblib", os._exit, [(1,), (1,)], jobs=2, gpu=False))


@pytest.mark.full
def test_the_processes_of_joblib_have_workers_of_their_own():
    """A process that reads images is started by one that joblib has started."""
    loky = pytest.importorskip("joblib.externals.loky")
    data = Subset(TensorDataset(torch.zeros(4, 1), torch.arange(4)), range(4))

    def read(size):
        return [labels.tolist() for _, labels in make_loader(data, size, workers=1)]

    batches = sorted(spread("joblib", read, [(2,), (4,)], jobs=2, gpu=False))
    loky.get_reusable_executor().shutdown(wait=True)  # else they wait for more, beside the next test
    assert batches == [[[0, 1], [2, 3]], [[0, 1, 2, 3]]]


@pytest.mark.full
def test_processes_of_torchrun_share_a_sweep(whole, tmp_path):
    chosen, _, table = whole
    chosen.write(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vapt_fast"]
    shared = subprocess.run([*command, "sweep", "--output", tmp_path], capture_output=True, check=False)
    assert shared.returncode == 0, shared.stderr.decode()
    assert table_of(chosen, tmp_path) == table


@contextmanager
def cluster_of_two():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield ray
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.full
def test_ray_shares_a_sweep_between_two_nodes(whole, tmp_path):
    chosen, _, table = whole
    with cluster_of_two() as ray:

        def node(index):
            time.sleep(0.5)
            return ray.get_runtime_context().get_node_id()

        assert len(set(spread("ray", node, ((i,) for i in range(8)), jobs=None, gpu=False))) == 2

        def fail():
            raise UserError("what went wrong")

        with pytest.raises(UserError, match=r"^what went wrong$"):
            list(spread("ray", fail, [()], jobs=1, gpu=False))
        assert table_of(chosen, tmp_path, replace(PLACES, engine="ray")) == table


def test_sweeps_with_lora_need_peft(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vapt_fast\[lora\]'"):
        sweep(options(root, methods=["linear", "lora"]), tmp_path)
    assert not any(tmp_path.iterdir())


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["vtab:svnh"]}, "expected vtab:svhn"),
        ({"data": ["images"]}, "data must be one of"),
        ({"data": []}, "data must have at least one entry"),
        ({"methods": ["adapter"]}, "method must be one of"),
        ({"protocol": "sgd"}, "protocol must be one of"),
        ({"seeds": []}, "seeds must have at least one entry"),
        ({"seeds": [-1]}, r"seed must be in \[0"),
        ({"train_shares": [0.0]}, r"train_share must be in \(0, 1\]"),
        ({"num_prompts": [-1], "methods": ["vapt"]}, "num_prompts must be at least 0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"run": {"augment": "crop-flip"}}, r"cache keeps every image .* \(--no-cache\)"),
        ({"run": {"colour": 1}}, "colour"),
        ({"run": {"recipe": {"momentun": 1}}}, "momentun"),
    ],
)
def test_bad_options(root, changes, message):
    with pytest.raises(UserError, match=message):
        options(root, **changes)


def test_another_sweep_or_other_data(whole, tmp_path):
    chosen, folder, _ = whole
    with pytest.raises(UserError, match=r"was started with seeds=\[3, 1\], got \[3\]"):
        sweep(replace(chosen, seeds=[3]), folder)
    with pytest.raises(UserError, match=r"train800.txt has 12 images instead of 800"):
        sweep(replace(chosen, run={**chosen.run, "other_sizes": False}), tmp_path)
    with pytest.raises(UserError, match="there is no sweep"):
        SweepOptions.read(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"image_size": 33}, "image_size must be a multiple of the patch size"),
        ({"prompts": {"conv_kernel": 99}}, "conv_kernel=99"),
        ({"backbone": "vit_digit"}, "similar: vit_digits_patch4_32"),
    ],
)
def test_what_suits_no_run_is_refused_before_the_sweep_begins(run, message, root, tmp_path):
    chosen = options(root, methods=["vapt"])
    with pytest.raises(UserError, match=message):
        sweep(replace(chosen, run=chosen.run | run), tmp_path / "out", PLACES)
    assert not (tmp_path / "out").exists()


def test_rates_that_are_nearly_the_same_are_runs_of_their_own(root):
    chosen = options(
        root, methods=["linear"], run={"base_lrs": [1.0, 1.0000001, 0.1], "weight_decays": [1e-4]}
    )
    names = [run.name.rpartition("/")[2] for run in chosen.cells()[0].candidates()]
    assert names == ["lr-1-decay-0.0001", "lr-1.0000001-decay-0.0001", "lr-0.1-decay-0.0001"]


def test_a_run_that_fails_is_named(root, tmp_path):
    vtab_folder(tmp_path, "svhn")
    (tmp_path / "svhn/images/test/000002.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"runs/vtab-svhn/linear/seed-3: .*000002.jpg is not an image"):
        sweep(options(tmp_path, data=["vtab:svhn"]), tmp_path / "out", PLACES)


# ---- the command


def test_the_command(root, tmp_path):
    quick = "--epochs 1 --batch-size 6 --lr 1 --lr 0.1 --weight-decay 0 --prompts 2 --other-sizes --seed 1"
    arguments = ["--output", tmp_path, "--root", root, "--backbone", BACKBONE, *quick.split()]
    arguments += ["--data", "vtab:svhn", "--data", "vtab:kitti", "--method", "linear", "--method", "vapt"]
    output = succeed("sweep", *arguments, "--device", "cpu").output
    assert "VTAB-1K, 2 of 19 data sets" in output
    assert "note: vtab:kitti is not the benchmark's: train800.txt has 12 images" in output
    assert SweepOptions.read(tmp_path).run["prompts"] == {}
    assert succeed("sweep", "--output", tmp_path, "--table").output in output.replace("\r", "")
    assert "--data must be given with --lr" in error_of("sweep", "--output", tmp_path, "--lr", 1)
    assert "was started with seeds=[1], got [1, 2]" in error_of("sweep", *arguments, "--seed", 2)
    written = json.loads((tmp_path / "table.json").read_text())
    assert [cell["method"] for cell in written["cells"]] == ["linear", "vapt"] * 2
    assert (tmp_path / "table.csv").read_text().count("\n") == 5
    assert torch.get_num_threads() == 1
