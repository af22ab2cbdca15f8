"""Each command that misses a package says so in one sentence, with the command that installs it."""

import sys

import pytest
from command import error_of
from PIL import Image
from suite_folders import vtab_folder
from training_cases import BACKBONE

from vapt_fast import AdaptiveViT
from vapt_fast.demo import digit_images

SWEEP = f"sweep --data vtab:kitti --root {{data}} --other-sizes --backbone {BACKBONE} --output {{out}}"
COMMANDS = {
    "train": ("sklearn", "demo", "train --output {out}"),
    "train, LoRA": ("peft", "lora", "train --method lora --output {out}"),
    "train, DPT": (
        *("segmentation_models_pytorch", "segmentation"),
        f"train --task segmentation --data {{masks}} --backbone {BACKBONE} --decoder dpt --output {{out}}",
    ),
    "explain": ("matplotlib", "demo", "explain {adapter} {image} --output {out}.png"),
    "demo": ("sklearn", "demo", "demo --output {out}"),
    "demo, picture": ("matplotlib", "demo", "demo --output {out}"),
    **{
        f"export, {package}": (package, "onnx", "export {adapter} --format onnx --output {out}")
        for package in ("onnx", "onnxruntime", "onnxscript")
    },
    **{
        f"serve, {package}": (package, "serve", "serve a={adapter} --store {out}")
        for package in ("python_multipart", "ray")
    },
    "sweep, LoRA": ("peft", "lora", f"{SWEEP} --method lora"),
    "sweep, joblib": ("joblib", "sweep", f"{SWEEP} --jobs 2"),
    "sweep, Ray": ("ray", "ray", f"{SWEEP} --engine ray"),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = {name: folder / name for name in ("data", "masks", "adapter", "image")}
    vtab_folder(paths["data"], "kitti")
    for kind in ("images", "masks"):
        (paths["masks"] / "train" / kind).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (32, 32), index % 2).save(paths["masks"] / "train" / kind / f"{index}.png")
    model = AdaptiveViT(BACKBONE, pretrained=True, num_classes=2, num_prompts=2)
    model.save_adapter(paths["adapter"], class_names=["a", "b"])
    digit_images([7])[0][0].save(paths["image"], "PNG")
    return paths


@pytest.mark.parametrize("command", COMMANDS)
def test_what_to_install(command, paths, tmp_path, monkeypatch):
    package, extra, line = COMMANDS[command]
    for name in {package, *sys.modules}:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    words = [word.format(**paths, out=tmp_path / "out") for word in line.split()]
    assert f"pip install 'vapt_fast[{extra}]'" in error_of(*words)
