"""timm's scripts and checkpoints on the command line."""

import argparse
import os
import sys
import textwrap

import pytest
import timm
import torch
from command import error_of, invoke, succeed
from PIL import Image
from tiny import assert_same

from vapt_fast import AdaptiveViT
from vapt_fast.training import load_model

NAME = "vapt_vit_tiny_patch16_224"
OPTIONS = {"num_prompts": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


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
    assert "SCRIPT must be a Python file" in error_of("timm", script.parent / "none.py", "--x")


def write_checkpoint(path, trained, ema=None, model=NAME, **arguments):
    """Write what timm's CheckpointSaver writes."""
    args = argparse.Namespace(
        model=model, num_classes=3, gp=None, img_size=32, pretrained=True, mean=[0.4] * 3
    )
    vars(args).update({"model_kwargs": OPTIONS, **arguments})
    state = {"epoch": 3, "arch": model, "state_dict": trained.state_dict(), "version": 2, "args": args}
    if ema is not None:
        state["state_dict_ema"] = {f"module.{name}": tensor for name, tensor in ema.state_dict().items()}
    torch.save(state, path)


@pytest.fixture
def timm_trained(tmp_path):
    """A checkpoint with averaged weights, and the two models that are in it."""
    torch.manual_seed(0)
    models = [timm.create_model(NAME, num_classes=3, img_size=32, **OPTIONS) for _ in range(2)]
    for model in models:
        for parameter in model.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    frozen = {name: value for name, value in models[0].state_dict().items() if name.startswith("backbone.")}
    models[1].load_state_dict(models[1].state_dict() | frozen)
    write_checkpoint(tmp_path / "last.pth.tar", *models)
    return tmp_path / "last.pth.tar", models


@pytest.mark.parametrize("flags", [[], ["--use-ema"]])
def test_an_adapter_of_a_timm_checkpoint(timm_trained, flags, tmp_path):
    checkpoint, models = timm_trained
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    arguments = ["--output", tmp_path / "out", "--class-names", tmp_path / "names.txt"]
    result = succeed("timm-adapter", checkpoint, *arguments, *flags)
    assert ("--use-ema" in result.stderr) == (not flags)  # the other weights aren't passed over in silence
    loaded = AdaptiveViT.from_adapter(tmp_path / "out", backbone=models[0].backbone).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), models[len(flags)].eval()(images))
    assert loaded.class_names == ("cat", "dog", "owl")
    assert loaded.data_config["mean"] == [0.4] * 3
    assert loaded.transform()(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    assert not list((tmp_path / "out").glob("backbone-*"))


def test_an_adapter_of_a_state_dict(timm_trained, tmp_path):
    _, models = timm_trained
    torch.save(models[0].state_dict(), tmp_path / "state.pt")
    options = [f"--model-kwarg={name}={value}" for name, value in OPTIONS.items()]
    command = ["timm-adapter", tmp_path / "state.pt", "--output", tmp_path / "out", "--image-size", "32"]
    result = succeed(*command, "--model", NAME, *options)
    assert "no --class-names were given" in result.stderr
    assert "the frozen backbone is kept" in result.stderr  # nothing tells where it comes from
    loaded, metadata = load_model(tmp_path / "out")
    assert metadata["class_names"] == ["0", "1", "2"]
    assert_same(loaded.state_dict(), models[0].state_dict(), 0)
    command.append("--overwrite")
    assert "doesn't tell its model: give --model vapt_NAME" in error_of(*command)
    assert "the checkpoint doesn't fit" in error_of(*command, "--model", NAME)
    assert "must be KEY=VALUE, got 'depth'" in error_of(*command, "--model-kwarg", "depth")


def test_a_timm_checkpoint_opens_no_other_file(timm_trained, tmp_path):
    _, models = timm_trained
    elsewhere = {"checkpoint_path": str(tmp_path / "elsewhere.pth")}  # timm would look for it
    write_checkpoint(tmp_path / "last.pth", models[0], model_kwargs=OPTIONS | elsewhere)
    succeed("timm-adapter", tmp_path / "last.pth", "--output", tmp_path / "out")


def test_timm_checkpoints_that_make_no_adapter(timm_trained, tmp_path):
    checkpoint, models = timm_trained
    torch.save({"state_dict": {}, "code": os.system}, tmp_path / "code.pth")
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:1000])
    write_checkpoint(tmp_path / "named.safetensors", models[0])
    write_checkpoint(tmp_path / "plain.pth", models[0], model="vit_tiny_patch16_224")
    (tmp_path / "names.txt").write_text("cat\n")
    for name, flags, message in (
        ("code.pth", [], "is damaged or no checkpoint"),
        ("cut.pth", [], "is damaged or no checkpoint"),
        ("named.safetensors", [], "--safetensors"),
        ("none.pth", [], "does not exist"),
        ("plain.pth", [], "one of timm's names with vapt_ before it, got 'vit_tiny_patch16_224'"),
        ("plain.pth", ["--use-ema"], "has no averaged weights"),
        (checkpoint.name, ["--class-names", tmp_path / "names.txt"], "the names of 3 classes"),
    ):
        arguments = ["timm-adapter", tmp_path / name, "--output", tmp_path / "out", *flags]
        assert message in error_of(*arguments)
    assert not (tmp_path / "out").exists()
