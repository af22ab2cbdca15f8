"""Models as files: what is written runs without this library, and what is wrong is not written."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from small_adapters import TINY, timm_model
from tiny import randomize, tiny_images, tiny_model
from torch import nn

from vapt_fast import PromptConfig, use_backend
from vapt_fast.config import KINDS
from vapt_fast.export import DESCRIPTION_NAME, FORMATS, ExportError, export_model

VIT = "vit_tiny_patch16_224"
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in FORMATS["onnx"].packages),
    reason="pip install 'vapt_fast[onnx]'",
)


def make_model(kind="adaptive", **options):
    config = PromptConfig(kind=kind, num_prompts=3, projector_dim=4)
    return tiny_model(VIT, prompts=config, depth=2, **options).float()


def loaded_in_new_process(path, images, folder):
    """What a file makes of images in a process that can't import this library, nor timm."""
    torch.save(images, folder / "images.pt")
    script = """
import sys
sys.modules["vapt_fast"] = sys.modules["timm"] = None
import torch
torch.set_num_threads(1)
path, images, logits = sys.argv[1:]
images = torch.load(images)
if path.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0]) for batch in images]
else:
    aoti = "aoti" in path
    model = torch._inductor.aoti_load_package(path) if aoti else torch.export.load(path).module()
    with torch.no_grad():
        outputs = [model(batch) for batch in images]
torch.save(outputs, logits)
"""
    command = [sys.executable, "-c", script, *map(str, (path, folder / "images.pt", folder / "logits.pt"))]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "logits.pt")


def assert_computes_the_same(model, path, folder, batch_sizes):
    images = [tiny_images(model, seed=size, batch=size) for size in batch_sizes]
    outputs = loaded_in_new_process(path, images, folder)
    for batch, logits in zip(images, outputs, strict=True):
        with use_backend("reference"), torch.no_grad():
            torch.testing.assert_close(logits, model(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "batch_size"),
    [
        ("pt2", None),
        pytest.param("pt2", 3, marks=pytest.mark.full),
        pytest.param("onnx", None, marks=[needs_onnx, pytest.mark.full]),
        pytest.param("onnx", 3, marks=[needs_onnx, pytest.mark.full]),
        pytest.param("aoti", None, marks=pytest.mark.full),  # the compiler takes half a minute
    ],
)
def test_files_run_without_this_library(form, batch_size, tmp_path):
    model = make_model()
    written = export_model(model, tmp_path / "new" / "out", formats=[form], batch_size=batch_size)
    path = tmp_path / "new" / "out" / written["files"][form]["file"]
    assert sorted(path.parent.iterdir()) == sorted([path, path.parent / DESCRIPTION_NAME])
    assert 0 <= written["files"][form]["largest_difference"] < 1e-5
    assert_computes_the_same(model, path, tmp_path, [1, 2, 5] if batch_size is None else [batch_size])


@pytest.mark.parametrize("form", ["pt2", pytest.param("onnx", marks=[needs_onnx, pytest.mark.full])])
@pytest.mark.parametrize(
    "kind", [kind if kind == "kv" else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS]
)
def test_every_kind_of_prompts(kind, form, tmp_path):
    model = make_model(kind)
    written = export_model(model, tmp_path, formats=[form])["files"][form]
    assert 0 <= written["largest_difference"] < 1e-5  # checked by the function itself


def test_float64_and_a_whole_timm_model(tmp_path):
    model = timm_model().double().eval()
    randomize(model, 0)
    written = export_model(
        model, tmp_path, data_config={"input_size": (3, TINY["img_size"], TINY["img_size"])}
    )
    assert written["input"] == {"name": "images", "shape": ["batch", 3, 32, 32], "dtype": "float64"}
    assert 0 <= written["files"]["pt2"]["largest_difference"] < 1e-12


def test_the_description(tmp_path):
    model = make_model()
    model.class_names = ("cat", "dog", "owl")
    model.data_config = {"mean": [0.1, 0.2, 0.3], "crop_mode": "squash"}
    written = export_model(model, tmp_path, batch_size=4)
    assert json.loads((tmp_path / DESCRIPTION_NAME).read_text()) == written
    assert written["class_names"] == ["cat", "dog", "owl"]
    assert written["data"]["mean"] == [0.1, 0.2, 0.3]
    assert written["data"].keys() == {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    assert written["data"]["input_size"] == [3, 32, 48]
    assert written["data"]["crop_mode"] == "squash"
    assert written["input"] == {"name": "images", "shape": [4, 3, 32, 48], "dtype": "float32"}
    assert written["output"] == {"name": "logits", "shape": [4, 3], "dtype": "float32"}
    assert written["device"] == "cpu"


def test_nothing_is_replaced_unless_asked(tmp_path):
    model = make_model()
    (tmp_path / "model.onnx").write_text("of an earlier model")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match=r"has an export already \(model.onnx\): .* overwrite=True"):
        export_model(model, tmp_path)
    assert (tmp_path / "model.onnx").read_text() == "of an earlier model"
    export_model(model, tmp_path, overwrite=True)  # and no file of another model stays beside the new one
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2", DESCRIPTION_NAME, "mine.txt"}


class Changed(nn.Module):
    """A model that computes something else where it is recorded."""

    def __init__(self, change):
        super().__init__()
        self.model, self.change = make_model(), change
        self.pretrained_cfg = self.model.pretrained_cfg

    def forward(self, images):
        logits = self.model(images)
        return self.change(logits) if torch.compiler.is_compiling() else logits


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("pt2", lambda logits: logits * 1.01, "differ from the model's by"),
        ("pt2", lambda logits: (0 * logits - 1).sqrt(), "differ from the model's by nan"),
        ("pt2", lambda logits: logits[:, :2], r"gives \(1, 2\) of torch.float32, expected \(1, 3\)"),
        pytest.param(
            *("onnx", lambda logits: logits * 1.01, "differ from the model's by"),
            marks=[needs_onnx, pytest.mark.full],
        ),
    ],
)
def test_a_file_that_computes_something_else_is_not_kept(form, change, message, tmp_path):
    (tmp_path / "model.pt2").write_text("the earlier one")
    with pytest.raises(ExportError, match=f"format '{form}' was not written: .*{message}"):
        export_model(Changed(change).eval(), tmp_path, formats=[form], overwrite=True)
    assert (tmp_path / "model.pt2").read_text() == "the earlier one"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (make_model, {"formats": "pt2"}, TypeError, "formats must be a list of some of"),
        (make_model, {"formats": []}, ValueError, "formats must be some of .* got none"),
        (make_model, {"formats": ["pt"]}, ValueError, "formats must be one of .* got 'pt'"),
        (make_model, {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (make_model, {"batch_size": 2.0}, TypeError, "batch_size must be an int, got 2.0"),
        (make_model, {"class_names": ["cat"]}, ValueError, "class_names must be 3"),
        (make_model, {"data_config": {"std": [0, 1, 1]}}, ValueError, "std must be positive"),
        (make_model, {"data_config": {"input_size": [3, 64, 64]}}, ValueError, "images must be 32x48 pixels"),
        (make_model, {"overwrite": 1}, TypeError, "overwrite must be a bool, got 1"),
        (lambda: make_model().train(), {}, ValueError, "call model.eval()"),
        (lambda: make_model().bfloat16(), {}, ExportError, r"got \['torch.bfloat16'\]; call model.float\(\)"),
        (lambda: "vit", {}, TypeError, "model must be an AdaptiveViT or a timm model, got str"),
        (lambda: nn.Linear(2, 2), {}, TypeError, "or a timm model, got Linear"),
    ],
)
def test_wrong_arguments_write_nothing(model, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_model(model(), tmp_path / "a" / "b", **options)
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_onnx_takes_float32(tmp_path):
    with pytest.raises(ExportError, match=r"on the CPU in float32 for the format 'onnx', got torch.float64"):
        export_model(make_model().double(), tmp_path, formats=["onnx"])


def test_missing_packages_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx, onnxruntime, onnxscript .* pip install 'vapt_fast"):
        export_model(make_model(), tmp_path, formats=["pt2", "onnx"])
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_a_missing_compiler_is_said(tmp_path):
    with (
        mock.patch("torch._inductor.config.cpp.cxx", ("no_such_compiler",)),
        pytest.raises(ExportError, match="'aoti' needs a C\\+\\+ compiler, which was not found; install g"),
    ):
        export_model(make_model(), tmp_path, formats=["aoti"])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    torch.__version__.startswith("2.8"), reason="its strict export hands no functions to modules"
)
def test_a_strict_export_without_a_convolution():
    prompts = PromptConfig(num_prompts=3, projector_dim=4, conv_kernel=None, static_depth=0)
    model = tiny_model(VIT, prompts=prompts, depth=2)
    batch, file = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}, io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(model, (tiny_images(model),), dynamic_shapes=batch, strict=True)
        torch.export.save(program, file)
        file.seek(0)
        images = tiny_images(model, batch=5)
        logits = torch.export.load(file).module()(images)
        torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-12)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_an_error_that_can_be_caught():
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(OSError, match="No space left"):
        FORMATS["pt2"].write(program, Path("/dev/full"))
