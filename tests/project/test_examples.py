"""The scripts of examples/ run, and write what can be loaded."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vapt_fast import AdaptiveViT
from vapt_fast.tasks.segmentation import Segmenter

pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = {"accelerate_loop": "accelerate", "lightning_loop": "lightning"}

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)


def check_trained():
    """An adapter was saved, with a projection that starts at zero."""
    model = AdaptiveViT.from_adapter("adapter")
    assert model.num_classes == 5
    assert model.prompts.blocks[1].token_projection.weight.count_nonzero()


@pytest.mark.parametrize("name", ["timm_loop", "lightning_loop", "accelerate_loop"])
def test_training(name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    importlib.import_module(name).main(epochs=1)
    check_trained()


def test_segmentation(capsys):
    pytest.importorskip("segmentation_models_pytorch")
    importlib.import_module("segmentation").main(epochs=1)
    assert "DPT: mean IoU" in capsys.readouterr().out
    assert Segmenter.from_adapter("segmenter").num_classes == 6


def test_retrieval(capsys):
    importlib.import_module("retrieval").main()
    before, after = (float(share) for share in re.findall(r"mAP (.*)%", capsys.readouterr().out))
    assert after > before


def test_many_adapters(capsys):
    importlib.import_module("many_adapters").main(epochs=1)
    assert "digit" in capsys.readouterr().out


def test_export():
    importlib.import_module("export").main()
    assert Path("exported/model.pt2").exists()


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="PyTorch for Windows has no libuv, which torchrun wants")
@pytest.mark.parametrize("option", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_distributed(option):
    script = [str(EXAMPLES / "distributed.py"), *option]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        *script,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    check_trained()


def test_distributed_without_its_launcher(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        importlib.import_module("distributed").main()


@pytest.mark.parametrize("name", ["method", "attention", "pooling", "steps"])
def test_pictures_of_the_documentation(name, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(EXAMPLES.parent / "docs")
    getattr(importlib.import_module("figures"), name)().savefig("picture.svg")
