"""The command line: what it prints, what it writes, and how it fails."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from typer.testing import CliRunner

import vapt_fast.adapters
from vapt_fast import AdaptiveViT, PromptConfig
from vapt_fast.cli import app
from vapt_fast.cli.pictures import draw, prompt_maps
from vapt_fast.digits import digit_images
from vapt_fast.training import UserError, build_model, data_config, digit_splits, eval_transform
from vapt_fast.training.checkpoint import load_checkpoint
from vapt_fast.training.comparison import Comparison, compare

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
        (["--conv-kernel", "two"], "--conv-kernel must be an integer or 'none', got 'two'"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--lr", "-1"], "base_lr must be a positive number, got -1.0"),
        (["--train-images", "9999"], "training images must be between 5, one a class, and 300"),
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
    refused = error_of(invoke("train", "--output", tmp_path, "--resume", "--epochs", "7"))
    assert "--epochs was 2 when the run" in refused
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
        patch.setattr(vapt_fast.adapters, "_write_files", full)
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


def test_predict_with_a_fully_tuned_model(tmp_path, digit_files):
    result = invoke("train", "--output", tmp_path / "full", *QUICK, "--method", "full", "--lr", "0.02")
    assert result.exit_code == 0, result.output
    result = invoke("predict", tmp_path / "full", digit_files, "--json")
    assert len(json.loads(result.stdout)) == 20


# ---- demo and info


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
    for command in ("train", "predict", "demo", "info"):
        assert command in result.stdout


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
