"""The demo's backbone: small, usable offline, pre-trained on 0 to 4 only, and known to timm when needed."""

import subprocess
import sys

import pytest
import timm
import torch

from vapt_fast import AdaptiveViT
from vapt_fast.demo import digit_images
from vapt_fast.demo.backbone import WEIGHTS
from vapt_fast.demo.pretrain import OLD_DIGITS, pretrain


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_backbone_is_known_when_it_is_asked_for():
    """And not before: nobody's list of timm's models changes by ``import vapt_fast``."""
    run(
        "import sys, timm, vapt_fast\n"
        "assert not timm.is_model('vit_digits_patch4_32') and 'vapt_fast.demo' not in sys.modules\n"
        "vapt_fast.AdaptiveViT('vit_digits_patch4_32', pretrained=True, num_classes=5)\n"
        "assert not {'sklearn', 'matplotlib', 'rich', 'typer'} & set(sys.modules)"
    )


@pytest.mark.full
def test_the_backbone_is_known_when_an_adapter_asks_for_it(tmp_path):
    model = AdaptiveViT("vit_digits_patch4_32", pretrained=True, num_classes=5)
    model.save_adapter(tmp_path, include_backbone=True)
    run(f"import vapt_fast; vapt_fast.AdaptiveViT.from_adapter({str(tmp_path)!r})")  # from the file
    for path in tmp_path.glob("backbone-*"):
        path.unlink()
    run(
        f"import vapt_fast; vapt_fast.AdaptiveViT.from_adapter({str(tmp_path)!r}, "
        "backbone='vit_digits_patch4_32')"
    )  # by its name


def test_pretrained_weights_come_with_the_package():
    assert WEIGHTS.stat().st_size <= 2_000_000
    model = timm.create_model("vit_digits_patch4_32", pretrained=True).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 20)
    assert timm.create_model("vit_digits_patch4_32", pretrained=True, num_classes=5).head.out_features == 5


def test_pretrained_weights_know_digit_and_rotation():
    model = timm.create_model("vit_digits_patch4_32", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images, digits = digit_images(OLD_DIGITS)
    pixels = torch.stack([transform(image) for image in images[:200]])
    with torch.no_grad():
        upright = model(pixels).argmax(1)
        turned = model(pixels.rot90(1, (2, 3))).argmax(1)
    truth = torch.tensor(digits[:200]) * 4
    assert (upright == truth).float().mean() > 0.4  # by chance: 0.05
    assert (turned == truth + 1).float().mean() > 0.4  # by chance: 0.05


@pytest.mark.parametrize(("digits", "count"), [(range(10), 1797), (range(5, 10), 896), ([3], 183)])
def test_digit_images(digits, count):
    images, labels = digit_images(digits)
    assert len(images) == len(labels) == count
    assert set(labels) == set(digits)
    assert (images[0].mode, images[0].size) == ("RGB", (8, 8))
    low, high = zip(*(image.convert("L").getextrema() for image in images), strict=True)
    assert (min(low), max(high)) == (0, 255)


def test_digit_images_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vapt_fast\[demo\]'"):
        digit_images()


@pytest.mark.full
def test_pretraining_is_reproducible():
    first, accuracy = pretrain(epochs=1, seed=3, held_out=850)
    second, _ = pretrain(epochs=1, seed=3, held_out=850)
    other, _ = pretrain(epochs=1, seed=4, held_out=850)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert 0 <= accuracy <= 1
    assert {tensor.dtype for tensor in first.values()} == {torch.float16}
