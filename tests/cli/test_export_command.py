"""``vapt-fast export``."""

import json

import pytest
import torch
from command import error_of, succeed
from small_adapters import TINY, timm_model

from vapt_fast import AdaptiveViT
from vapt_fast.training import load_model, save_model

SIDE = TINY["img_size"]
DATA = {"input_size": (3, SIDE, SIDE), "mean": (0.4,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
DATA |= {"crop_pct": 0.9, "crop_mode": "center"}


@pytest.fixture(params=["adapter", "whole model"])
def trained(request, tmp_path):
    """The folder of a trained model."""
    model = timm_model()
    if request.param == "adapter":
        model = AdaptiveViT(model, num_prompts=2, projector_dim=2)
    metadata = {"class_names": ["cat", "dog", "owl"], "data_config": DATA}
    save_model(model, tmp_path / "trained", metadata, include_backbone=True)
    return tmp_path / "trained"


def test_export(trained, tmp_path):
    out = tmp_path / "out"
    shown = succeed("export", trained, "--output", out).stdout
    description = json.loads((out / "export.json").read_text())
    assert description["class_names"] == ["cat", "dog", "owl"]
    assert description["data"] == {key: list(v) if isinstance(v, tuple) else v for key, v in DATA.items()}
    difference = description["files"]["pt2"]["largest_difference"]
    assert f"model.pt2: its logits differ from the model's by at most {difference:.1e}" in shown
    images = torch.randn(4, 3, SIDE, SIDE)
    with torch.no_grad():
        actual = torch.export.load(out / "model.pt2").module()(images)
        torch.testing.assert_close(actual, load_model(trained)[0](images))

    message = error_of("export", trained, "--output", out, "--format", "onnx", "--format", "pt2")
    assert f"{out / 'model.pt2'} exists already" in message
    succeed("export", trained, "--output", out, "--batch-size", "2", "--overwrite")
    assert json.loads((out / "export.json").read_text())["input"]["shape"] == [2, 3, SIDE, SIDE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nowhere"], "--device 'nowhere' is not usable here"),
        (["--weights", "w.pt"], "it needs no backbone and no weights"),
    ],
)
@pytest.mark.parametrize("trained", ["whole model"], indirect=True)
def test_errors_write_nothing(trained, tmp_path, arguments, message):
    assert message in error_of("export", trained, "--output", tmp_path / "out", *arguments)
    assert "none" in error_of("export", tmp_path / "none", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
