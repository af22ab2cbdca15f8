"""The command line: what it prints, what it writes, and how it fails."""

import argparse
import errno
import importlib.util
import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from dataclasses import fields

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny import assert_same
from typer.testing import CliRunner

import vapt_fast.adapters
from vapt_fast import AdaptiveViT, PromptConfig
from vapt_fast.cli import app
from vapt_fast.cli.console import count
from vapt_fast.cli.pictures import draw, prompt_maps
from vapt_fast.cli.train import train
from vapt_fast.digits import digit_images
from vapt_fast.training import (
    UserError,
    build_model,
    data_config,
    digit_splits,
    eval_transform,
    load_model,
)
from vapt_fast.training.checkpoint import load_checkpoint
from vapt_fast.training.comparison import Comparison, compare
from vapt_fast.training.evaluation import Evaluation

QUICK = ["--train-images", "5", "--epochs", "2", "--lr", "1", "--prompts", "2"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    result = invoke("train", "--output", folder, *QUICK)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    """The first twenty digits from 5 to 9 as PNG files."""
    folder = tmp_path_factory.mktemp("digits")
    for index, image in enumerate(digit_images(range(5, 10))[0][:20]):
        image.save(folder / f"{index:02}.png")
    return folder


def error_of(result, code=2):
    """The one line that a user sees."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    return line


# ---- train


def test_train_writes_what_it_says(trained):
    assert sorted(os.listdir(trained)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "inputs.json",
        "metrics.jsonl",
        "result.json",
        "run.json",
    ]
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert json.loads((trained / "run.json").read_text())["prompts"]["num_prompts"] == 2


def test_prompts_by_block_and_every_option(tmp_path):
    """The options are those of PromptConfig."""
    options = ["--num-prompts", "2,0,3,1", "--projector-dim", "none", "--add-table", "--no-conv-shared"]
    result = invoke("train", "--output", tmp_path, *QUICK[:-2], "--epochs", "1", *options)
    assert result.exit_code == 0, result.output
    config = load_model(tmp_path)[0].config
    expected = PromptConfig(num_prompts=(2, 0, 3, 1), projector_dim=None, add_table=True, conv_shared=False)
    assert config == expected
    signature = inspect.signature(train).parameters
    assert signature.keys() >= {field.name for field in fields(PromptConfig)} - {"kind", "kind_options"}


def test_train_tells_the_result(tmp_path):
    result = invoke("train", "--output", tmp_path, *QUICK, "--method", "linear", "--lr", "0.5")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "result.json").read_text())
    assert [candidate["base_lr"] for candidate in written["candidates"]] == [1.0, 0.5]
    assert f"test accuracy: {written['test_accuracy']:.1%} of 400 images" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere"], "data must be 'digits' or a folder"),
        (["--backbone", "vit_digit"], "backbone must be the name of a timm model, got 'vit_digit'"),
        (["--prompts", "-1"], "num_prompts must be at least 0, got -1"),
        (["--num-prompts", "2,x"], "--num-prompts must be an integer or one for each block, as 10,10,0, got"),
        (["--num-prompts", "2,1"], "num_prompts must have one number for each of the backbone's 4 blocks"),
        (["--method", "vapd"], "method must be one of ('vapt', 'vpt-deep', 'vfpt', 'kv',"),
        (["--conv-kernel", "two"], "--conv-kernel must be an integer or 'none', got 'two'"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--lr", "-1"], "base_lr must be a positive number, got -1.0"),
        (["--train-images", "9999"], "training images must be between 5, one a class, and 300"),
        (["--backbone", "vit_bse_patch16_224"], "similar: vit_base_patch16_224, "),
        (["--image-size", "30"], "image_size must be a multiple of the patch size"),
        (["--augment", "rand-augment", "--color-jitter", "0.4"], "color_jitter can't be combined with"),
        (["--crop-scale", "0.5"], "crop_scale needs an augmentation of"),
        (["--random-erasing", "1.5"], "random_erasing must be in [0, 1], got 1.5"),
        (["--device", "toaster"], "--device 'toaster' is not usable here"),
        (["--backend", "fortran"], "fortran"),
        (["--resume"], "there is no run to resume"),
    ],
)
def test_train_errors(arguments, message, tmp_path):
    assert message in error_of(invoke("train", "--output", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


def test_usage_errors_name_the_argument():
    result = invoke("train", "--output", "out", "--method", "lora")
    assert result.exit_code == 2
    assert "--method" in result.stderr
    assert invoke("train").exit_code == 2
    assert invoke("predict", "folder").exit_code == 2


def test_a_run_is_not_overwritten_by_mistake(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    message = error_of(invoke("train", "--output", folder, *QUICK))
    assert "--resume" in message
    assert "--overwrite" in message
    assert invoke("train", "--output", folder, *QUICK, "--overwrite").exit_code == 0
    assert "is finished" in error_of(invoke("train", "--output", folder, "--resume"))


def test_resume_refuses_other_options(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vapt_fast.training.trainer.Trainer.run_epoch", stopped)
        message = error_of(invoke("train", "--output", tmp_path, *QUICK), code=130)
    assert f"stopped. Go on with: vapt-fast train --resume --output {tmp_path}" in message
    for flag, other, then in (
        ("--epochs", "7", "2"),
        ("--optimizer", "adamw", "sgd"),
        ("--image-size", "64", "None"),
        ("--augment", "flip", "none"),
        ("--random-erasing", "0.5", "0.0"),
        ("--method", "deep", "vapt"),
    ):
        refused = error_of(invoke("train", "--output", tmp_path, "--resume", flag, other))
        assert f"{flag} was {then} when the run" in refused
    assert invoke("train", "--output", tmp_path, "--resume", "--method", "adaptive", "--help").exit_code == 0
    assert invoke("train", "--output", tmp_path, "--resume", "--epochs", "2").exit_code == 0


def test_a_finished_run_is_trained_on(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    assert "To train on, give --epochs" in error_of(invoke("train", "--output", folder, "--resume"))
    assert "got 2" in error_of(invoke("train", "--output", folder, "--resume", "--epochs", "2"))
    assert invoke("train", "--output", folder, "--resume", "--epochs", "3").exit_code == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert json.loads((folder / "result.json").read_text())["recipe"]["epochs"] == 3


def test_ctrl_c_leaves_the_earlier_adapter_and_a_run_to_resume(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    adapter = (folder / "adapter_model.safetensors").read_bytes()
    command = [sys.executable, "-m", "vapt_fast", "train", "--output", str(folder), "--overwrite"]
    options = ["--train-images", "50", "--epochs", "3000", "--lr", "1", "--prompts", "2"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint.pt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        while process.poll() is None:
            # Python loses an interrupt that comes while an object is finalised; people press again.
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
        errors = process.stderr.read()
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "vapt-fast train --resume --output" in errors
    assert "Traceback" not in errors
    assert (folder / "adapter_model.safetensors").read_bytes() == adapter
    assert not list(folder.glob("*.tmp"))
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    assert checkpoint["current"]["epoch"] >= 1


def test_a_full_disk_leaves_the_earlier_adapter_and_a_run_to_resume(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "copy")
    adapter = (folder / "adapter_model.safetensors").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(vapt_fast.adapters.file, "_write_files", full)
        message = error_of(invoke("train", "--output", folder, *QUICK, "--overwrite", "--seed", "1"), code=1)
    assert "the disk is full" in message
    assert f"vapt-fast train --resume --output {folder}" in message
    assert (folder / "adapter_model.safetensors").read_bytes() == adapter
    assert invoke("train", "--output", folder, "--resume").exit_code == 0
    assert (folder / "adapter_model.safetensors").read_bytes() != adapter


# ---- predict


def test_predict_gives_the_test_accuracy_of_training(trained, tmp_path):
    """Every test image as a file, read back and named: as many right as training counted."""
    images, labels = digit_images(range(5, 10))
    config = data_config(build_model("full", "vit_digits_patch4_32", 5).pretrained_cfg)
    splits = digit_splits(config, seed=0, num_train=5)
    transform = eval_transform(config)
    test = {pixels.numpy().tobytes() for pixels in splits.test.tensors[0]}
    truth = {}
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        if transform(image).numpy().tobytes() in test:
            path = tmp_path / f"{index}.png"
            image.save(path)
            truth[str(path)] = str(label)
    assert len(truth) == 400
    result = invoke("predict", trained, tmp_path, "--json")
    assert result.exit_code == 0, result.output
    predictions = json.loads(result.stdout)
    right = sum(truth[prediction["file"]] == prediction["class"] for prediction in predictions)
    expected = json.loads((trained / "result.json").read_text())["test_accuracy"]
    assert right / 400 == pytest.approx(expected)


def test_predict_prints_a_table(trained, digit_files):
    file = digit_files / "00.png"
    result = invoke("predict", trained, file, "--top", "3")
    assert result.exit_code == 0
    assert "probability" in result.stdout
    assert result.stdout.count("%") == 3


def test_predict_json_has_probabilities(trained, digit_files):
    result = invoke("predict", trained, digit_files, "--json", "--top", "9", "--batch-size", "7")
    predictions = json.loads(result.stdout)
    assert [os.path.basename(one["file"]) for one in predictions] == sorted(os.listdir(digit_files))
    for one in predictions:
        assert one["class"] == one["top"][0]["class"]
        assert sum(entry["probability"] for entry in one["top"]) == pytest.approx(1, abs=1e-5)


def test_predict_names_the_files_that_are_no_images(trained, digit_files, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    good = digit_files / "00.png"
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:60])
    result = invoke("predict", trained, tmp_path / "notes.png", good, cut, tmp_path / "gone.png", "--json")
    assert result.exit_code == 2
    assert [one["file"] for one in json.loads(result.stdout)] == [str(good)]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "notes.png is not an image" in errors[0]
    assert "cut.png" in errors[1]
    assert "gone.png does not exist" in errors[2]


def test_predict_errors(trained, digit_files, tmp_path):
    assert "does not exist" in error_of(invoke("predict", tmp_path / "none", digit_files))
    assert "has no images" in error_of(invoke("predict", trained, tmp_path))


def test_predict_after_training_without_timms_weights(tmp_path, digit_files):
    """The run's folder holds the backbone, and that is told."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("vit_digits_patch4_32").state_dict(), weights)
    for name, arguments in (("random", ["--no-pretrained"]), ("file", ["--weights", weights])):
        result = invoke("train", "--output", tmp_path / name, *QUICK, *arguments)
        assert result.exit_code == 0, result.output
        assert "the frozen backbone (1 MB) will be kept" in result.stderr
    weights.unlink()
    for name in ("random", "file"):
        assert invoke("predict", tmp_path / name, digit_files).exit_code == 0
    result = invoke("train", "--output", tmp_path / "none", *QUICK, "--weights", weights)
    assert "no such file" in error_of(result)
    assert not (tmp_path / "none").exists()


def test_predict_with_an_adapter_of_the_users_own(tmp_path, digit_files):
    torch.manual_seed(0)
    backbone = timm.create_model("vit_digits_patch4_32", num_classes=2)
    save_for_hf(backbone, tmp_path / "backbone")
    source = f"local-dir:{tmp_path / 'backbone'}"
    AdaptiveViT(source, pretrained=True).save_adapter(tmp_path / "adapter")
    result = invoke("predict", tmp_path / "adapter", digit_files)
    assert result.exit_code == 2
    assert f"--backbone {source}" in result.stderr
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    for option in (("--backbone", source), ("--weights", tmp_path / "weights.safetensors")):
        result = invoke("predict", tmp_path / "adapter", digit_files, *option, "--json")
        assert {one["class"] for one in json.loads(result.stdout)} <= {"0", "1"}
        result = invoke("evaluate", tmp_path / "adapter", "--data", "digits", *option)
        assert "classes that the model doesn't know" in error_of(result)


def test_predict_with_a_fully_tuned_model(tmp_path, digit_files):
    result = invoke("train", "--output", tmp_path / "full", *QUICK, "--method", "full", "--lr", "0.02")
    assert result.exit_code == 0, result.output
    result = invoke("predict", tmp_path / "full", digit_files, "--json")
    assert len(json.loads(result.stdout)) == 20


# ---- names and paths

ODD = [os.fsdecode(b"red] caf\xe9"), "dark [b] :smile:"]


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


ESCAPED = ["red] caf\\udce9", "dark [b] :smile:"]


@pytest.fixture(scope="module")
def odd_run(odd_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "run[2]"
    arguments = ["--epochs", "2", "--lr", "1", "--prompts", "2", "--batch-size", "4"]
    result = invoke("train", "--data", odd_folder, "--output", folder, *arguments, "--workers", "2")
    assert result.exit_code == 0, result.output
    assert f"wrote {folder}" in result.stdout
    return folder


def test_predict_prints_names_as_they_are(odd_folder, odd_run, monkeypatch):
    monkeypatch.setattr(sys.modules["vapt_fast.cli.predict"], "out", Console(width=300))
    result = invoke("predict", odd_run, odd_folder)
    assert result.exit_code == 0, result.output
    for name in ESCAPED:
        assert f"{odd_folder}/{name}/scan[3]\\n\\udcff.png" in result.stdout
        assert result.stdout.count(f" {name} ") == 8
    predictions = json.loads(invoke("predict", odd_run, odd_folder, "--json").stdout)
    assert {one["class"] for one in predictions} == set(ODD)
    assert all(os.path.exists(one["file"]) for one in predictions)


def test_evaluate_prints_names_as_they_are(odd_folder, odd_run, tmp_path):
    result = invoke("evaluate", odd_run, "--data", odd_folder, "--output", tmp_path / "[b].csv")
    assert result.exit_code == 0, result.output
    assert all(result.stdout.count(f" {name} ") >= 2 for name in ESCAPED)  # by class, and a row
    assert f"wrote {tmp_path}/[b].csv" in result.stdout
    assert f"{odd_folder} was split for the training of this model" in result.stderr
    assert f"{ESCAPED[1]},8,1.0,8,0" in (tmp_path / "[b].csv").read_text()


def test_long_names_are_broken_but_whole(trained, digit_files, tmp_path):
    file = shutil.copy(digit_files / "00.png", tmp_path / f"{'a_long_name_' * 15}.png")
    shown = invoke("predict", trained, file).stdout
    column = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert "".join(column) == str(file)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_train_names_all_pictures_that_can_not_be_read(odd_folder, workers, tmp_path):
    folder = shutil.copytree(odd_folder, tmp_path / "pictures")
    (folder / ODD[1] / "empty\n.png").touch()
    (folder / ODD[1] / "notes[red].png").write_text("no image")
    result = invoke("train", "--data", folder, "--output", tmp_path / "out", "--workers", workers)
    assert error_of(result) == "error: 2 of 18 images can't be read:"
    assert f"  - {folder}/{ESCAPED[1]}/empty\\n.png is not an image" in result.stderr
    assert f"  - {folder}/{ESCAPED[1]}/notes[red].png is not an image" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_evaluate_names_a_picture_that_can_not_be_read(odd_folder, odd_run, workers, tmp_path):
    folder = shutil.copytree(odd_folder, tmp_path / "pictures")
    (folder / ODD[1] / "notes[red].png").write_text("no image")
    result = invoke("evaluate", odd_run, "--data", folder, "--workers", workers)
    assert error_of(result).startswith(f"error: {folder}/{ESCAPED[1]}/notes[red].png is not an image")


def test_errors_of_wrong_use_survive_odd_names(tmp_path):
    odd = os.fsdecode(b"\xff[/red]")
    assert "\\udcff[/red]/adapter_config.json does not exist" in error_of(invoke("predict", odd, tmp_path))
    assert "\\udcff[/red]" in error_of(invoke("train", "--output", tmp_path / "out", "--data", odd))
    assert "\\udcff[/red]" in error_of(invoke("train", "--output", tmp_path / "out", "--backbone", odd))


# ---- evaluate


def test_evaluate_gives_the_test_accuracy_of_training(trained):
    expected = json.loads((trained / "result.json").read_text())["test_accuracy"]
    result = invoke("evaluate", trained, "--data", "digits")
    assert result.exit_code == 0, result.output
    assert f"accuracy: {expected:.1%} of 400 images" in result.stdout
    found = json.loads(invoke("evaluate", trained, "--data", "digits", "--json").stdout)
    assert found["accuracy"] == pytest.approx(expected)
    assert [entry["class"] for entry in found["classes"]] == ["5", "6", "7", "8", "9"]
    assert sum(map(sum, found["confusion"])) == found["images"] == 400


@pytest.fixture
def two_digits(tmp_path):
    """The digits 9 and 6 in folders of these names, in the split "test"; the adapter knows 5 to 9."""
    for digit in (9, 6):
        (tmp_path / "data" / "test" / str(digit)).mkdir(parents=True)
        for index, image in enumerate(digit_images([digit])[0][:10]):
            image.save(tmp_path / "data" / "test" / str(digit) / f"{index}.png")
    return tmp_path / "data"


def test_evaluate_agrees_with_predict_class_by_class(trained, two_digits, tmp_path):
    predictions = json.loads(invoke("predict", trained, two_digits, "--json").stdout)
    right = {"6": 0, "9": 0}
    for one in predictions:
        right[os.path.basename(os.path.dirname(one["file"]))] += one["class"] in one["file"].split(os.sep)
    result = invoke("evaluate", trained, "--data", two_digits, "--output", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "without images here: 3 classes: 5, 7, 8" in result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    by_class = {entry["class"]: entry for entry in found["classes"]}
    for digit, hits in right.items():
        assert by_class[digit]["accuracy"] == pytest.approx(hits / 10)
    assert by_class["7"] == {"class": "7", "images": 0, "accuracy": None}


def test_evaluate_errors(trained, two_digits, tmp_path):
    (two_digits / "test" / "cat").mkdir()
    unknown = error_of(invoke("evaluate", trained, "--data", two_digits))
    assert "classes that the model doesn't know: ['cat']; it knows ['5', '6', '7', '8', '9']" in unknown
    assert "no images of the split 'train'" in error_of(
        invoke("evaluate", trained, "--data", two_digits, "--split", "train")
    )
    no_split = error_of(invoke("evaluate", trained, "--data", "digits", "--split", "train"))
    assert "only the split 'test' is the same in every run; got 'train'" in no_split
    missing = error_of(invoke("evaluate", trained, "--data", tmp_path / "none"))
    assert "data must be 'digits' or a folder" in missing
    refused = error_of(invoke("evaluate", trained, "--data", "digits", "--output", tmp_path / "a.txt"))
    assert "--output must end in one of ('.json', '.csv')" in refused
    assert "does not exist" in error_of(invoke("evaluate", tmp_path / "none", "--data", "digits"))


def test_of_many_classes_the_largest_confusions_are_shown(monkeypatch):
    module = sys.modules["vapt_fast.cli.evaluate"]
    confusion = 5 * torch.eye(30, dtype=torch.int64)
    confusion[3, 7], confusion[20, 1] = 12, 11
    result = Evaluation(tuple(f"class[{index}]" for index in range(30)), confusion, 0.5)
    output = io.StringIO()
    monkeypatch.setattr(module, "out", Console(file=output, width=60))
    module._show(result)
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert ["│", "class[3]", "│", "class[7]", "│", "12", "│"] in lines
    assert ["│", "class[20]", "│", "class[1]", "│", "11", "│"] in lines


def test_a_matrix_is_never_broken(monkeypatch):
    module = sys.modules["vapt_fast.cli.evaluate"]
    confusion = torch.full((20, 20), 12_345)
    output = io.StringIO()
    monkeypatch.setattr(module, "out", Console(file=output, width=40))
    module._show(Evaluation(tuple(f"class {index}" for index in range(20)), confusion, 0.5))
    assert sum(line.count("12,345") == 20 for line in output.getvalue().splitlines()) == 20


# ---- timm's scripts and checkpoints


@pytest.fixture
def script(tmp_path):
    """A script that does what timm's validate.py does, with a module beside it."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "helper_of_this_test.py").write_text("CODE = 7\n")
    path = tmp_path / "scripts" / "validate.py"
    path.write_text(
        textwrap.dedent(
            """
            import argparse, sys
            import timm
            from helper_of_this_test import CODE

            parser = argparse.ArgumentParser(description="the script's own help")
            parser.add_argument("data")
            parser.add_argument("--model")
            args = parser.parse_args()
            if __name__ == "__main__":
                model = timm.create_model(args.model, num_classes=3, img_size=32, num_prompts=2)
                print(args.data, type(model).__name__, sys.argv[0])
                sys.exit(CODE)
            """
        )
    )
    return path


def test_timm_scripts_know_the_names(script):
    argv, path = list(sys.argv), list(sys.path)
    result = invoke("timm", script, "some/data", "--model", "vapt_test_vit")
    assert result.exit_code == 7, result.output
    assert result.stdout.split() == ["some/data", "AdaptiveViT", str(script)]
    assert (sys.argv, sys.path) == (argv, path)
    assert "the script's own help" in invoke("timm", script, "--help").stdout
    assert "SCRIPT must be a Python file" in error_of(invoke("timm", script.parent / "none.py", "--x"))


def timm_checkpoint(path, trained, ema=None, **arguments):
    """What timm's CheckpointSaver writes."""
    args = argparse.Namespace(
        model="vapt_vit_digits", num_classes=3, gp=None, img_size=None, pretrained=True, mean=[0.4] * 3
    )
    args.__dict__.update(arguments)
    state = {"epoch": 3, "arch": args.model, "state_dict": trained.state_dict(), "version": 2, "args": args}
    if ema is not None:
        state["state_dict_ema"] = {f"module.{name}": tensor for name, tensor in ema.state_dict().items()}
    torch.save(state, path)


VIT = {"num_classes": 3, "num_prompts": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
NAME = "vapt_vit_tiny_patch16_224"


@pytest.fixture
def timm_trained(tmp_path):
    """A checkpoint with averaged weights, and the two models that are in it."""
    torch.manual_seed(0)
    models = [timm.create_model(NAME, **VIT) for _ in range(2)]
    for model in models:
        for parameter in model.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    frozen = {name: value for name, value in models[0].state_dict().items() if name.startswith("backbone.")}
    models[1].load_state_dict(models[1].state_dict() | frozen)
    kwargs = {name: VIT[name] for name in ("num_prompts", "embed_dim", "depth", "num_heads")}
    timm_checkpoint(tmp_path / "last.pth.tar", *models, model=NAME, img_size=32, model_kwargs=kwargs)
    return tmp_path / "last.pth.tar", models


@pytest.mark.parametrize("use_ema", [False, True])
def test_an_adapter_of_a_timm_checkpoint(timm_trained, use_ema, tmp_path):
    checkpoint, models = timm_trained
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    flags = ["--use-ema"] if use_ema else []
    result = invoke(
        "timm-adapter",
        checkpoint,
        "--output",
        tmp_path / "out",
        "--class-names",
        tmp_path / "names.txt",
        *flags,
    )
    assert result.exit_code == 0, result.output
    loaded = AdaptiveViT.from_adapter(tmp_path / "out", backbone=models[0].backbone).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), models[use_ema].eval()(images))
    assert loaded.class_names == ("cat", "dog", "owl")
    assert loaded.data_config["mean"] == [0.4] * 3
    assert loaded.transform()(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    assert not list((tmp_path / "out").glob("backbone-*"))


def test_an_adapter_of_a_state_dict(timm_trained, tmp_path):
    _, models = timm_trained
    torch.save(models[0].state_dict(), tmp_path / "state.pt")
    options = [f"--model-kwarg={name}={VIT[name]}" for name in ("embed_dim", "depth", "num_heads")]
    command = ["timm-adapter", tmp_path / "state.pt", "--output", tmp_path / "out", "--image-size", "32"]
    result = invoke(*command, "--model", NAME, "--model-kwarg", "num_prompts=2", *options)
    assert result.exit_code == 0, result.output
    assert "no --class-names were given" in result.stderr
    assert "the frozen backbone is kept" in result.stderr  # nothing tells where it comes from
    loaded, metadata = load_model(tmp_path / "out")
    assert metadata["class_names"] == ["0", "1", "2"]
    assert_same(loaded.state_dict(), models[0].state_dict(), 0)
    assert "doesn't tell its model: give --model vapt_NAME" in error_of(invoke(*command))
    assert "the checkpoint doesn't fit" in error_of(invoke(*command, "--model", NAME))
    assert "must be KEY=VALUE, got 'depth'" in error_of(invoke(*command, "--model-kwarg", "depth"))


def test_a_timm_checkpoint_opens_no_other_file(timm_trained, tmp_path):
    _, models = timm_trained
    kwargs = {name: VIT[name] for name in ("num_prompts", "embed_dim", "depth", "num_heads", "img_size")}
    kwargs["checkpoint_path"] = str(tmp_path / "elsewhere.pth")  # timm would look for it
    timm_checkpoint(tmp_path / "last.pth", models[0], model=NAME, model_kwargs=kwargs)
    result = invoke("timm-adapter", tmp_path / "last.pth", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_timm_checkpoints_that_make_no_adapter(timm_trained, tmp_path):
    checkpoint, models = timm_trained
    out = ["--output", tmp_path / "out"]
    torch.save({"state_dict": {}, "code": os.system}, tmp_path / "code.pth")
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:1000])
    timm_checkpoint(tmp_path / "plain.pth", models[0], model="vit_tiny_patch16_224")
    for name, message in (
        ("code.pth", "is damaged or no checkpoint"),
        ("cut.pth", "is damaged or no checkpoint"),
        ("none.pth", "does not exist"),
        ("plain.pth", "one of timm's names with vapt_ before it, got 'vit_tiny_patch16_224'"),
    ):
        assert message in error_of(invoke("timm-adapter", tmp_path / name, *out))
    no_ema = error_of(invoke("timm-adapter", tmp_path / "plain.pth", "--use-ema", *out))
    assert "has no averaged weights" in no_ema
    (tmp_path / "names.txt").write_text("cat\n")
    wrong = error_of(invoke("timm-adapter", checkpoint, *out, "--class-names", tmp_path / "names.txt"))
    assert "must have the names of 3 classes, those of the model; it has 1" in wrong
    assert not (tmp_path / "out").exists()


# ---- demo and info


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_the_demo_misses_a_package_at_its_start(missing, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    package = {"sklearn": "scikit-learn"}.get(missing, missing)
    message = error_of(invoke("demo", "--output", tmp_path / "out"))
    assert f"the demo needs {package}, which is not installed" in message
    assert f"pip install {package}" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "demo"])
def test_a_mistyped_backend_is_found_first(command, trained, digit_files, tmp_path, monkeypatch):
    arguments = {
        "train": ["--output", tmp_path / "out"],
        "predict": [trained, digit_files],
        "evaluate": [trained, "--data", "digits"],
        "demo": ["--output", tmp_path / "out"],
    }[command]
    monkeypatch.setenv("VAPT_FAST_BACKEND", "tritn")
    assert "VAPT_FAST_BACKEND must be one of" in error_of(invoke(command, *arguments))
    if command != "demo":
        assert "--backend must be one of" in error_of(invoke(command, *arguments, "--backend", "fortran"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["bench", "--backbone"], ["info"]])
def test_other_commands_suggest_backbones_too(command):
    assert "similar: vit_base_patch16_224" in error_of(invoke(*command, "vit_bse_patch16_224"))


def test_info_about_a_backbone_that_is_not_supported():
    assert "ResNet (family 'resnet') is not supported" in error_of(invoke("info", "resnet18"))


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout == f"vapt-fast {vapt_fast.__version__}\n"


def test_counts():
    assert [count(number, "image") for number in (0, 1, 2, 1200)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,200 images",
    ]
    assert count(1, "class", "classes") == "1 class"


def test_comparison_and_picture(tmp_path):
    comparison = Comparison(
        methods=("vapt", "full"),
        epochs={5: 2, 10: 1},
        seeds=(0, 1),
        base_lrs=(1.0, 0.1),
        full_base_lrs=(0.01,),
    )
    seen = []
    outcomes = compare(comparison, tmp_path, seen.append, processes=1)
    assert [(o.method, o.num_train) for o in outcomes] == [
        ("vapt", 5),
        ("full", 5),
        ("vapt", 10),
        ("full", 10),
    ]
    assert sorted(seen, key=outcomes.index) == outcomes
    for outcome in outcomes:
        assert outcome.base_lr == max(outcome.validation, key=outcome.validation.get)
        assert len(outcome.test) == 2
        assert 0 < outcome.mean < 1
    draw(outcomes, tmp_path / "vapt-10", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("conv", [{}, {"conv_kernel": None}, {"conv_kernel": 3, "conv_padding": 1}])
def test_prompt_maps_are_of_the_right_patches(conv):
    """A projection that looks at one place gives a map that is zero out of the convolution's reach."""
    model = build_model("vapt", "vit_digits_patch4_32", 5, prompts=PromptConfig(num_prompts=2, **conv)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for block in model.prompts.blocks[1:]:
            block.token_projection.weight[:, 10] = 1.0
    maps = prompt_maps(model, torch.randn(3, 3, 32, 32))
    reach = 1 if model.config.conv_kernel is None else model.config.conv_kernel**2
    assert sorted(maps) == [1, 2, 3]
    for strength in maps.values():
        assert strength.shape == (3, 8, 8)
        assert torch.allclose(strength.sum((1, 2)), torch.ones(3))
        assert ((strength > 0).flatten(1).sum(1) == reach).all()


def test_info():
    result = invoke("info")
    assert result.exit_code == 0
    assert "backends" in result.stdout


def test_python_m_vapt_fast_shows_help():
    result = subprocess.run([sys.executable, "-m", "vapt_fast", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for command in ("train", "predict", "evaluate", "demo", "info", "timm-adapter", "timm"):
        assert command in result.stdout


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
