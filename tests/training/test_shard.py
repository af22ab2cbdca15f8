"""Frozen weights spread over processes (FSDP2): the same training, with a part of them in each."""

import json

import pytest
import torch
from command import error_of
from peft_import import peft
from safetensors.torch import load_file
from suite_folders import vtab_folder
from torch import nn
from training_cases import BACKBONE, CLASSES, make_model

from vapt_fast import AdaptiveViT
from vapt_fast.training import RunOptions, UserError, run
from vapt_fast.training.launch import launch
from vapt_fast.training.methods import build_model, trained_state
from vapt_fast.training.parallel import joined, place, rank
from vapt_fast.training.sweep import Places, SweepOptions, sweep, sweep_table

METHODS = ("vapt", "vpt-deep", "vpt-shallow", "linear", *([] if peft is None else ["lora"]))


def blocks_of(model):
    return getattr(model, "backbone", model).blocks


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def in_process(folder):
    """Keep what this process gets for images that all have, and how many numbers of the blocks it holds."""
    torch.set_num_threads(1)
    with joined("cpu"):
        found = {}
        for method in METHODS:
            model, images = case(method)
            model = place(model, "cpu", shard=True)
            frozen = [p for p in blocks_of(model).parameters() if not p.requires_grad]
            held = sum(local(p).numel() for p in frozen), sum(p.numel() for p in frozen)
            found[method] = computed(model, images), trained_state(model), held
        torch.save(found, folder / f"{rank()}.pt")


def case(method):
    torch.manual_seed(0)
    return make_model(method).double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)


def computed(model, images):
    """Logits without and with gradients, and these."""
    with torch.no_grad():
        alone = model(images)
    logits = model(images)
    learned = [p for p in model.parameters() if p.requires_grad]
    return alone, logits.detach(), *torch.autograd.grad(logits.square().sum(), learned)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    launch(in_process, folder, processes=2)
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_each_process_holds_a_part_and_computes_the_same(method, results):
    model, images = case(method)
    for result in results:
        given, learned, (held, of) = result[method]
        assert held <= 0.51 * of
        for tensor, expected in zip(given, computed(model, images), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-9)
        assert learned.keys() == trained_state(model).keys()
        assert all(torch.equal(learned[name], tensor) for name, tensor in trained_state(model).items())


OPTIONS = {
    "pretrained": False,
    "train_images": 10,
    "base_lrs": [2.0],
    "recipe": {"batch_size": 4, "epochs": 2, "warmup_epochs": 1},
    "prompts": {"num_prompts": 2, "projector_dropout": 0.0, "channel_dropout": 0.0},
}


def train_in_process(options, folder):
    torch.set_num_threads(1)
    with joined("cpu"):
        run(options, folder)


@pytest.mark.full
def test_a_run_of_two_processes(tmp_path):
    """It trains as one process does, but for the last bits, and saves the backbone as a whole."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(RunOptions(**OPTIONS), one)
    launch(train_in_process, RunOptions(**OPTIONS, shard=True), two, processes=2)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    for name in ("num_parameters", "num_trained", "weights", "test_accuracy"):
        assert results[1][name] == results[0][name]
    alone, together = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-6)
    images = torch.randn(2, 3, 32, 32)
    models = [AdaptiveViT.from_adapter(folder).eval() for folder in (one, two)]
    torch.testing.assert_close(models[1](images), models[0](images), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_a_sweep(tmp_path):
    vtab_folder(tmp_path / "data", "svhn")
    common = {"root": str(tmp_path / "data"), "other_sizes": True, "backbone": BACKBONE, "shard": True}
    common |= {"recipe": {"epochs": 2, "batch_size": 5, "warmup_epochs": 1}}
    common |= {"base_lrs": [1.0], "weight_decays": [0.0]}
    options = SweepOptions(data=["vtab:svhn"], methods=["linear"], seeds=[3], run=common, processes_per_run=2)
    sweep(options, tmp_path / "sweep", Places(poll=0.05))
    assert sweep_table(options, tmp_path / "sweep").rows[0].complete


def test_what_has_nothing_to_spread_is_refused(tmp_path):
    with pytest.raises(UserError, match="method 'full' trains all"):
        RunOptions(method="full", shard=True)
    with pytest.raises(UserError, match="frozen weights of a ViT's blocks, and this model has none"):
        place(nn.Linear(3, 3), "cpu", shard=True)
    with pytest.raises(UserError, match="this model has none"):
        place(build_model("full", BACKBONE, CLASSES), "cpu", shard=True)


def test_one_process_is_told_how_to_start_several(tmp_path):
    message = error_of("train", "--shard", "--output", tmp_path / "run")
    assert "torchrun --nproc-per-node" in message
    assert not (tmp_path / "run").exists()
    vtab_folder(tmp_path / "data", "svhn")
    message = error_of(
        *("sweep", "--data", "vtab:svhn", "--root", tmp_path / "data", "--other-sizes", "--shard"),
        *("--backbone", BACKBONE, "--output", tmp_path / "sweep"),
    )
    assert "processes_per_run" in message
    assert not (tmp_path / "sweep").exists()
