"""Where commands write: checked before anything is loaded, computed or changed."""

import os

import pytest
from command import error_of

COMMANDS = {
    "evaluate": ("evaluate none --data digits", "found.json", "found.json"),
    "explain": ("explain none none.png", "picture.png", "picture.png"),
    "bench": ("bench --backbone test_vit", "times.json", "times.json"),
    "export": ("export none", "out", "out/model.pt2"),
    "predict": ("predict none a.jpg", "out", "out/overlays/a.png"),
    "timm-adapter": ("timm-adapter none.pth", "out", "out/adapter_config.json"),
    "demo": ("demo", "out", "out/results.json"),
    "train": ("train --backbone test_vit", "out", "out/run.json"),
    "train over an adapter": ("train --backbone test_vit", "out", "out/adapter_model.safetensors"),
    "train over a model": ("train --backbone test_vit", "out", "out/model.safetensors"),
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_is_replaced_only_if_asked(command, tmp_path):
    line, output, written = COMMANDS[command]
    path = tmp_path / written
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("earlier")
    assert "--overwrite" in error_of(*line.split(), "--output", output)
    if "none" in line:  # what they are about is missing, which shows next
        message = error_of(*line.split(), "--output", output, "--overwrite")
        assert "none" in message
        assert "--overwrite" not in message
    assert path.read_text() == "earlier"


@pytest.mark.parametrize("command", [*COMMANDS, "sweep"])
def test_a_place_where_nothing_can_be_written(command, tmp_path, monkeypatch):
    line, output, _ = COMMANDS.get(command, ("sweep --data vtab:cifar", "out", ""))
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file" in error_of(*line.split(), "--output", f"file/{output}")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert f"can be written to, and {tmp_path} can't" in error_of(*line.split(), "--output", output)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("command", "expected"), [("evaluate", ".json or .csv"), ("explain", ".png"), ("bench", ".json")]
)
def test_other_suffixes_are_refused(command, expected):
    message = error_of(*COMMANDS[command][0].split(), "--output", "picture.xyz")
    assert f"--output must end in {expected}, got picture.xyz" in message
