"""Adapters that are saved and loaded: round trips, misfits, what is refused when saving."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from small_adapters import SMALL, WEIGHTS, learned, make_backbone, make_model, same, timm_model
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from vapt_fast import AdapterError, AdapterStack, AdaptiveViT, adapters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of ``make_model()``."""
    make_model().save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- round trips

ROUND_TRIPS = [
    ({}, {}),
    ({"num_prompts": 0}, {}),
    ({"kind": "deep"}, {}),
    ({"kind": "shallow"}, {}),
    ({"static_depth": 0, "conv_kernel": None}, {}),
    ({"static_depth": 2, "conv_kernel": 3, "conv_padding": 1}, {}),
    ({"conv_shared": False, "projector_dim": None}, {}),
    ({"projector_shared": False}, {}),
    ({"projector_scale_learnable": True, "projector_activation": "gelu"}, {}),
    ({"projector_scale_learnable": True, "projector_shared": False}, {}),
    ({"projector_dropout": 0.0, "prompt_dropout": 0.3, "channel_dropout": 0.2}, {}),
    ({"pool_prompts": True}, {"global_pool": "avg"}),
    ({}, {"global_pool": "map", "class_token": False}),
    ({}, {"num_classes": 0}),
    ({}, {"reg_tokens": 2}),
    ({}, {"img_size": (16, 24), "patch_size": (8, 4)}),
    ({}, {"family": VisionTransformerDistilled}),
]

# The names are promised; see vapt_fast.adapters.file.
_PROJECTOR = r"projector\.(down\.weight|up\.weight|scale)"
_BLOCK = rf"(table|norm\.(weight|bias)|kernel|token_projection\.(weight|bias)|{_PROJECTOR})"
PROMISED = re.compile(rf"prompts\.(blocks\.\d+\.{_BLOCK}|{_PROJECTOR})|head(_dist)?\.(weight|bias)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("prompts", "backbone"), ROUND_TRIPS, ids=str)
def test_round_trip(tmp_path: Path, prompts: dict, backbone: dict, dtype: torch.dtype) -> None:
    config = replace(SMALL, **prompts)
    model = make_model(config, **backbone).to(dtype).eval()
    model.save_adapter(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert same(tensors, learned(model))
    assert [name for name in tensors if not PROMISED.fullmatch(name)] == []

    other = make_model(config, seed=1, **backbone).to(dtype).eval()
    other.load_adapter(tmp_path)
    built = AdaptiveViT.from_adapter(tmp_path, backbone=make_backbone(**backbone).to(dtype)).to(dtype).eval()
    assert built.config == config
    images = torch.randn(2, *model.pretrained_cfg["input_size"], dtype=dtype)
    for one in (other, built):
        assert same(one.state_dict(), model.state_dict())
        assert torch.equal(one(images), model(images))


@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_a_model_keeps_its_dtype(tmp_path: Path, saved: torch.dtype, loaded: torch.dtype) -> None:
    saving, model = make_model().to(saved), make_model(seed=1).to(loaded)
    saving.save_adapter(tmp_path)
    # The float32 copy of a bfloat16 backbone counts as the same one, and the other way round.
    if loaded == torch.float32:
        model.backbone.to(torch.bfloat16).to(torch.float32)
    model.load_adapter(tmp_path)
    assert same(learned(model), {name: value.to(loaded) for name, value in learned(saving).items()})


def test_odd_values_and_dtypes_come_back(tmp_path: Path) -> None:
    model = AdaptiveViT(make_backbone().bfloat16(), prompts=SMALL)  # whose prompts are in float32
    with torch.no_grad():
        model.prompts.blocks[0].table.copy_(torch.tensor([float("nan"), float("inf"), -0.0, 1e-45] * 2))
    model.save_adapter(tmp_path)
    built = AdaptiveViT.from_adapter(tmp_path, backbone=make_backbone().bfloat16())
    assert same(built.state_dict(), model.state_dict())
    assert built.prompts.blocks[0].table.dtype == torch.float32


def test_parameters_stay_and_dropout_rates_may_differ(folder: Path) -> None:
    model = make_model(replace(SMALL, channel_dropout=0.0, prompt_dropout=0.5, projector_dropout=0.0), seed=1)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model()))
    for now, (then, trained) in zip(model.parameters(), before, strict=True):
        assert now is then
        assert now.requires_grad == trained


def test_buffers_of_the_head_belong_to_the_adapter(tmp_path: Path) -> None:
    def with_norm(seed: int) -> AdaptiveViT:
        backbone = timm_model()
        torch.manual_seed(seed)
        backbone.head = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 3))
        return AdaptiveViT(backbone, prompts=SMALL)

    model = with_norm(1).train()
    before = adapters.backbone_fingerprint(model)
    model(torch.randn(8, 3, 32, 32))
    assert adapters.backbone_fingerprint(model) == before
    model.save_adapter(tmp_path)
    other = with_norm(2)
    other.load_adapter(tmp_path)
    assert same(other.state_dict(), model.state_dict())
    assert other.head[0].num_batches_tracked == 1


class Cosine(nn.Linear):
    """A head with the tensors of a Linear, which computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(input), self.weight, self.bias)


def test_a_head_of_a_users_own_class_never_becomes_a_linear(tmp_path: Path) -> None:
    backbone = timm_model()
    model, other = (AdaptiveViT(backbone, prompts=SMALL).eval() for _ in range(2))
    model.head = Cosine(24, 3)
    model.save_adapter(tmp_path)
    message = "head: the adapter has a Cosine, the model a Linear"
    with pytest.raises(AdapterError, match=message):
        AdaptiveViT.from_adapter(tmp_path, backbone=backbone)
    for name in ("default", "new"):
        with pytest.raises(AdapterError, match=message):
            other.load_adapter(tmp_path, name)
    with pytest.raises(AdapterError, match=message):
        AdapterStack(other, capacity=1).load_adapter(tmp_path, name="new")
    other.head = Cosine(24, 3)
    other.load_adapter(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(images), model(images))


def test_a_head_that_is_parametrised_stays_a_linear() -> None:
    model = AdaptiveViT(timm_model(), prompts=SMALL)
    register_parametrization(model.head, "weight", nn.Identity())
    assert model.adapters["default"].head_classes() == {"head": "Linear"}


# ---- class names and the preparation of images


def test_class_names_and_data_config_travel(tmp_path: Path) -> None:
    model = AdaptiveViT(timm_model(), prompts=SMALL)
    model.save_adapter(tmp_path)
    data = {
        "input_size": [3, 32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    assert adapters.read_config(tmp_path)["data"] == data
    given = {"mean": (0.1, 0.2, 0.3), "crop_pct": np.float32(1.0), "crop_mode": "squash"}
    model.save_adapter(tmp_path, class_names=np.array(["ant", "bee", "cat"]), data_config=given)
    data |= {"mean": [0.1, 0.2, 0.3], "crop_pct": 1.0, "crop_mode": "squash"}
    for _ in range(2):
        config = adapters.read_config(tmp_path)
        assert (config["class_names"], config["data"]) == (["ant", "bee", "cat"], data)
        model = AdaptiveViT.from_adapter(tmp_path, backbone=timm_model())
        assert model.class_names == ("ant", "bee", "cat")
        model.save_adapter(tmp_path)
    model.set_input_size((64, 64))
    model.save_adapter(tmp_path)
    assert adapters.read_config(tmp_path)["data"]["input_size"] == [3, 64, 64]
    model.reset_classifier(3)
    assert model.class_names is None  # a new head means other classes


def test_transform_is_timms(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    image, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    model = AdaptiveViT(timm_model(), prompts=SMALL)
    config = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    assert torch.equal(model.transform()(image), timm.data.create_transform(**config)(image))
    model.save_adapter(tmp_path, data_config={"crop_mode": "squash", "std": [1, 1, 2]})
    config |= {"crop_mode": "squash", "std": (1.0, 1.0, 2.0)}
    transform = AdaptiveViT.from_adapter(tmp_path, backbone=timm_model()).transform()
    assert torch.equal(transform(image), timm.data.create_transform(**config)(image))
    assert torch.equal(transform(grey), transform(grey.convert("RGB")))


def test_transform_for_other_channels() -> None:
    image = Image.fromarray(np.full((40, 40, 3), 255, dtype=np.uint8))
    model = AdaptiveViT(timm_model(in_chans=1), prompts=SMALL)
    assert torch.equal(model.transform()(image), torch.ones(1, 32, 32))
    with pytest.raises(ValueError, match="images of 5 channels, which PIL does not have"):
        AdaptiveViT(timm_model(in_chans=5), prompts=SMALL).transform()


# ---- what is refused when saving


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": [1]}, "metadata must be a dict, got list"),
        ({"metadata": {"seen": {1, 2}}}, "metadata must be made of what JSON knows: Object of type set"),
        (
            {"metadata": {"loss": float("nan")}},
            "metadata must be made of what JSON knows: Out of range",
        ),
        ({"class_names": ["a", "b"]}, "class_names must be 3, one a class, got 2"),
        ({"class_names": "abc"}, "class_names must be a list of str, got 'abc'"),
        ({"class_names": ["a", "b", 3]}, r"class_names must be str, got \[3\]"),
        ({"data_config": ["mean"]}, "data_config must be a dict, got list"),
        ({"data_config": {"means": [0, 0, 0]}}, r"unknown keys \['means'\]"),
        ({"data_config": {"mean": [0, 0]}}, "mean must be 3 numbers, one a channel"),
        ({"data_config": {"mean": [0, 0, float("nan")]}}, "mean must be finite"),
        ({"data_config": {"std": [1, 1, 0]}}, "std must be positive"),
        ({"data_config": {"interpolation": "cubic"}}, "interpolation must be one of"),
        ({"data_config": {"crop_mode": "random"}}, "crop_mode must be one of"),
        ({"data_config": {"crop_pct": -1.0}}, "crop_pct must be positive"),
        ({"data_config": {"input_size": (3, 64, 64)}}, r"input_size must be the model's \[3, 16, 16\]"),
    ],
    ids=str,
)
def test_what_cannot_be_saved(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make_model().save_adapter(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_trained_backbone_is_not_dropped_in_silence(tmp_path: Path) -> None:
    model = make_model()
    model.backbone.cls_token.requires_grad_(True)
    model.backbone.norm.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"backbone.cls_token is trainable") as raised:
        model.save_adapter(tmp_path / "new")
    assert len(raised.value.problems) == 3
    assert not (tmp_path / "new").exists()


# ---- misfits


def assert_refused(model: AdaptiveViT, folder: Path, *parts: str) -> AdapterError:
    """Loading fails with a message that has all these parts, and changes nothing."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError) as raised:
        model.load_adapter(folder)
    for part in parts:
        assert part in str(raised.value)
    assert same(model.state_dict(), before)
    return raised.value


def test_every_mismatch_is_listed(folder: Path) -> None:
    config = replace(SMALL, num_prompts=4, conv_kernel=3, projector_dim=None)
    model = make_model(config, embed_dim=12, depth=4, num_classes=7, global_pool="avg")
    error = assert_refused(
        model,
        folder,
        "backbone depth: the adapter was made for 3, the model has 4",
        "backbone dim: the adapter was made for 8, the model has 12",
        "backbone global_pool: the adapter was made for 'token', the model has 'avg'",
        "prompts num_prompts: the adapter has 2, the model 4",
        "prompts conv_kernel: the adapter has 2, the model 3",
        "prompts projector_dim: the adapter has 2, the model None",
        "num_classes: the adapter has 3, the model 7; call model.reset_classifier(3) first",
        "prompts.blocks.0.table: shape (2, 8), the model has (4, 12)",
        "prompts.blocks.3.norm.weight: the adapter has no such tensor",
        "prompts.projector.down.weight: the model has no such tensor",
    )
    assert len(error.problems) == len(str(error).splitlines()) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"img_size": 20},
            "made for images of 16x16 pixels, the model takes 20x20; load it into a model of its size, then "
            "call model.set_input_size((20, 20))",
        ),
        ({"img_size": 32, "patch_size": 8}, "backbone patch_size: the adapter was made for [4, 4]"),
        ({"reg_tokens": 1}, "backbone num_prefix_tokens: the adapter was made for 1, the model has 2"),
        ({"seed": 1}, "fingerprints differ"),
        ({"init_values": 1.0}, "fingerprints differ"),
        ({"mlp_ratio": 2.0}, "fingerprints differ"),
    ],
    ids=str,
)
def test_wrong_backbone(folder: Path, options: dict[str, Any], message: str) -> None:
    model = AdaptiveViT(make_backbone(**options), prompts=SMALL)
    assert len(assert_refused(model, folder, message).problems) == 1
    # Also if it is to be made of a timm model, which is handed back as it was.
    backbone = make_backbone(num_classes=7, **options)
    head = backbone.head
    with pytest.raises(AdapterError, match=re.escape(message)):
        AdaptiveViT.from_adapter(folder, backbone=backbone)
    assert backbone.head is head


def test_check_backbone_can_be_left_out(folder: Path) -> None:
    model = AdaptiveViT(make_backbone(seed=1), prompts=SMALL)
    model.load_adapter(folder, check_backbone=False)
    assert same(learned(model), learned(make_model()))
    half = make_model(seed=1).half()
    assert_refused(half, folder, "check_backbone=False", "float16")
    half.load_adapter(folder, check_backbone=False)
    with pytest.raises(AdapterError, match=r"meta device; call model.to_empty"):
        make_model().to("meta").load_adapter(folder, check_backbone=False)


def test_the_fingerprint_sees_every_frozen_tensor() -> None:
    fingerprint = adapters.backbone_fingerprint
    expected = fingerprint(make_model())
    for same_backbone in (make_model(seed=5), make_model(num_classes=9), make_model().to(torch.bfloat16)):
        assert fingerprint(same_backbone) == expected
    model = make_model()
    model.backbone.register_buffer("scale", torch.ones(1))
    assert fingerprint(model) != expected
    for name, parameter in make_model().named_parameters():
        changed = make_model()
        with torch.no_grad():
            changed.get_parameter(name).flatten()[-1] += 1
        assert (fingerprint(changed) == expected) == parameter.requires_grad


def test_other_number_of_classes(folder: Path) -> None:
    model = make_model(num_classes=7)
    assert_refused(model, folder, "call model.reset_classifier(3) first", "head.weight: shape (3, 8)")
    model.reset_classifier(3)
    model.load_adapter(folder)
    built = AdaptiveViT.from_adapter(folder, backbone=make_backbone(num_classes=7))
    assert built.num_classes == 3
    assert same(learned(built), learned(model))


def test_trainable_summary() -> None:
    model = make_model()
    own = sum(parameter.numel() for parameter in model.trainable_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.trainable_summary() == f"trainable: {own:,} of {total:,} parameters ({own / total:.2%})"
    assert adapters.trainable_summary(nn.Identity()) == "trainable: 0 of 0 parameters (0.00%)"


def test_a_head_of_ones_own(tmp_path: Path) -> None:
    def make() -> AdaptiveViT:
        model = make_model()
        model.head = nn.Sequential(nn.Linear(model.head.in_features, 4), nn.ReLU(), nn.Linear(4, 3))
        return model

    model, other = make(), make()
    model.save_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"set model\.head"):
        make_model().load_adapter(tmp_path)
    other.load_adapter(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.head.parameters(), other.head.parameters(), strict=True)
    )
