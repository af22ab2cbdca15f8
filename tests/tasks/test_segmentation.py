"""Segmentation: decoders, windows, the metric, adapters, and training on digits with exact masks."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from command import error_of, invoke, succeed
from extras import needs
from PIL import Image
from replaying import replaying_on_cpu
from tiny import randomize, tiny_backbone
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vapt_fast.demo  # noqa: F401, gives timm the digits' backbone
from vapt_fast import AdapterError, AdaptiveViT, use_backend
from vapt_fast.data import full_data_config
from vapt_fast.demo.placed_digits import digit_canvases, write_canvases
from vapt_fast.export import export_model
from vapt_fast.tasks.segmentation import (
    DECODERS,
    IGNORED,
    MaskedImages,
    PixelEvaluation,
    Preparation,
    Segmenter,
    confusion_matrix,
    evaluate_pixels,
    mask_splits,
    open_mask,
    sliding_window,
)
from vapt_fast.tasks.segmentation.pictures import mask_picture, overlay, palette, predict_labels
from vapt_fast.tasks.segmentation.task import TASK
from vapt_fast.training import Recipe, RunOptions, Splits, UserError, load_model, search
from vapt_fast.training.loss import cross_entropy, num_right
from vapt_fast.training.options import DECODER_NAMES
from vapt_fast.training.transforms import Augmentation

pytestmark = pytest.mark.full

BACKBONE = "vit_digits_patch4_32"
VIT = "vit_tiny_patch16_224"
DECODERS_HERE = [
    pytest.param(name, marks=needs("segmentation_models_pytorch") if name == "dpt" else ())
    for name in DECODER_NAMES
]


def tiny_segmenter(decoder="linear", seed=0, **options):
    """A Segmenter on a tiny backbone of four blocks, in float64, that has learned something."""
    backbone = tiny_backbone(VIT, seed, depth=4, img_size=(32, 32), patch_size=8)
    torch.manual_seed(seed)
    model = (
        Segmenter(backbone, num_classes=3, decoder=decoder, **{"num_prompts": 3, **options}).double().eval()
    )
    randomize(model.prompts, seed + 1)
    return model


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def config():
    return full_data_config(timm.get_pretrained_cfg(BACKBONE).to_dict())


@pytest.fixture(scope="module")
def canvases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canvases")
    write_canvases(folder, {"train": 12, "val": 4, "test": 4})
    return folder


@pytest.fixture(scope="module")
def trained(canvases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(canvases, folder)
    return folder


def train(data, folder, *options):
    fixed = ["--image-size", 64, "--epochs", 2, "--lr", 1, "--prompts", 2, "--batch-size", 4]
    return succeed("train", "--task", "segmentation", "--data", data, "--output", folder, *fixed, *options)


# ---- the model


@pytest.mark.parametrize("decoder", DECODERS_HERE)
def test_backends_agree(decoder):
    """The rewritten pass equals the literal one: logits and the gradients of prompts and decoder."""
    model, images = tiny_segmenter(decoder), noise(2, 3, 32, 32)
    results = {}
    for backend in ("reference", "torch"):
        with use_backend(backend):
            logits = model(images)
        model.zero_grad()
        logits.square().sum().backward()
        results[backend] = [logits, *(p.grad.clone() for p in model.trainable_parameters())]
    assert results["torch"][0].shape == (2, 3, 32, 32)
    for ours, literal in zip(*results.values(), strict=True):
        scale = max(1.0, literal.abs().max().item())
        torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-9 * scale)


def test_linear_decoder_is_what_it_says():
    """Normed tokens of all taps, concatenated; a batch norm and a linear map; then bilinear resizing."""
    model, images = tiny_segmenter(taps=[1, 3]), noise(2, 3, 32, 32)
    with torch.no_grad():
        model.head.norm.running_mean.normal_()
    taps = model.forward_intermediates(images, [1, 3], norm=True, intermediates_only=True)
    norm, classifier = model.head.norm, model.head.classifier
    tokens = torch.cat(taps, dim=1).movedim(1, -1)
    tokens = (tokens - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    logits = (tokens @ classifier.weight.flatten(1).T + classifier.bias).movedim(-1, 1)
    expected = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("patch", "steps"), [(16, 4), (14, 3), (8, 3), (4, 2)])
def test_progressive_upsampling(patch, steps):
    """One step for each factor of two in the patch; channels as published."""
    decoder = DECODERS["pup"](32, 5, 1, (patch, patch), True)
    widths = [module.in_channels for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [32, *[256] * steps]
    assert decoder([torch.randn(1, 32, 2, 3)], [None]).shape == (1, 5, 2 * 2**steps, 3 * 2**steps)


@needs("segmentation_models_pytorch")
def test_dpt_is_that_of_the_library():
    """The same weights in segmentation_models_pytorch's own DPT, on a vapt_ name, give the same logits."""
    import segmentation_models_pytorch as smp

    options = {"embed_dim": 32, "num_heads": 2, "img_size": 64}
    theirs = smp.DPT(f"tu-vapt_{VIT}", encoder_weights=None, classes=3, num_prompts=2, **options)
    theirs = theirs.double().eval()
    randomize(theirs.encoder.model.prompts, 1)
    ours = Segmenter(timm.create_model(VIT, **options), num_classes=3, decoder="dpt", num_prompts=2).double()
    ours.eval().backbone.load_state_dict(theirs.encoder.model.backbone.state_dict())
    ours.prompts.load_state_dict(theirs.encoder.model.prompts.state_dict())
    ours.head.fusion.load_state_dict(theirs.decoder.state_dict())
    ours.head.classifier.load_state_dict(theirs.segmentation_head.state_dict())
    images = noise(1, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-9, atol=1e-9)


@needs("segmentation_models_pytorch")
def test_dpt_refuses_an_odd_grid():
    model = Segmenter(
        VIT, num_classes=2, decoder="dpt", num_prompts=1, img_size=48, embed_dim=32, num_heads=2
    )
    with pytest.raises(ValueError, match="even number of patches"):
        model(torch.zeros(1, 3, 48, 48))


def test_dpt_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    for name in [name for name in sys.modules if name.startswith("segmentation_models_pytorch.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vapt_fast\[segmentation\]'"):
        tiny_segmenter("dpt")


class Interpolations(TorchDispatchMode):
    """The dtypes of all maps that are interpolated, and of their gradients."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "upsample_bilinear2d" in str(function):
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_gradients_of_hundreds_of_pixels_are_not_added_up_in_16_bits():
    """As a GPU would, which adds them in the dtype of what is interpolated."""
    model = tiny_segmenter(backend="torch").to(torch.bfloat16)
    with Interpolations() as seen:
        logits = model(noise(1, 3, 32, 32).bfloat16())
        logits.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert seen.dtypes == [torch.float32, torch.float32]


def test_everything_that_learns_gets_a_gradient():
    """Of a distilled backbone too, whose two classifiers are gone."""
    backbone = tiny_backbone("deit_tiny_distilled_patch16_224").float()
    model = Segmenter(backbone, num_classes=4, num_prompts=2)
    height, width = model.pretrained_cfg["input_size"][1:]
    model(torch.randn(2, 3, height, width)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


def test_cuda_graphs_repeat_the_same_numbers():
    """Captured calls train as others do, the running statistics of the decoder included."""
    models = [tiny_segmenter(cuda_graphs=enabled).train() for enabled in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    with replaying_on_cpu():
        for step in range(4):
            logits = []
            for model in models:
                torch.manual_seed(step)
                logits.append(model(noise(2, 3, 32, 32, seed=step)))
                logits[-1].square().sum().backward()
            torch.testing.assert_close(logits[1], logits[0], rtol=1e-9, atol=1e-9)
    assert "captured" in models[1].cuda_graph_report()
    states = [model.adapter_state() for model in models]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decoder": "unet"}, ValueError, "decoder must be one of"),
        ({"num_classes": 0}, ValueError, "num_classes"),
        ({"taps": [0, 1]}, ValueError, "ascending to the last, 3"),
        ({"taps": [3, 1, 3]}, ValueError, "ascending to the last, 3"),
        ({"taps": []}, ValueError, "ascending to the last, 3"),
        ({"taps": [1, 3], "decoder": "pup"}, ValueError, "taps must be one block"),
        ({"global_pool": "avg", "pool_prompts": True, "kind": "deep"}, ValueError, "pool_prompts"),
    ],
)
def test_refused(options, error, message):
    backbone = tiny_backbone(VIT, depth=4)
    with pytest.raises(error, match=message):
        Segmenter(backbone, **{"num_classes": 3, "num_prompts": 1, **options})


def test_pooled_prompts_are_refused_in_a_further_adapter():
    model = Segmenter(tiny_backbone(VIT, global_pool="avg"), num_classes=3, num_prompts=1)
    with pytest.raises(ValueError, match="pool_prompts"):
        model.add_adapter("more", pool_prompts=True)
    assert list(model.adapters) == ["default"]


def test_methods_that_a_decoder_has_no_use_for():
    model = tiny_segmenter()
    tokens = model.forward_features(noise(1, 3, 32, 32))
    assert model.forward_head(tokens, pre_logits=True).shape == (1, 32)
    with pytest.raises(NotImplementedError):
        model.forward_head(tokens)
    with pytest.raises(NotImplementedError):
        model.prune_intermediate_layers(1)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(2, "avg")
    model.class_names = ("sky", "sea", "land")
    model.reset_classifier(7)
    assert model.class_names is None
    assert model(noise(1, 3, 32, 32)).shape == (1, 7, 32, 32)


def test_other_image_size():
    model = tiny_segmenter()
    model.set_input_size((32, 64))
    assert model(noise(1, 3, 32, 64)).shape == (1, 3, 32, 64)


# ---- adapters


@pytest.mark.parametrize("decoder", ["linear", "pup"])
def test_an_adapter_holds_prompts_and_decoder(tmp_path, decoder):
    model, images = tiny_segmenter(decoder).float(), noise(1, 3, 32, 32).float()
    with torch.no_grad():
        for buffer in model.head.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    model.save_adapter(tmp_path, class_names=["sky", "sea", "land"], metadata={"mine": 1})
    backbone = tiny_backbone(VIT, depth=4, img_size=(32, 32), patch_size=8).float()
    loaded = Segmenter.from_adapter(tmp_path, backbone=backbone)
    assert torch.equal(loaded(images), model(images))
    assert loaded.class_names == ("sky", "sea", "land")
    assert loaded.adapter_metadata["mine"] == 1
    other = tiny_segmenter(decoder, seed=5).float()
    other.load_adapter(tmp_path, check_backbone=False)
    assert all(
        torch.equal(a, b) for a, b in zip(other.head.parameters(), model.head.parameters(), strict=True)
    )


def test_adapters_of_other_models_are_refused(tmp_path):
    tiny_segmenter(taps=[1, 3]).save_adapter(tmp_path / "two")
    with pytest.raises(AdapterError, match="segmentation"):
        tiny_segmenter(taps=[2, 3]).load_adapter(tmp_path / "two")
    AdaptiveViT(tiny_backbone(VIT), num_prompts=1).save_adapter(tmp_path / "classifier")
    with pytest.raises(AdapterError, match="none of a Segmenter"):
        Segmenter.from_adapter(tmp_path / "classifier")


@pytest.mark.full
def test_exported_program(tmp_path):
    """The file gives logits for every pixel, and its description names the classes."""
    model, images = tiny_segmenter().float(), noise(3, 3, 32, 32).float()
    export_model(model, tmp_path, class_names=["sky", "sea", "land"])
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "export.json").read_text())["class_names"] == ["sky", "sea", "land"]


# ---- windows


class Positions(nn.Module):
    """Logits that depend on the pixel and on its place in the window."""

    def forward(self, images):
        ramp = torch.arange(images.shape[-1], dtype=images.dtype)
        return torch.cat([images * (1 + ramp), images - ramp], dim=1)


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (11, 9), (17, 8)])
@pytest.mark.parametrize("stride", [None, 3, (8, 5)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_sliding_window_is_the_mean_of_all_windows(size, stride, batch_size):
    images, model = noise(2, 3, *size), Positions()
    got = sliding_window(model, images, 8, stride=stride, batch_size=batch_size)
    down, right = (6, 6) if stride is None else (stride, stride) if isinstance(stride, int) else stride
    tops = sorted({*range(0, size[0] - 8, down), size[0] - 8})
    lefts = sorted({*range(0, size[1] - 8, right), size[1] - 8})
    for row in range(size[0]):
        for column in range(size[1]):
            values = [
                model(images[..., top : top + 8, left : left + 8])[..., row - top, column - left]
                for top in tops
                for left in lefts
                if 0 <= row - top < 8 and 0 <= column - left < 8
            ]
            torch.testing.assert_close(got[..., row, column], torch.stack(values).mean(0))


def test_one_window_is_the_model_itself():
    model, images = tiny_segmenter(), noise(2, 3, 32, 32)
    torch.testing.assert_close(sliding_window(model, images, 32), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "stride", "message"), [((8, 4), None, "at least 8x8"), ((9, 9), 9, "at most the window")]
)
def test_sliding_window_refuses(size, stride, message):
    with pytest.raises(ValueError, match=message):
        sliding_window(Positions(), torch.zeros(1, 3, *size), 8, stride=stride)


# ---- the metric


def random_labels(classes, ignored_share=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (4, 9, 7), generator=generator)
    predicted = torch.randint(classes, (4, 9, 7), generator=generator)
    predicted = torch.where(torch.rand(predicted.shape, generator=generator) < 0.5, labels, predicted)
    return predicted, labels.masked_fill(
        torch.rand(labels.shape, generator=generator) < ignored_share, IGNORED
    )


def evaluation(predicted, labels, classes):
    names = tuple(map(str, range(classes)))
    return PixelEvaluation(names, confusion_matrix(predicted, labels, classes), 0.0)


def test_mean_iou_is_counted_over_the_data_set():
    predicted, labels = random_labels(4)
    by_class = []
    for index in range(4):
        hit = wrong = missed = 0
        for guess, true in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if true != IGNORED:
                hit += guess == true == index
                wrong += guess == index != true
                missed += true == index != guess
        by_class.append(hit / (hit + wrong + missed))
    result = evaluation(predicted, labels, 4)
    assert result.ious == pytest.approx(by_class)
    assert result.mean_iou == pytest.approx(sum(by_class) / 4)
    assert result.num_images == int((labels != IGNORED).sum())


def test_classes_that_appear_nowhere_are_left_out():
    predicted, labels = random_labels(3)
    result = evaluation(predicted, labels, 5)
    assert result.ious[3:] == [None, None]
    assert result.mean_iou == pytest.approx(evaluation(predicted, labels, 3).mean_iou)


@needs("torchmetrics")
@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("absent", [0, 2])
def test_mean_iou_equals_torchmetrics(classes, absent):
    from torchmetrics.classification import MulticlassJaccardIndex

    predicted, labels = random_labels(classes, seed=classes)
    metric = MulticlassJaccardIndex(classes + absent, ignore_index=IGNORED, average="macro")
    for image, mask in zip(predicted, labels, strict=True):
        metric.update(image, mask)
    assert evaluation(predicted, labels, classes + absent).mean_iou == pytest.approx(
        metric.compute().item(), abs=1e-6
    )


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        ([0, 1], [0], "shape"),
        ([0, 3], [0, 1], "predicted"),
        ([0, 1], [0, 255], "labels"),
        ([0, 0], [0, -1], "labels"),
    ],
)
def test_confusion_matrix_refuses(predicted, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(predicted), torch.tensor(labels), 3)


# ---- the loss


def test_ignored_pixels_have_no_say():
    """Loss and hits are those of the other pixels; of none, zero, with a gradient of zero."""
    logits = noise(2, 3, 4, 4).requires_grad_()
    labels = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    labels[0, :2] = IGNORED
    counted = labels != IGNORED
    rows = logits.movedim(1, -1)[counted]
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(rows, labels[counted], label_smoothing=smoothing)
        torch.testing.assert_close(cross_entropy(logits, labels, smoothing), expected)
    share = (rows.argmax(1) == labels[counted]).double().mean()
    torch.testing.assert_close(num_right(logits, labels), 2 * share)
    nothing = cross_entropy(logits, torch.full_like(labels, IGNORED))
    assert nothing == 0
    assert torch.autograd.grad(nothing, logits)[0].abs().sum() == 0


# ---- data


def small_folder(root, masks, size=(10, 8), split="train"):
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
    for index, values in enumerate(masks):
        Image.new("RGB", size, (50 * index, 90, 0)).save(root / split / "images" / f"{index}.jpg")
        pixels = np.resize(np.asarray(values, np.uint8), (size[1], size[0]))
        Image.fromarray(pixels).save(root / split / "masks" / f"{index}.png")
    return root


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_masks_hold_numbers(tmp_path, mode):
    values = np.asarray([[0, 1, 2], [255, 7, 3]])
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette([value for index in range(256) for value in (255 - index, 0, index)])
    image.save(tmp_path / "mask.png")
    assert open_mask(tmp_path / "mask.png").tolist() == [[0, 1, 2], [IGNORED, 7, 3]]
    reduced = open_mask(tmp_path / "mask.png", reduce_zero_label=True)
    assert reduced.tolist() == [[IGNORED, 0, 1], [IGNORED, 6, 2]]


def test_masks_with_colours_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="one channel"):
        open_mask(tmp_path / "mask.png")


def test_splits_of_a_folder(tmp_path, config):
    small_folder(tmp_path, [[0, 1], [2], [1], [0, 3], [255]])
    splits = mask_splits(tmp_path, config, 0, validation_share=0.4)
    assert splits.class_names == ("0", "1", "2", "3")
    assert (len(splits.train), len(splits.validation), splits.test) == (3, 2, None)
    assert not set(splits.files["train"]) & set(splits.files["validation"])
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\nroad\nsnow\n")
    small_folder(tmp_path, [[4]], split="val")
    splits = mask_splits(tmp_path, config, 0)
    assert splits.class_names == ("sky", "sea", "land", "road", "snow")
    assert (len(splits.train), len(splits.validation)) == (5, 1)
    with pytest.raises(UserError, match="train_images"):
        mask_splits(tmp_path, config, 0, num_train=6)


def test_255_is_no_class(tmp_path, config):
    """Of a class of this number, no pixel would be learned or counted."""
    small_folder(tmp_path, [[0, 1], [2], [254]])
    assert len(mask_splits(tmp_path, config, 0).class_names) == 255
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(255))))
    assert len(mask_splits(tmp_path, config, 0).class_names) == 255
    with pytest.raises(UserError, match="leaves 254"):
        mask_splits(tmp_path, config, 0, reduce_zero_label=True)
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(256))))
    with pytest.raises(UserError, match="has 256 classes"):
        mask_splits(tmp_path, config, 0)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_no_image_is_dropped_for_another_of_its_name(tmp_path, config, kind):
    small_folder(tmp_path, [[0], [1], [2]])
    for ending in ("bmp", "gif"):
        Image.new("L", (10, 8), 1).save(tmp_path / "train" / kind / f"1.{ending}")
    with pytest.raises(UserError, match="differ in their endings only"):
        mask_splits(tmp_path, config, 0)


def test_folders_that_are_refused(tmp_path, config):
    with pytest.raises(UserError, match="train/images"):
        mask_splits(tmp_path, config, 0)
    small_folder(tmp_path, [[0], [1], [2]])
    (tmp_path / "train" / "masks" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.jpg"):
        mask_splits(tmp_path, config, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: Image.new("L", (9, 8)).save(path), "10x8"),
        (lambda path: Image.new("L", (10, 8), 9).save(path), "class 9"),
        (lambda path: path.write_bytes(b"no image"), "can't be read"),
    ],
)
def test_masks_are_checked_before_a_run(tmp_path, damage, message):
    data = small_folder(tmp_path / "data", [[0, 1], [1], [2]])
    (data / "classes.txt").write_text("a\nb\nc\n")
    damage(data / "train" / "masks" / "1.png")
    out = tmp_path / "out"
    assert message in error_of("train", "--task", "segmentation", "--data", data, "--output", out)
    assert not out.exists()


KINDS = ["none", "flip", "crop-flip", "random-resized-crop"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(20, 50), (100, 40)])
def test_image_and_mask_are_cut_alike(config, kind, size):
    """The mask is the image: wherever a pixel goes, its label goes too."""
    prepare = Preparation(
        {**config, "interpolation": "nearest"}, training=True, augmentation=Augmentation(kind)
    )
    pixels = np.random.default_rng(0).integers(0, 200, (size[1] // 10, size[0] // 10), dtype=np.uint8)
    pixels = pixels.repeat(10, 0).repeat(10, 1)
    picture, labels = Image.fromarray(pixels).convert("RGB"), torch.from_numpy(pixels.astype(np.int64))
    torch.manual_seed(0)
    agreed = []
    for _ in range(5):
        image, mask = prepare(picture, labels)
        assert image.shape == (3, 32, 32)
        assert (mask.shape, mask.dtype, type(mask)) == ((32, 32), torch.int64, torch.Tensor)
        shown = ((image[0] * 0.5 + 0.5) * 255).round().long()
        agreed.append((shown == mask)[mask != IGNORED].double().mean().item())
        if kind != "random-resized-crop":
            assert (mask != IGNORED).all()
        else:
            assert (shown[mask == IGNORED] == 128).all()
    assert min(agreed) > 0.95  # where a pixel is as near as another, rounding decides


def test_evaluation_keeps_all_of_an_image(config):
    prepare = Preparation(config)
    image, labels = prepare(Image.new("RGB", (50, 20)), torch.zeros(20, 50, dtype=torch.int64))
    assert image.shape == (3, 32, 80)
    assert labels.shape == (20, 50)


@pytest.mark.parametrize("options", [{"kind": "rand-augment"}, {"random_erasing": 0.5}])
def test_augmentations_that_masks_cannot_follow(config, options):
    with pytest.raises(UserError, match="segmentation takes the augmentations"):
        Preparation(config, training=True, augmentation=Augmentation(**options))


def test_canvases_have_exact_masks():
    for image, mask in digit_canvases(6, [3, 8], size=(48, 60)):
        pixels, labels = np.asarray(image)[..., 0], np.asarray(mask)
        assert labels.shape == pixels.shape == (48, 60)
        assert set(np.unique(labels)) <= {0, 1, 2}
        assert (labels > 0).any()
        assert ((labels > 0) == (pixels >= 100)).all()


# ---- evaluation


class Bright(nn.Module):
    """Pixels are of class 1 where the image is bright."""

    num_classes = 2

    @property
    def pretrained_cfg(self):
        return {"input_size": (3, 32, 32)}

    def forward(self, images):
        return torch.stack([-images.mean(1), images.mean(1)], dim=1)


def test_evaluation_counts_native_pixels(tmp_path, config):
    """Images of any size, each pixel of whose masks counts once."""
    root, right = tmp_path, 0
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    files = []
    for index, (width, height) in enumerate([(32, 32), (70, 40), (20, 30)]):
        image, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
        image[:, width // 2 :] = 255
        mask[:, width // 2 :] = 1
        mask[0] = 255
        Image.fromarray(image).save(root / "images" / f"{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"{index}.png")
        files.append((root / "images" / f"{index}.png", root / "masks" / f"{index}.png"))
        right += width * (height - 1)
    result = evaluate_pixels(
        Bright(), MaskedImages(files, Preparation(config), 2), ["dark", "bright"], batch_size=3
    )
    assert result.num_images == right
    assert result.accuracy > 0.97
    assert result.as_dict()["pixels"] == right
    Image.new("L", (32, 32), 255).save(root / "masks" / "0.png")
    with pytest.raises(UserError, match="no pixel"):
        evaluate_pixels(Bright(), MaskedImages(files[:1], Preparation(config), 2), ["dark", "bright"])


def test_nan_is_no_class():
    """It is refused; in training it is never right, and its loss is what a search takes for diverged."""
    images = torch.rand(2, 3, 32, 32)
    images[1, :, 3, 4] = torch.nan
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    data = torch.utils.data.TensorDataset(images, labels)
    with pytest.raises(UserError, match="NaN"):
        evaluate_pixels(Bright(), data, ["dark", "bright"])
    score = TASK.evaluate(Bright(), data)
    assert (score.accuracy, score.mean_iou) == (0, 0)
    assert np.isnan(score.loss)
    labels[1, 3, 4] = IGNORED
    assert evaluate_pixels(Bright(), data, ["dark", "bright"]).num_images == labels.numel() - 1


def test_validation_chooses_by_mean_iou():
    """Of two candidates, the one with the higher mean IoU wins, though its pixels are less often right."""
    from vapt_fast.training.evaluation import Score

    scores = iter([Score(0.9, 1.0, 0.3), Score(0.8, 2.0, 0.4)])
    images = torch.utils.data.TensorDataset(
        torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    )
    recipes = [Recipe(lr, epochs=1, warmup_epochs=0) for lr in (0.1, 0.2)]
    found = search(
        lambda: Segmenter(BACKBONE, num_classes=2, num_prompts=1),
        Splits(("a", "b"), images, images, None),
        recipes,
        evaluate=lambda *_, **__: next(scores),
    )
    assert found.recipe.base_lr == 0.2
    assert (found.validation.mean_iou, found.validation.accuracy) == (0.4, 0.8)
    assert [candidate["validation_mean_iou"] for candidate in found.candidates] == [0.3, 0.4]


# ---- the command line


@pytest.mark.full
def test_train_evaluate_predict(canvases, trained, tmp_path):
    result = json.loads((trained / "result.json").read_text())
    evaluated = json.loads(invoke("evaluate", trained, "--data", canvases, "--json").stdout)
    assert evaluated["mean_iou"] == pytest.approx(result["test_mean_iou"])
    assert evaluated["accuracy"] == pytest.approx(result["test_accuracy"])
    validated = json.loads(invoke("evaluate", trained, "--data", canvases, "--split", "val", "--json").stdout)
    assert validated["mean_iou"] == pytest.approx(result["validation_mean_iou"])
    images = canvases / "test" / "images"
    predicted = json.loads(succeed("predict", trained, images, "--output", tmp_path, "--json").stdout)
    _, metadata = load_model(trained)
    assert metadata["class_names"][0] == "background"
    counts = torch.zeros(6, 6, dtype=torch.int64)
    for entry, path in zip(predicted, sorted(images.iterdir()), strict=True):
        assert Image.open(entry["overlay"]).size == Image.open(path).size
        labels = open_mask(canvases / "test" / "masks" / path.name)
        counts += confusion_matrix(open_mask(entry["mask"]), labels, 6)
    assert PixelEvaluation(tuple(metadata["class_names"]), counts, 0.0).mean_iou == pytest.approx(
        evaluated["mean_iou"]
    )


@pytest.mark.full
def test_a_stopped_run_goes_on_to_the_same_bits(canvases, trained, tmp_path):
    from safetensors.torch import load_file

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    from vapt_fast.training import run

    options = RunOptions.read(trained)
    with pytest.raises(Stop):
        run(options, tmp_path, progress=stop)
    run(options, tmp_path, resume=True)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, trained))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.full
def test_zero_that_is_no_class(canvases, tmp_path):
    """With --reduce-zero-label the background has no label, and predictions are numbered as the data are."""
    data = shutil.copytree(canvases, tmp_path / "data")
    (data / "classes.txt").write_text("5\n6\n7\n8\n9\n")
    train(data, tmp_path / "out", "--reduce-zero-label")
    evaluated = json.loads(invoke("evaluate", tmp_path / "out", "--data", data, "--json").stdout)
    masks = [open_mask(path) for path in (data / "test" / "masks").iterdir()]
    assert evaluated["pixels"] == sum(int((mask > 0).sum()) for mask in masks)
    image = data / "test" / "images" / "0000.png"
    (entry,) = json.loads(succeed("predict", tmp_path / "out", image, "--output", tmp_path, "--json").stdout)
    assert int(open_mask(entry["mask"]).min()) >= 1


@pytest.mark.full
def test_command_line_refuses(canvases, trained, tmp_path):
    images = canvases / "test" / "images"
    assert "--output" in error_of("predict", trained, images)
    (tmp_path / "masks").mkdir()
    mask = tmp_path / "masks" / "0001.png"
    mask.touch()
    assert f"{mask} exists already" in error_of("predict", trained, images, "--output", tmp_path)
    assert not mask.read_bytes()
    twice = error_of("predict", trained, images, canvases / "val" / "images", "--output", tmp_path)
    assert "several images" in twice
    base = ["train", "--task", "segmentation", "--output", tmp_path / "out"]
    assert "train/images" in error_of(*base)
    assert "cache" in error_of(*base, "--data", canvases, "--cache")
    assert "--crop-pct" in error_of(*base, "--data", canvases, "--crop-pct", 0.9)
    assert "frozen backbone" in error_of(*base, "--data", canvases, "--method", "full", "--image-size", 64)
    assert "give task='segmentation'" in error_of("train", "--output", tmp_path / "o", "--data", canvases)
    image = next(images.iterdir())
    assert "is for segmentation" in error_of("explain", trained, image, "--output", tmp_path / "e.png")
    if find_spec("ray") and find_spec("multipart"):
        assert "is for segmentation" in error_of("serve", f"a={trained}", "--store", tmp_path / "store")
        assert not (tmp_path / "store").exists()


# ---- pictures


def test_a_large_picture_takes_memory_of_its_pixels_not_of_all_classes(config):
    """Its labels are those of all logits at its size."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.numbers = max(self.numbers, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    model = nn.Conv2d(3, 50, 3, padding=1)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    picture, prepare = Image.fromarray(pixels).resize((500, 400)), Preparation(config)
    with Largest() as largest:
        labels = predict_labels(model, picture, prepare)
    with torch.no_grad():
        logits = sliding_window(model, prepare.image(picture)[None], prepare.size)
    assert torch.equal(labels, F.interpolate(logits, (400, 500), mode="bilinear").argmax(1)[0])
    assert largest.numbers < 5 * 400 * 500
    with torch.no_grad():
        model.bias[3] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        predict_labels(model, picture, prepare)


def test_pictures_show_the_labels():
    labels = torch.tensor([[0, 1], [2, 300]])
    colours = palette(301)
    assert len(set(colours)) == 301
    assert np.asarray(mask_picture(labels, colours)).tolist() == labels.tolist()
    few = mask_picture(labels.clamp(max=2), colours[:3])
    assert few.mode == "P"
    assert np.asarray(few).tolist() == [[0, 1], [2, 2]]
    assert few.convert("RGB").getpixel((1, 0)) == colours[1]
    painted = np.asarray(overlay(Image.new("RGB", (2, 2), "white"), labels, colours))
    assert painted[0, 0].tolist() == [127, 127, 127]


def test_several_adapters_by_name(tmp_path):
    model, other = tiny_segmenter(), tiny_segmenter(seed=1)
    images = noise(2, *model.pretrained_cfg["input_size"])
    other.save_adapter(tmp_path)
    model.load_adapter(tmp_path, "other", check_backbone=False)
    model.add_adapter("more", num_classes=7)
    before = model(images)
    model.set_adapter("more")
    assert model(images).shape[1] == 7
    model.set_adapter("other")
    assert torch.equal(
        model.head.state_dict()["classifier.weight"], other.head.state_dict()["classifier.weight"]
    )
    assert not model(images).equal(before)
    with pytest.raises(NotImplementedError, match="call set_adapter"):
        model(images, adapter_names=["other", "default"])
    with model.disable_adapter(), pytest.raises(ValueError, match="has no classifier that was trained"):
        model(images)
