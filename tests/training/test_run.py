"""Runs: what is written, what is refused before anything is, and how stopped and finished runs go on."""

import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from peft_import import peft
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from training_cases import BACKBONE, Stop, assert_same_training, make_model, recipes, stop

from vapt_fast import AdaptiveViT, PromptConfig
from vapt_fast.data import full_data_config
from vapt_fast.training import (
    METHODS,
    Recipe,
    RunOptions,
    Trainer,
    UserError,
    build_model,
    digit_splits,
    evaluate,
    load_model,
    run,
    save_model,
)
from vapt_fast.training.methods import LoraOptions, trained_state
from vapt_fast.training.splits import evaluation_data


def options(**changes):
    settings = {
        "prompts": {"num_prompts": 2},
        "base_lrs": [1.0],
        "train_images": 5,
        "recipe": {"epochs": 2, "warmup_epochs": 1, "batch_size": 5},
    }
    return RunOptions(**{**settings, **changes})


def resume(folder):
    return run(RunOptions.read(folder), folder, resume=True)


def stopped_run(folder, **changes):
    """Start a run and stop it after one epoch."""
    with pytest.raises(Stop):
        run(options(**changes), folder, progress=stop)


def read_weights(folder):
    return load_file(folder / "adapter_model.safetensors")


# ---- saved models


needs_peft = pytest.mark.skipif(peft is None, reason="needs peft")
lora = pytest.param("lora", marks=needs_peft)


@pytest.mark.parametrize("method", ["vapt", "linear", "full", lora])
def test_saved_models_come_back(method, toy, tmp_path):
    model = make_model(method)
    Trainer(model, recipes(0.1)[0], toy.train).run_epoch()
    save_model(model, tmp_path, {"class_names": ["a", "b", "c"]})
    loaded, metadata = load_model(tmp_path)
    assert metadata["class_names"] == ["a", "b", "c"]
    assert not loaded.training
    with torch.no_grad():
        logits, expected = loaded(toy.test.tensors[0]), model.eval()(toy.test.tensors[0])
    # LoRA's products are added to the weights, which rounds them once.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 if method == "lora" else 0)


@pytest.mark.parametrize("methods", [("full", "vapt"), ("vapt", "full")], ids="then".join)
def test_a_model_of_another_kind_takes_the_place_of_the_one_before(methods, tmp_path):
    for method in methods:
        save_model(make_model(method), tmp_path, {"class_names": ["a", "b", "c"]}, include_backbone=True)
    loaded, _ = load_model(tmp_path)
    assert isinstance(loaded, AdaptiveViT) == (methods[-1] == "vapt")
    assert ("model.safetensors" in os.listdir(tmp_path)) == (methods[-1] == "full")
    assert len(os.listdir(tmp_path)) == {"vapt": 3, "full": 1}[methods[-1]]


def test_of_two_models_none_is_taken(tmp_path):
    save_model(make_model("full"), tmp_path, {"class_names": ["a", "b", "c"]})
    make_model().save_adapter(tmp_path)
    with pytest.raises(UserError, match="two models"):
        load_model(tmp_path)


@pytest.mark.parametrize("method", ["vapt", "full"])
def test_files_of_others_stay(method, tmp_path):
    """timm and PEFT give their files the same names."""
    names = {"vapt": ["model.safetensors"], "full": ["adapter_model.safetensors", "adapter_config.json"]}
    for name in names[method]:
        save_file({"a": torch.ones(1)}, tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in names[method]}
    save_model(make_model(method), tmp_path, {"class_names": ["a", "b", "c"]})
    assert {name: (tmp_path / name).read_bytes() for name in names[method]} == before


def test_damaged_or_missing_models(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "missing")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(UserError, match="damaged or no model"):
        load_model(tmp_path)


def test_an_adapter_of_the_users_own_is_loaded(tmp_path):
    make_model().save_adapter(tmp_path, metadata={"note": 1})
    loaded, metadata = load_model(tmp_path)
    assert (metadata["class_names"], metadata["note"]) == (["0", "1", "2"], 1)
    assert metadata["data_config"]["input_size"] == [3, 32, 32]
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model(BACKBONE, pretrained=True).state_dict(), weights)
    again, _ = load_model(tmp_path, weights=weights)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in loaded.state_dict().items())
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path, weights=tmp_path / "none")
    with pytest.raises(UserError, match="can't be made"):
        load_model(tmp_path, backbone="local-dir:/nowhere")


# ---- a run and its model


@pytest.mark.parametrize("size", [None, pytest.param(40, marks=pytest.mark.full)])
@pytest.mark.parametrize("method", ["vapt", "full", lora])
def test_a_run_and_its_model(method, size, tmp_path):
    chosen = options(method=method, base_lrs=[0.05], image_size=size)
    result = run(chosen, tmp_path)
    assert RunOptions.read(tmp_path) == chosen
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["num_images"] == {"train": 5, "validation": 196, "test": 400}
    assert not (tmp_path / "checkpoint.pt").exists()
    model, metadata = load_model(tmp_path)
    assert metadata["class_names"] == ["5", "6", "7", "8", "9"]
    assert tuple(metadata["data_config"]["mean"]) == (0.5, 0.5, 0.5)
    test = evaluation_data("digits", metadata["data_config"], metadata["class_names"])
    assert test[0][0].shape == (3, size or 32, size or 32)
    assert evaluate(model, test, batch_size=5).accuracy == result["test_accuracy"]


@pytest.mark.parametrize(
    ("method", "source"),
    [
        *(("vapt", "file"), ("linear", "random")),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("vapt", "random"), ("full", "file"))),
    ],
)
def test_what_was_trained_on_other_weights_needs_nothing_to_be_loaded(tmp_path, method, source):
    changes = {"pretrained": False}
    if source == "file":
        torch.manual_seed(3)
        torch.save({"state_dict": timm.create_model(BACKBONE).state_dict()}, tmp_path / "w.pth")
        changes = {"weights": str(tmp_path / "w.pth")}
    result = run(options(method=method, base_lrs=[0.1], **changes), tmp_path / "out")
    (tmp_path / "w.pth").unlink(missing_ok=True)
    assert bool(list((tmp_path / "out").glob("backbone-*"))) == (method != "full")
    model, metadata = load_model(tmp_path / "out")
    test = evaluation_data("digits", metadata["data_config"], metadata["class_names"])
    assert evaluate(model, test, batch_size=5).accuracy == result["test_accuracy"]


@needs_peft
def test_lora_trains_its_matrices_and_the_head_and_nothing_else(toy):
    """On qkv alone, as many as rank * (inputs + outputs) a block; the weights that are frozen stay."""
    model = build_model("lora", BACKBONE, 3, lora=LoraOptions(rank=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, recipes(1.0)[0], toy.train)
    state = trainer.state_dict()
    trainer.run_epoch()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(trained_state(model)) == set(state["model"])
    dim, depth = model.embed_dim, len(model.blocks)
    assert sum(t.numel() for t in trained_state(model).values()) == depth * 2 * 4 * dim + 3 * (dim + 1)
    trainer.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@needs_peft
def test_what_lora_is_not_for(tmp_path):
    with pytest.raises(UserError, match=r"lora_targets \['query'\] do not fit VisionTransformer"):
        build_model("lora", BACKBONE, 3, lora=LoraOptions(targets=("query",)))
    with pytest.raises(UserError, match=r"backbone_precision='fp8'"):
        build_model("lora", BACKBONE, 3, backbone_precision="fp8")
    with pytest.raises(UserError, match="a run of 'lora' can't be trained on"):
        options(method="lora").extended(5, tmp_path)


def test_images_in_a_folder(image_folder, tmp_path):
    common = {"data": str(image_folder), "train_images": None}
    plain = run(options(**common), tmp_path / "plain")
    assert plain["num_images"] == {"train": 12, "validation": 4, "test": 4}
    cached = run(options(**common, cache=True), tmp_path / "cached")
    assert cached["candidates"] == plain["candidates"]
    augmented = run(options(**common, augment="crop-flip", crop_pct=0.8), tmp_path / "augmented")
    assert augmented["candidates"] != plain["candidates"]


def test_what_is_tried_by_default():
    for method, optimizer in ((method, optimizer) for method in METHODS for optimizer in ("sgd", "adamw")):
        found = options(method=method, base_lrs=None, recipe={"optimizer": optimizer}).recipes()
        assert {recipe.base_lr for recipe in found} == set(METHODS[method].base_lrs[optimizer])
        assert {recipe.weight_decay for recipe in found} == {0.01 if optimizer == "adamw" else 1e-4}


# ---- a run that goes on


def test_a_stopped_run_saves_the_same_adapter(tmp_path):
    run(options(), tmp_path / "whole")
    stopped_run(tmp_path / "stopped")
    resume(tmp_path / "stopped")
    whole, resumed = (read_weights(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    stopped_run(tmp_path / "whole", base_lrs=[0.5])  # leaves the earlier adapter
    assert all(torch.equal(whole[name], tensor) for name, tensor in read_weights(tmp_path / "whole").items())
    load_model(tmp_path / "whole")


def test_a_run_whose_checkpoint_is_cut_off_starts_anew_without_it(tmp_path):
    """As the message says, which is that of a sweep too: all else that was given is there."""
    run(options(), tmp_path / "whole")
    stopped_run(tmp_path / "stopped")
    checkpoint = tmp_path / "stopped" / "checkpoint.pt"
    os.truncate(checkpoint, 5000)
    with pytest.raises(UserError, match=r"checkpoint.pt is damaged .* remove it, and the run starts anew"):
        resume(tmp_path / "stopped")
    checkpoint.unlink()
    resume(tmp_path / "stopped")
    whole, anew = (read_weights(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], anew[name]) for name in whole)


def rename_class(images):
    (images / "dark").rename(images / "zebra")  # the rows of the head would change places


def replace_class(images):
    for part in ("dark", "other"):
        (images / part).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(images / part / "0.png")
    shutil.rmtree(images / "light")


def remove_image(images):
    (images / "dark" / "3.png").unlink()


def move_image(images):
    (images / "dark" / "3.png").rename(images / "light" / "x.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_class, r"classes were \['dark', 'light'\] and are \['light', 'zebra'\]"),
        (replace_class, r"classes were \['dark', 'light'\] and are \['dark', 'other'\]"),
        (remove_image, "missing images: dark/3.png"),
        (move_image, "new images: light/x"),
    ],
)
def test_a_run_goes_on_with_the_same_images_only(image_folder, tmp_path, change, message):
    folder = tmp_path / "out"
    stopped_run(folder, data=str(image_folder), train_images=None)
    change(image_folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=message):
        resume(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_goes_on_with_the_same_weights_only(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model(BACKBONE).state_dict(), weights)
    stopped_run(tmp_path / "out", weights=str(weights))
    save_file(timm.create_model(BACKBONE).state_dict(), weights)
    with pytest.raises(UserError, match="the weights to start from are others"):
        resume(tmp_path / "out")


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"files": 3}'])
def test_a_run_whose_inputs_are_lost(tmp_path, content):
    stopped_run(tmp_path)
    path = tmp_path / "inputs.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"inputs.json (does not exist|is damaged)"):
        resume(tmp_path)


def test_options_of_another_version(tmp_path):
    chosen = options(base_lrs=list(np.array([0.1, 1.0])), train_images=np.int64(5), crop_pct=np.float32(0.5))
    chosen.write(tmp_path)
    assert RunOptions.read(tmp_path) == chosen
    written = json.loads((tmp_path / "run.json").read_text()) | {"library_version": "7.1", "rank": 3}
    (tmp_path / "run.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"unknown options \['rank'\]: it was written by vapt_fast 7.1"):
        RunOptions.read(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        RunOptions.read(tmp_path)


@pytest.mark.parametrize("method", ["vapt", pytest.param("full", marks=pytest.mark.full)])
def test_a_finished_run_is_trained_on(tmp_path, method):
    """The recipe that won goes on along the longer cosine, also if that is stopped at any time."""
    first = run(options(method=method, base_lrs=[0.1, 1e-6]), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text()
    trained = trained_state(load_model(tmp_path)[0])
    with pytest.raises(UserError, match=r"was trained for 2 epochs\. To train on.*got 2"):
        RunOptions.read(tmp_path).extended(2, tmp_path)
    with pytest.raises(Stop):
        run(RunOptions.read(tmp_path).extended(5, tmp_path), tmp_path, resume=True, progress=stop)
    assert not (tmp_path / "result.json").exists()
    assert all(torch.equal(v, trained[n]) for n, v in trained_state(load_model(tmp_path)[0]).items())
    result = resume(tmp_path)
    assert result["recipe"] == {**first["recipe"], "epochs": 5}
    assert result["extended_from_epochs"] == 2
    assert (tmp_path / "metrics.jsonl").read_text().startswith(lines)
    new = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[4:]]
    assert [line["epoch"] for line in new] == [3, 4, 5]
    recipe = Recipe(**result["recipe"])
    assert [line["lr"] for line in new] == [recipe.learning_rate(epoch - 1, 1) for epoch in (3, 4, 5)]

    model = build_model(method, BACKBONE, 5, prompts=PromptConfig(num_prompts=2))
    trainer = Trainer(model, recipe, digit_splits(full_data_config(model.pretrained_cfg), 0, 5).train)
    trainer.start_from(trained, 2)
    while not trainer.finished:
        trainer.run_epoch()
    assert_same_training(load_model(tmp_path)[0], model)


@pytest.mark.parametrize("method", ["vapt", "full"])
def test_a_backbone_that_timm_saved(method, tmp_path):
    """Its folder says how images are prepared; the trained model needs it no more."""
    backbone = timm.create_model(BACKBONE, pretrained=True)
    backbone.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "tag": "of_mine"}
    save_for_hf(backbone, tmp_path / "backbone")
    chosen = options(method=method, base_lrs=[0.05], backbone=f"local-dir:{tmp_path / 'backbone'}")
    result = run(chosen, tmp_path / "out")
    expected = run(options(method=method, base_lrs=[0.05]), tmp_path / "by_name")
    assert result["weights"] == expected["weights"]
    assert result["data_config"]["mean"] == [0.1, 0.2, 0.3]
    shutil.rmtree(tmp_path / "backbone")
    model, metadata = load_model(tmp_path / "out")
    test = evaluation_data("digits", metadata["data_config"], metadata["class_names"])
    assert evaluate(model, test, batch_size=5).accuracy == result["test_accuracy"]


# ---- refused before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adapter"}, "method must be one of"),
        ({"backbone": "vit_digit"}, r"must be the name of a timm model, .*got 'vit_digit'; similar:"),
        ({"backbone": "local-dir:/nowhere"}, "'local-dir:/nowhere' can't be made: .*/nowhere/config"),
        ({"backbone": "me/cars"}, "hf-hub:owner/name or local-dir:/folder, got 'me/cars'"),
        ({"backbone": "vit_tiny_patch16_224.augreg_in21"}, "similar: vit_tiny_patch16_224.augreg_in21k, "),
        ({"backbone": "resnet18", "pretrained": False}, "vapt with backbone 'resnet18'"),
        ({"prompts": {"num_prompts": -1}}, "num_prompts must be at least 0, got -1"),
        ({"prompts": {"conv_kernel": 9}}, "conv_kernel=9 .* does not fit the 8x8 patch grid"),
        ({"backend": "fortran"}, "fortran"),
        ({"image_size": 30}, "image_size must be a multiple of the patch size.*4x4 pixels, got 30"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": "64"}, r"image_size must be int \| None, got '64'"),
        ({"image_size": 64, "backbone": "resnet18"}, "'resnet18' can't be made with image_size=64"),
        ({"color_jitter": 2.0}, r"color_jitter must be in \[0, 1\]"),
        ({"train_images": "5"}, "train_images must be int"),
        ({"base_lrs": [1.0, "high"]}, r"base_lrs must be list\[float\] \| None, got \[1.0, 'high'\]"),
        ({"recipe": {"momentun": 0.9}}, "recipe: .*momentun"),
        ({"recipe": {"epochs": 0}}, "epochs must be at least 1, got 0"),
        ({"cache": True, "augment": "crop-flip"}, "cache"),
        ({"validation_share": 0.7, "test_share": 0.5}, "together below 1, got 0.7 and 0.5"),
        ({"weights": "nowhere.pth"}, "weights 'nowhere.pth': no such file"),
        ({"crop_pct": 1.5}, r"crop_pct must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options_write_nothing(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(options(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_all_damaged_images_are_found_before_training(workers, image_folder, tmp_path):
    damaged = [str(image_folder / name) for name in ("dark/0.png", "light/5.png", "light/6.png")]
    for path in damaged:
        with open(path, "w") as file:
            file.write("no image")
    with pytest.raises(UserError) as raised:
        run(options(data=str(image_folder), train_images=None), tmp_path / "out", workers=workers)
    first, *lines = str(raised.value).splitlines()
    assert first == "3 of 20 images can't be read:"
    assert sorted(line.split()[1] for line in lines) == damaged
    assert not (tmp_path / "out").exists()
