"""``vapt-fast explain``, and the picture that it writes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from command import error_of, succeed
from PIL import Image

from vapt_fast import AdaptiveViT, explain
from vapt_fast.demo import digit_images
from vapt_fast.training import build_model, save_model

pytestmark = pytest.mark.full

DIGITS = "vit_digits_patch4_32"
NAMES = ["$five", "six", "seven", "eight^$", "nine"]


def adapted(**options):
    torch.manual_seed(0)
    model = AdaptiveViT(DIGITS, pretrained=True, num_classes=5, **{"num_prompts": 3, **options}).eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    path = tmp_path_factory.mktemp("digit") / "digit.png"
    digit_images([7])[0][0].save(path)
    return path


def saved(tmp_path, **options):
    adapted(**options).save_adapter(tmp_path / "out", class_names=NAMES)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("options", "rows"),
    [({}, 2), ({"static_depth": 0}, 2), ({"kind": "deep"}, 1), ({"kind": "kv"}, 1), ({"num_prompts": 0}, 1)],
)
def test_a_picture_of_every_kind(options, rows, digit, tmp_path):
    folder, output = saved(tmp_path, **options), tmp_path / "new" / "picture.png"
    assert str(output) in succeed("explain", folder, digit, "--output", output).stdout
    pixels = np.asarray(Image.open(output).convert("RGB"))
    assert pixels.shape[0] == pytest.approx((3.4 * rows + 0.4) * 150, abs=2)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200


def test_long_names_and_reasons_stay_in_their_places(monkeypatch):
    """Of kind "kv" there is no Grad-CAM, and its panel says why."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **given: drawn.append(self) or save(self, *args, **given)
    )
    names = [f"great white shark, white shark, man-eater, man-eating shark, number {i}" for i in range(5)]
    explain.explain_picture(adapted(kind="kv"), digit_images([7])[0][0], class_names=names)
    (figure,) = drawn
    assert all(axes.get_position().width > 0.15 for axes in figure.axes)
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(titles))
    above = figure._suptitle.get_window_extent()
    assert 0 <= above.x0 < above.x1 <= figure.bbox.x1


def test_the_target_decides_on_the_picture(digit, tmp_path):
    folder = saved(tmp_path)
    pictures = {}
    for target in (None, *NAMES):
        flags = [] if target is None else ["--target", target]
        output = tmp_path / f"{target}.png"
        succeed("explain", folder, digit, "--output", output, *flags)
        pictures[target] = output.read_bytes()
    same = [target for target in NAMES if pictures[target] == pictures[None]]
    model = adapted()
    predicted = model(model.transform()(digit_images([7])[0][0])[None]).argmax(1).item()
    assert same == [NAMES[predicted]]


def test_wrong_use(digit, tmp_path):
    folder = saved(tmp_path)
    output = tmp_path / "picture.png"
    to = ["--output", output]
    assert "--target must be one of the classes $five, six" in error_of(
        "explain", folder, digit, "--target", "5", *to
    )
    assert "does not exist" in error_of("explain", folder, tmp_path / "none.png", *to)
    save_model(build_model("full", DIGITS, 5), tmp_path / "full", {"class_names": NAMES, "data_config": {}})
    assert "full fine-tuning" in error_of("explain", tmp_path / "full", digit, *to)
    assert not output.exists()


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_model_that_has_no_names_and_other_channels(in_chans):
    model = AdaptiveViT("vit_tiny_patch16_224", img_size=(32, 48), depth=2, num_classes=2, in_chans=in_chans)
    picture = explain.explain_picture(model, Image.new("RGB", (70, 40), "red"), 1)
    assert picture.startswith(b"\x89PNG")
    assert model.training
    with pytest.raises(ValueError, match="classes below 2"):
        explain.explain_picture(model, Image.new("RGB", (70, 40)), 2)
