"""The command line: what it prints, what it writes, and how it fails."""

import errno
import inspect
import json
import os
import runpy
import shutil
import signal
import sys
from dataclasses import fields

import numpy as np
import pytest
import timm
import torch
from command import error_of, invoke, succeed
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from timm.models import save_for_hf

import vapt_fast.adapters
from vapt_fast import AdaptiveViT, PromptConfig
from vapt_fast.adapters import read_config
from vapt_fast.cli.console import count
from vapt_fast.cli.train import train
from vapt_fast.demo import digit_images
from vapt_fast.training import digit_splits, eval_transform, load_model
from vapt_fast.training.checkpoint import load_checkpoint
from vapt_fast.training.evaluation import Evaluation
from vapt_fast.training.trainer import Trainer

BACKBONE = "vit_digits_patch4_32"
QUICK = ["--train-images", "5", "--epochs", "2", "--lr", "1", "--prompts", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    succeed("train", "--output", folder, *QUICK)
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A finished run that may be changed."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    """The first twenty digits from 5 to 9 as PNG files."""
    folder = tmp_path_factory.mktemp("digits")
    for index, image in enumerate(digit_images(range(5, 10))[0][:20]):
        image.save(folder / f"{index:02}.png")
    return folder


def read_json(path):
    return json.loads(path.read_text())


def json_of(*arguments):
    """The JSON that a command prints."""
    return json.loads(invoke(*arguments, "--json").stdout)


def epochs_of(folder):
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- all commands


def test_help_and_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vapt_fast", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("vapt_fast", run_name="__main__", alter_sys=True)
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("train", "predict", "evaluate", "demo", "timm-adapter"))
    assert succeed("--version").stdout == f"vapt-fast {vapt_fast.__version__}\n"
    assert "backends" in succeed("info").stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--output", "out", "--method", "adapter"], "--method"),
        (["train"], "--output"),
        (["predict", "folder"], "images"),
    ],
)
def test_wrong_use_names_the_argument(arguments, named):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr.lower()


@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "demo"])
def test_a_mistyped_backend_is_found_first(command, trained, digit_files, tmp_path, monkeypatch):
    arguments = {
        "train": ["--output", tmp_path / "out"],
        "predict": [trained, digit_files],
        "evaluate": [trained, "--data", "digits"],
        "demo": ["--output", tmp_path / "out"],
    }[command]
    monkeypatch.setenv("VAPT_FAST_BACKEND", "tritn")
    assert "VAPT_FAST_BACKEND must be one of" in error_of(command, *arguments)
    if command != "demo":
        assert "--backend must be one of" in error_of(command, *arguments, "--backend", "fortran")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--backbone", "vit_bse_patch16_224"], "similar: vit_base_patch16_224"),
        (["info", "vit_bse_patch16_224"], "error: backbone must be the name of a timm model"),
        (["info", "resnet18"], "ResNet (family 'resnet') is not supported"),
    ],
)
def test_errors_about_backbones(arguments, message):
    assert message in error_of(*arguments)


@pytest.mark.parametrize(
    ("number", "nouns", "expected"),
    [
        (0, ["image"], "0 images"),
        (1, ["image"], "1 image"),
        (1200, ["image"], "1,200 images"),
        (1, ["class", "classes"], "1 class"),
        (2, ["class", "classes"], "2 classes"),
    ],
)
def test_counts(number, nouns, expected):
    assert count(number, *nouns) == expected


# ---- train


def test_prompts_by_block_and_every_option(tmp_path):
    """The options are those of PromptConfig."""
    options = ["--num-prompts", "2,0,3,1", "--projector-dim", "none", "--add-table", "--no-conv-shared"]
    succeed("train", "--output", tmp_path, *QUICK[:-2], "--epochs", "1", *options)
    config = load_model(tmp_path)[0].config
    expected = PromptConfig(num_prompts=(2, 0, 3, 1), projector_dim=None, add_table=True, conv_shared=False)
    assert config == expected
    signature = inspect.signature(train).parameters
    assert signature.keys() >= {field.name for field in fields(PromptConfig)} - {"kind", "kind_options"}


def test_train_writes_and_tells_the_result(tmp_path):
    result = succeed("train", "--output", tmp_path, *QUICK, "--method", "linear", "--lr", "0.5")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    names += ["inputs.json", "metrics.jsonl", "result.json", "run.json"]
    assert sorted(os.listdir(tmp_path)) == names
    assert epochs_of(tmp_path) == [1, 2, 1, 2]
    assert read_json(tmp_path / "run.json")["prompts"]["num_prompts"] == 2
    written = read_json(tmp_path / "result.json")
    assert [candidate["base_lr"] for candidate in written["candidates"]] == [1.0, 0.5]
    assert f"test accuracy: {written['test_accuracy']:.1%} of 400 images" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "/nowhere"],
            "--data must be 'digits' or a folder",
        ),
        (["--backbone", "vit_digit"], "--backbone must be the name of a timm model, hf-hub:owner/name or"),
        (["--prompts", "-1"], "--num-prompts must be at least 0, got -1"),
        (["--num-prompts", "2,x"], "--num-prompts must be an integer or one for each block, as 10,10,0, got"),
        (
            ["--num-prompts", "2,1"],
            "--num-prompts must have one number for each of the backbone's 4 blocks",
        ),
        (["--conv-kernel", "two"], "--conv-kernel must be an integer or 'none', got 'two'"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--lr", "-1"], "--lr must be a positive number, got -1.0"),
        (["--train-images", "9999"], "--train-images must be between 5, one a class, and 300"),
        (["--image-size", "30"], "--image-size must be a multiple of the patch size"),
        (["--backbone", "resnet50"], "ResNet (family 'resnet') is not supported"),
        (["--augment", "rand-augment", "--color-jitter", "0.4"], "--color-jitter can't be combined with"),
        (["--crop-scale", "0.5"], "--crop-scale needs an augmentation of"),
        (["--random-erasing", "1.5"], "--random-erasing must be in [0, 1], got 1.5"),
        (["--device", "toaster"], "--device 'toaster' is not usable here"),
        (["--weights", "/nowhere.pth"], "no such file"),
        (["--resume"], "there is no run to resume"),
    ],
)
def test_train_errors_write_nothing(arguments, message, tmp_path):
    assert message in error_of("train", "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_overwritten_or_trained_on_only_if_asked(copied):
    for arguments, message in (
        (QUICK, "--overwrite"),
        (QUICK, "--resume"),
        (["--resume"], "is finished"),
        (["--resume"], "To train on, give --epochs"),
        (["--resume", "--epochs", "2"], "got 2"),
    ):
        assert message in error_of("train", "--output", copied, *arguments)
    succeed("train", "--output", copied, "--resume", "--epochs", "3")
    assert epochs_of(copied) == [1, 2, 3]
    assert read_json(copied / "result.json")["recipe"]["epochs"] == 3
    succeed("train", "--output", copied, *QUICK, "--overwrite")
    assert epochs_of(copied) == [1, 2]


def stopped(*_, **__):
    raise KeyboardInterrupt


def test_what_is_stopped_before_it_has_begun_can_not_be_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr("vapt_fast.training.task.Classification.check_data", stopped)
    assert error_of("train", "--output", tmp_path, *QUICK, code=130).strip() == "error: stopped."


def test_resume_refuses_other_options(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("vapt_fast.training.trainer.Trainer.run_epoch", stopped)
        message = error_of("train", "--output", tmp_path, *QUICK, code=130)
    assert f"stopped. Go on with: vapt-fast train --resume --output {tmp_path}" in message
    resume = ["train", "--output", tmp_path, "--resume"]
    for flag, other, then in (
        ("--epochs", "7", "2"),
        ("--optimizer", "adamw", "sgd"),
        ("--image-size", "64", "None"),
        ("--augment", "flip", "none"),
        ("--random-erasing", "0.5", "0.0"),
        ("--method", "deep", "vapt"),
    ):
        assert f"{flag} was {then} when the run" in error_of(*resume, flag, other)
    succeed(*resume, "--epochs", "2", "--method", "adaptive")


def test_ctrl_c_leaves_the_earlier_adapter_and_a_run_to_resume(copied, monkeypatch):
    adapter = (copied / "adapter_model.safetensors").read_bytes()
    run_epoch = Trainer.run_epoch

    def interrupted(trainer, *arguments):
        if (copied / "checkpoint.pt").exists():
            signal.raise_signal(signal.SIGINT)
        return run_epoch(trainer, *arguments)

    # Not ignored, as it is by what a shell starts in the background.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_epoch", interrupted)
            message = error_of("train", "--output", copied, *QUICK, "--overwrite", "--seed", "1", code=130)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert f"stopped. Go on with: vapt-fast train --resume --output {copied}" in message
    assert (copied / "adapter_model.safetensors").read_bytes() == adapter
    assert not list(copied.glob("*.tmp"))
    assert load_checkpoint(copied / "checkpoint.pt")["current"]["epoch"] == 1
    succeed("train", "--output", copied, "--resume")
    assert (copied / "adapter_model.safetensors").read_bytes() != adapter


def test_a_full_disk_leaves_the_earlier_adapter_and_a_run_to_resume(copied, monkeypatch):
    adapter = (copied / "adapter_model.safetensors").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(vapt_fast.adapters.file, "write_files", full)
        message = error_of("train", "--output", copied, *QUICK, "--overwrite", "--seed", "1", code=1)
    assert "the disk is full" in message
    assert f"vapt-fast train --resume --output {copied}" in message
    assert (copied / "adapter_model.safetensors").read_bytes() == adapter
    succeed("train", "--output", copied, "--resume")
    assert (copied / "adapter_model.safetensors").read_bytes() != adapter


# ---- predict


def test_predict_and_evaluate_give_the_test_accuracy_of_training(trained, tmp_path):
    """Every test image as a file, read back and named: as many right as training counted."""
    expected = read_json(trained / "result.json")["test_accuracy"]
    config = load_model(trained)[1]["data_config"]
    test = {pixels.numpy().tobytes() for pixels in digit_splits(config, 0, 5).test.tensors[0]}
    transform, truth = eval_transform(config), {}
    for index, (image, label) in enumerate(zip(*digit_images(range(5, 10)), strict=True)):
        if transform(image).numpy().tobytes() in test:
            image.save(tmp_path / f"{index}.png")
            truth[str(tmp_path / f"{index}.png")] = str(label)
    assert len(truth) == 400
    predictions = json_of("predict", trained, tmp_path)
    right = sum(truth[prediction["file"]] == prediction["class"] for prediction in predictions)
    assert right / 400 == pytest.approx(expected)
    shown = succeed("evaluate", trained, "--data", "digits").stdout
    assert f"accuracy: {expected:.1%} of 400 images" in shown
    found = json_of("evaluate", trained, "--data", "digits")
    assert found["accuracy"] == pytest.approx(expected)
    assert [entry["class"] for entry in found["classes"]] == ["5", "6", "7", "8", "9"]
    assert sum(map(sum, found["confusion"])) == found["images"] == 400


def test_precision_of_the_backbone(tmp_path, digit_files):
    """An adapter that was trained in FP8 says so, and runs in either precision."""
    succeed("train", "--output", tmp_path, *QUICK, "--backbone-precision", "fp8")
    assert read_config(tmp_path)["backbone"]["precision"] == "fp8"
    in_fp8 = ["--backbone-precision", "fp8"]
    plain, fp8 = (json_of("predict", tmp_path, digit_files, *options) for options in ([], in_fp8))
    differences = [abs(a["probability"] - b["probability"]) for a, b in zip(plain, fp8, strict=True)]
    assert 1e-5 < max(differences) < 0.1
    assert json_of("evaluate", tmp_path, "--data", "digits", *in_fp8)["images"] == 400
    assert "fp8-gradients" in error_of("predict", tmp_path, digit_files, "--backbone-precision", "int8")
    full = error_of("train", "--output", tmp_path / "none", *QUICK, *in_fp8, "--method", "full")
    assert "'full' runs timm's own forward pass" in full


def test_predict_prints_probabilities(trained, digit_files):
    shown = succeed("predict", trained, digit_files / "00.png", "--top", "3").stdout
    assert "probability" in shown
    assert shown.count("%") == 3
    predictions = json_of("predict", trained, digit_files, "--top", "9", "--batch-size", "7")
    assert [os.path.basename(one["file"]) for one in predictions] == sorted(os.listdir(digit_files))
    for one in predictions:
        assert one["class"] == one["top"][0]["class"]
        assert sum(entry["probability"] for entry in one["top"]) == pytest.approx(1, abs=1e-5)


def test_predict_refuses_nan(tmp_path, digit_files):
    """It names no class, and JSON doesn't have it."""
    model = AdaptiveViT(BACKBONE, pretrained=True, num_classes=3, num_prompts=1)
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    model.save_adapter(tmp_path / "adapter")
    assert "the model gives NaN for 20 of 20" in error_of(
        "predict", tmp_path / "adapter", digit_files, "--json"
    )


def test_predict_names_the_files_that_are_no_images(trained, digit_files, tmp_path):
    good, notes, cut = digit_files / "00.png", tmp_path / "notes.png", tmp_path / "cut.png"
    notes.write_text("not an image")
    cut.write_bytes(good.read_bytes()[:60])
    result = invoke("predict", trained, notes, good, cut, tmp_path / "gone.png", "--json")
    assert result.exit_code == 2
    assert [one["file"] for one in json.loads(result.stdout)] == [str(good)]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    expected = ("notes.png is not an image", "cut.png", "gone.png does not exist")
    assert [part in line for part, line in zip(expected, errors, strict=True)] == [True] * 3
    assert "does not exist" in error_of("predict", tmp_path / "none", digit_files)
    (tmp_path / "empty").mkdir()
    assert "has no images" in error_of("predict", trained, tmp_path / "empty")


@pytest.mark.parametrize("arguments", [["--no-pretrained"], ["--weights", "w"], ["--method", "full"]])
def test_predict_after_training_needs_the_runs_folder_alone(arguments, tmp_path, digit_files):
    """Where timm doesn't have the backbone's weights, the folder has them, and that is told."""
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model(BACKBONE).state_dict(), weights)
    arguments = [weights if argument == "w" else argument for argument in arguments]
    told = succeed("train", "--output", tmp_path / "out", *QUICK, *arguments).stderr
    assert ("the frozen backbone (1 MB) will be kept" in told) == ("full" not in arguments)
    weights.unlink()
    assert len(json_of("predict", tmp_path / "out", digit_files)) == 20


def test_predict_with_an_adapter_of_the_users_own(tmp_path, digit_files):
    torch.manual_seed(0)
    backbone = timm.create_model(BACKBONE, num_classes=2)
    save_for_hf(backbone, tmp_path / "backbone")
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    source, adapter = f"local-dir:{tmp_path / 'backbone'}", tmp_path / "adapter"
    AdaptiveViT(source, pretrained=True).save_adapter(adapter)
    result = invoke("predict", adapter, digit_files)
    assert result.exit_code == 2
    assert f"--backbone {source}" in result.stderr
    for option in (("--backbone", source), ("--weights", tmp_path / "weights.safetensors")):
        assert {one["class"] for one in json_of("predict", adapter, digit_files, *option)} <= {"0", "1"}
        unknown = error_of("evaluate", adapter, "--data", "digits", *option)
        assert "classes that the model doesn't know" in unknown


# ---- names and paths

ODD = [os.fsdecode(b"red] caf\xe9"), "dark [b] :smile:"]
ESCAPED = ["red] caf\\udce9", "dark [b] :smile:"]


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """Two classes of pictures, with names that are markup, end lines or can't be decoded."""
    folder = tmp_path_factory.mktemp("odd") / "pictures["  # and "red]" after a slash: the end of a style
    for level, name in ((60, ODD[0]), (190, ODD[1])):
        (folder / name).mkdir(parents=True)
        for index in range(8):
            pixels = np.random.default_rng(index).integers(level - 50, level + 50, (16, 16)) * 257
            file = os.fsdecode(b"scan[%d]\n\xff.png" % index)
            Image.fromarray(pixels.astype(np.uint16)).save(folder / name / file)
    return folder


@pytest.fixture(scope="module")
def odd_run(odd_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "run[2]"
    arguments = ["--epochs", "2", "--lr", "1", "--prompts", "2", "--batch-size", "4", "--workers", "2"]
    shown = succeed("train", "--data", odd_folder, "--output", folder, *arguments)
    assert f"wrote {folder}" in shown.stdout
    assert "name one of timm's with --backbone" in " ".join(shown.output.split())
    return folder


def test_names_are_printed_as_they_are(odd_folder, odd_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["vapt_fast.cli.console"], "out", Console(width=300))
    shown = succeed("predict", odd_run, odd_folder).stdout
    for name in ESCAPED:
        assert f"{odd_folder}/{name}/scan[3]\\n\\udcff.png" in shown
        assert shown.count(f" {name} ") == 8
    predictions = json_of("predict", odd_run, odd_folder)
    assert {one["class"] for one in predictions} == set(ODD)
    assert all(os.path.exists(one["file"]) for one in predictions)
    result = succeed("evaluate", odd_run, "--data", odd_folder, "--output", tmp_path / "[b].csv")
    assert all(result.stdout.count(f" {name} ") >= 2 for name in ESCAPED)  # by class, and a row
    assert f"wrote {tmp_path}/[b].csv" in result.stdout
    assert f"{odd_folder} was split for the training of this model" in result.stderr
    assert f"{ESCAPED[1]},8,1.0,8,0" in (tmp_path / "[b].csv").read_text()


def test_long_names_are_broken_but_whole(trained, digit_files, tmp_path):
    file = shutil.copy(digit_files / "00.png", tmp_path / f"{'a_long_name_' * 15}.png")
    shown = succeed("predict", trained, file).stdout
    column = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert "".join(column) == str(file)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_pictures_that_can_not_be_read_are_named(odd_folder, odd_run, workers, tmp_path):
    folder = shutil.copytree(odd_folder, tmp_path / "pictures")
    (folder / ODD[1] / "notes[red].png").write_text("no image")
    arguments = ["--data", folder, "--workers", workers]
    named = f"{folder}/{ESCAPED[1]}/notes[red].png is not an image"
    assert error_of("evaluate", odd_run, *arguments).startswith(f"error: {named}")
    (folder / ODD[1] / "empty\n.png").touch()
    result = invoke("train", *arguments, "--output", tmp_path / "out")
    assert "error: 2 of 18 images can't be read:" in result.stderr.splitlines()
    assert f"  - {folder}/{ESCAPED[1]}/empty\\n.png is not an image" in result.stderr
    assert f"  - {named}" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_errors_of_wrong_use_survive_odd_names(tmp_path):
    odd, train = os.fsdecode(b"\xff[/red]"), ["train", "--output", tmp_path / "out"]
    assert "\\udcff[/red]/adapter_config.json does not exist" in error_of("predict", odd, "a.png")
    assert "\\udcff[/red]" in error_of(*train, "--data", odd)
    assert "\\udcff[/red]" in error_of(*train, "--backbone", odd)


# ---- evaluate


@pytest.fixture
def two_digits(tmp_path):
    """The digits 9 and 6 in folders of these names, in the split "test"; the adapter knows 5 to 9."""
    for digit in (9, 6):
        (tmp_path / "data" / "test" / str(digit)).mkdir(parents=True)
        for index, image in enumerate(digit_images([digit])[0][:10]):
            image.save(tmp_path / "data" / "test" / str(digit) / f"{index}.png")
    return tmp_path / "data"


def test_evaluate_agrees_with_predict_class_by_class(trained, two_digits, tmp_path):
    right = {"6": 0, "9": 0}
    for one in json_of("predict", trained, two_digits):
        right[os.path.basename(os.path.dirname(one["file"]))] += one["class"] in one["file"].split(os.sep)
    result = succeed("evaluate", trained, "--data", two_digits, "--output", tmp_path / "found.json")
    assert "without images here: 3 classes: 5, 7, 8" in result.stderr
    by_class = {entry["class"]: entry for entry in read_json(tmp_path / "found.json")["classes"]}
    for digit, hits in right.items():
        assert by_class[digit]["accuracy"] == pytest.approx(hits / 10)
    assert by_class["7"] == {"class": "7", "images": 0, "accuracy": None}


def test_evaluate_errors(trained, two_digits, tmp_path):
    (two_digits / "test" / "cat").mkdir()
    for data, arguments, message in (
        (two_digits, [], "classes that the model doesn't know: ['cat']; it knows ['5', '6', '7', '8', '9']"),
        (two_digits, ["--split", "train"], "no images of the split 'train'"),
        ("digits", ["--split", "train"], "only the split 'test' is the same in every run; got 'train'"),
        (tmp_path / "none", [], "data must be 'digits' or a folder"),
        ("digits", ["--output", tmp_path / "a.txt"], "--output must end in .json or .csv"),
    ):
        assert message in error_of("evaluate", trained, "--data", data, *arguments)
    assert "does not exist" in error_of("evaluate", tmp_path / "none", "--data", "digits")


def shown_in(width, evaluation, monkeypatch, capsys):
    """The lines of an evaluation on a terminal of that width."""
    module = sys.modules["vapt_fast.cli.evaluate"]
    monkeypatch.setattr(module, "out", Console(width=width))
    module._show(evaluation)
    return capsys.readouterr().out.splitlines()


def test_of_many_classes_the_largest_confusions_are_shown(monkeypatch, capsys):
    confusion = 5 * torch.eye(30, dtype=torch.int64)
    confusion[3, 7], confusion[20, 1] = 12, 11
    evaluation = Evaluation(tuple(f"class[{index}]" for index in range(30)), confusion, 0.5)
    lines = [line.split() for line in shown_in(60, evaluation, monkeypatch, capsys)]
    assert ["│", "class[3]", "│", "class[7]", "│", "12", "│"] in lines
    assert ["│", "class[20]", "│", "class[1]", "│", "11", "│"] in lines


def test_a_matrix_is_never_broken(monkeypatch, capsys):
    evaluation = Evaluation(tuple(f"class {index}" for index in range(20)), torch.full((20, 20), 12_345), 0.5)
    lines = shown_in(40, evaluation, monkeypatch, capsys)
    assert sum(line.count("12,345") == 20 for line in lines) == 20
