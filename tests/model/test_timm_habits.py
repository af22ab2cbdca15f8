"""What timm's scripts and users do with a model, done with ours."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import (
    get_deprecated_models,
    get_model_input_config,
    get_pretrained_cfg,
    group_parameters,
    resolve_model_input_args,
    save_for_hf,
)
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3, dispatch_clip_grad, unwrap_model
from tiny import assert_same, bare, randomize, run, tiny_backbone, tiny_images, tiny_model
from torch import Tensor, nn

import vapt_fast
from vapt_fast import AdaptiveViT, PromptConfig
from vapt_fast.backbones import timm_modules
from vapt_fast.names import DEMO_BACKBONE

VIT = "vit_tiny_patch16_224"
ARCHITECTURES = [
    VIT,
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "naflexvit_base_patch16_map",
]
TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": (32, 48)}
NO_DROPOUT = {"projector_dropout": 0.0, "channel_dropout": 0.0}
KINDS = {
    "adaptive": PromptConfig(num_prompts=3, projector_dim=4, **NO_DROPOUT),
    "deep": PromptConfig(kind="deep", num_prompts=3),
    "shallow": PromptConfig(kind="shallow", num_prompts=3),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vit() -> AdaptiveViT:
    return tiny_model(VIT)


def form(value: Any) -> Any:
    """What is left of a result without its numbers."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: form(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [form(item) for item in value]
    return type(value)


def flat(value: Any) -> dict[str, Tensor]:
    """Every tensor in a nest of lists and tuples, by its place."""
    if isinstance(value, Tensor):
        return {"": value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {f"{i}.{key}": tensor for i, item in items for key, tensor in flat(item).items()}


def in_new_process(script: str, *arguments: object, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- names


def test_every_architecture_is_registered() -> None:
    names = timm.list_models(module=timm_modules())
    ours = f"vapt_{DEMO_BACKBONE}"  # registered when it is first asked for
    assert set(timm.list_models("vapt_*")) - {ours} == {f"vapt_{name}" for name in names}
    assert not any(timm.is_model(f"vapt_{name}") for name in get_deprecated_models())
    tagged = [name for architecture in names for name in timm.list_pretrained(architecture)]
    assert set(timm.list_pretrained("vapt_*")) - {ours} == {f"vapt_{name}" for name in tagged}
    assert not any(name.startswith("vapt_") for name in vapt_fast.__all__)


def test_a_user_registers_a_model() -> None:
    script = """
import timm
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
import vapt_fast

def my_vit(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**options, **kwargs})

try:
    vapt_fast.registry.register("my_vit")
except ValueError as error:
    assert "register_model" in str(error)
register_model(my_vit)
vapt_fast.registry.register("my_vit")
try:
    vapt_fast.registry.register("vapt_my_vit")
except ValueError as error:
    assert "without 'vapt_'" in str(error)
model = timm.create_model("vapt_my_vit", num_prompts=3, num_classes=4)
assert isinstance(model, vapt_fast.AdaptiveViT) and model.num_classes == 4

import vapt_fast.demo
model = timm.create_model("vapt_vit_digits_patch4_32", pretrained=True, features_only=True)
print(model.feature_info.channels())
"""
    assert "[64, 64, 64]" in in_new_process(script)


def test_import_leaves_timm_alone() -> None:
    script = """
import sys
import timm
sys.modules["triton"] = None
before = set(timm.list_models()), set(timm.list_pretrained()), timm.models.get_deprecated_models()
import vapt_fast
after = set(timm.list_models()), set(timm.list_pretrained()), timm.models.get_deprecated_models()
assert before[0] < after[0] and before[1] < after[1] and before[2] == after[2]
timm.create_model("vapt_test_vit")
"""
    in_new_process(script)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_224.augreg_in21k", "test_vit"])
def test_pretrained_cfg_is_the_backbones(name: str) -> None:
    ours, theirs = get_pretrained_cfg(f"vapt_{name}").to_dict(), get_pretrained_cfg(name).to_dict()
    assert ours.pop("architecture") == f"vapt_{theirs.pop('architecture')}"
    assert ours == theirs


def test_create_model_passes_options_on() -> None:
    model = timm.create_model(
        "vapt_vit_tiny_patch16_224.augreg_in21k",
        **TINY,
        num_classes=7,
        in_chans=1,
        global_pool="avg",
        drop_rate=0.25,
        drop_path_rate=0.1,
        kind="deep",
        num_prompts=4,
        prompt_dropout=0.5,
        backend="torch",
    )
    assert isinstance(model, AdaptiveViT)
    assert model.config == PromptConfig(kind="deep", num_prompts=4, prompt_dropout=0.5)
    assert model.backend == "torch"
    assert model.backbone_name == "vit_tiny_patch16_224.augreg_in21k"
    assert (model.num_classes, model.in_chans, model.global_pool) == (7, 1, "avg")
    assert model.backbone.head_drop.p == 0.25
    assert model.grid == (2, 3)
    assert model(torch.zeros(2, 1, 32, 48)).shape == (2, 7)


OTHER_OPTIONS = {
    "kind": "shallow",
    "num_prompts": 4,
    "static_depth": 2,
    "conv_kernel": 1,
    "conv_padding": 1,
    "conv_shared": False,
    "projector_dim": 5,
    "projector_shared": False,
    "projector_activation": "gelu",
    "projector_dropout": 0.2,
    "projector_scale_learnable": True,
    "prompt_dropout": 0.2,
    "channel_dropout": 0.2,
    "pool_prompts": True,
    "add_table": True,
    "fourier_share": 0.5,
    "fourier_dims": "channel",
}


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(PromptConfig) if f.name != "kind_options"]
)
def test_create_model_takes_every_prompt_option(name: str) -> None:
    """timm drops keywords that are None, so 0 says it."""
    option = {name: OTHER_OPTIONS[name]}
    model = timm.create_model(f"vapt_{VIT}", **TINY, global_pool="avg", **option)
    assert model.config == PromptConfig(**option) != PromptConfig()
    if name in ("conv_kernel", "projector_dim"):
        model = timm.create_model(f"vapt_{VIT}", **TINY, **{name: 0})
        assert model.config == PromptConfig(**{name: None})


def test_create_model_takes_a_config() -> None:
    config = PromptConfig(kind="deep", num_prompts=4)
    assert timm.create_model(f"vapt_{VIT}", **TINY, prompts=config).config == config
    with pytest.raises(TypeError, match="got both"):
        timm.create_model(f"vapt_{VIT}", **TINY, prompts=config, num_prompts=2)


def test_create_model_refuses() -> None:
    with pytest.raises(RuntimeError, match="no_such_tag"):
        timm.create_model(f"vapt_{VIT}.no_such_tag")
    with pytest.raises(TypeError, match="num_prompt"):
        timm.create_model(f"vapt_{VIT}", **TINY, num_prompt=3)
    with pytest.raises(ValueError, match="num_prompts must be at least 0"):
        timm.create_model(f"vapt_{VIT}", **TINY, num_prompts=-1)


def test_features_only() -> None:
    """timm's feature extractor gives the taps of the same model, and nothing that isn't needed for them."""
    torch.manual_seed(0)
    options = {**TINY, "prompts": KINDS["deep"]}
    features = timm.create_model(f"vapt_{VIT}", **options, features_only=True, out_indices=[0, 1])
    assert features.feature_info.channels() == [32, 32]
    assert features.feature_info.reduction() == [16, 16]
    model = timm.create_model(f"vapt_{VIT}", **options)
    known = features.model.state_dict()
    assert not model.load_state_dict(known, strict=False).unexpected_keys
    images = torch.randn(2, 3, 32, 48)
    expected = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    got = features.train()(images)
    assert [tuple(feature.shape) for feature in got] == [(2, 32, 2, 3)] * 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
    sum(feature.square().sum() for feature in got).backward()
    learned = [parameter for parameter in features.parameters() if parameter.requires_grad]
    assert len(learned) == 2
    assert all(parameter.grad is not None for parameter in learned)


def test_pretrained_weights(tmp_path: Path) -> None:
    """A file of the backbone's weights takes the place of the download."""
    backbone = tiny_backbone(VIT, num_classes=1000).float()
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "mean": (0.1, 0.2, 0.3)}
    model = timm.create_model(
        f"vapt_{VIT}", pretrained=True, pretrained_cfg_overlay=overlay, **TINY, num_classes=3
    )
    for name, tensor in backbone.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(model.backbone.state_dict()[name], tensor), name
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)


def test_train_scripts_way_of_naming() -> None:
    """train.py resolves a name into a configuration first and creates the model from that."""
    arguments = resolve_model_input_args(f"vapt_{VIT}", num_classes=3, num_prompts=2)
    model = timm.create_model(**arguments, **TINY)
    assert model.backbone_name == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert model.config.num_prompts == 2


PUBLISHED = {
    "defaults": {},
    "other options": {"kind": "deep", "num_prompts": 3, "prompt_dropout": 0.5},
    "nothing": {"conv_kernel": 0, "projector_dim": 0},
    "everything": OTHER_OPTIONS | {"kind": "adaptive", "conv_kernel": 2},
    "another backbone": {"in_chans": 1, "embed_dim": 48, "img_size": 64},
}


@pytest.mark.parametrize("how", ["create_model", "AdaptiveViT", "timm model"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_by_timm_and_loaded_again(tmp_path: Path, name: str, how: str) -> None:
    options = {**TINY, "global_pool": "avg", "num_classes": 5, **PUBLISHED[name]}
    if how == "create_model":
        model = timm.create_model(f"vapt_{VIT}", **options)
    elif how == "AdaptiveViT":
        model = AdaptiveViT(VIT, **options)
    else:
        names = {field.name for field in dataclasses.fields(PromptConfig)} & options.keys()
        backbone = timm.create_model(VIT, **{k: v for k, v in options.items() if k not in names})
        model = AdaptiveViT(backbone, **{key: options[key] for key in names})
    randomize(model, 1)
    model.eval()
    save_for_hf(model, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == f"vapt_{VIT}"
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(again, AdaptiveViT)
    assert again.config == model.config
    assert_same(again.state_dict(), model.state_dict(), 0)
    images = tiny_images(model)
    assert torch.equal(again(images), model(images))
    untrained = timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
    assert (untrained.config, untrained.grid) == (model.config, model.grid)


def test_a_published_model_is_adapted(tmp_path: Path) -> None:
    """Other classes and another size than were published; and a published model given for a backbone."""
    model = timm.create_model(f"vapt_{VIT}", **TINY, num_classes=5)
    randomize(model, 1)
    save_for_hf(model, str(tmp_path))
    name = f"local-dir:{tmp_path}"
    other = timm.create_model(name, pretrained=True, num_classes=7)
    assert other(tiny_images(other)).shape == (2, 7)
    assert_same(other.prompts.state_dict(), model.prompts.state_dict(), 0)
    larger = timm.create_model(name, pretrained=True, img_size=(64, 96))
    model.set_input_size((64, 96))
    assert_same(larger.state_dict(), model.state_dict(), 0)
    with pytest.raises(ValueError, match=r"is a model with prompts already; make it by timm.create_model"):
        AdaptiveViT(name, pretrained=True)


# ---- attributes and methods, against the same timm model


@pytest.fixture
def pair(architecture: str) -> tuple[AdaptiveViT, nn.Module, Tensor]:
    """A model without prompts, timm's own, and images."""
    backbone = tiny_backbone(architecture)
    model = AdaptiveViT(backbone, prompts=PromptConfig(num_prompts=0)).eval()
    return model, backbone, tiny_images(model)


def prompted(model: AdaptiveViT) -> AdaptiveViT:
    """The same backbone with prompts."""
    return AdaptiveViT(bare(model), prompts=KINDS["adaptive"]).double().eval()


def test_attributes(pair: tuple) -> None:
    model, backbone, _ = pair
    names = ["num_classes", "num_features", "head_hidden_size", "embed_dim", "num_prefix_tokens", "in_chans"]
    for name in [*names, "global_pool"]:
        assert getattr(model, name) == getattr(backbone, name), name
    assert str(model.get_classifier()) == str(backbone.get_classifier())
    modules = dict(model.named_modules())
    assert len(model.feature_info) == len(backbone.feature_info)
    for ours, theirs in zip(model.feature_info, backbone.feature_info, strict=True):
        assert ours == theirs | {"module": f"backbone.{theirs['module']}"}
        assert ours["module"] in modules


def test_names_in_the_configuration(pair: tuple) -> None:
    model, backbone, images = pair
    assert model.default_cfg == model.pretrained_cfg
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for key in ("first_conv", "classifier"):
        names = model.pretrained_cfg[key]
        for name in (names,) if isinstance(names, str) else names:
            assert name in modules or f"{name}.weight" in parameters, name
    assert model.no_weight_decay() == {f"backbone.{name}" for name in backbone.no_weight_decay()}
    assert get_model_input_config(model)["input_size"] == tuple(images.shape[1:])
    data = resolve_model_data_config(model)
    assert data["input_size"] == tuple(images.shape[1:])
    assert data["mean"] == backbone.pretrained_cfg["mean"]


def test_forward_methods(pair: tuple) -> None:
    model, backbone, images = pair
    with torch.no_grad():
        features = backbone.forward_features(images)
        for actual, expected in [
            (model(images), backbone(images)),
            (model.forward_features(images), features),
            (model.forward_head(features), backbone.forward_head(features)),
            (model.forward_head(features, pre_logits=True), backbone.forward_head(features, pre_logits=True)),
        ]:
            assert_same({"": actual}, {"": expected}, 1e-12)
        with_prompts = prompted(model)
        assert form(with_prompts.forward_features(images)) == form(features)
        whole = with_prompts.forward_head(with_prompts.forward_features(images))
        assert_same({"": with_prompts(images)}, {"": whole}, 1e-12)


def test_pool(pair: tuple) -> None:
    model, backbone, images = pair
    with torch.no_grad():
        features = model.forward_features(images)
        pooled = model.pool(features)
        if hasattr(backbone, "head_dist"):  # its heads read one token each
            expected = features[:, 0]
        else:
            pooled, expected = backbone.fc_norm(pooled), model.forward_head(features, pre_logits=True)
        assert_same({"": pooled}, {"": expected}, 1e-12)
        if getattr(backbone, "attn_pool", None) is None:
            patches = features[:, model.num_prefix_tokens :]
            assert_same({"": model.pool(features, "avg")}, {"": patches.mean(dim=1)}, 1e-12)


@pytest.mark.parametrize(
    "indices", [None, [0, 2], *(pytest.param(some, marks=pytest.mark.full) for some in (2, [1]))], ids=str
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": True},
        {"return_prefix_tokens": True},
        {"output_fmt": "NLC", "return_prefix_tokens": True, "norm": True},
        {"intermediates_only": True, "stop_early": True},
        {"stop_early": True},
    ],
    ids=str,
)
def test_forward_intermediates(pair: tuple, indices: Any, options: dict[str, Any]) -> None:
    model, backbone, images = pair
    with torch.no_grad():
        expected = backbone.forward_intermediates(images, indices, **options)
        actual = model.forward_intermediates(images, indices, **options)
        assert form(actual) == form(expected)
        assert_same(flat(actual), flat(expected), 1e-12)
        assert form(prompted(model).forward_intermediates(images, indices, **options)) == form(expected)


@pytest.mark.parametrize("architecture", [VIT, "vit_base_patch16_siglip_224", "naflexvit_base_patch16_map"])
@pytest.mark.parametrize(
    "options", [{"norm": True, "return_prefix_tokens": True}, {"intermediates_only": True}], ids=str
)
def test_intermediates_as_a_dict(pair: tuple, options: dict[str, Any]) -> None:
    test_forward_intermediates(pair, [0, 2], options | {"output_dict": True})


def test_intermediates_are_those_of_the_forward_pass(pair: tuple) -> None:
    model, _, images = pair
    model = prompted(model)
    with torch.no_grad():
        final, taken = model.forward_intermediates(images, norm=True, output_fmt="NLC")
        assert_same({"": final}, {"": model.forward_features(images)}, 1e-12)
        assert_same({"": taken[-1]}, {"": final[:, model.num_prefix_tokens :]}, 1e-12)
        with vapt_fast.use_backend("reference"):
            literal = model.forward_intermediates(images, norm=True, output_fmt="NLC")
        assert_same(flat((final, taken)), flat(literal), 1e-9)


@pytest.mark.parametrize("options", [{}, {"n": 2, "norm": True}, {"n": [0, 1], "reshape": True}], ids=str)
@pytest.mark.parametrize("name", [VIT, "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"])
def test_get_intermediate_layers(name: str, options: dict[str, Any]) -> None:
    model = AdaptiveViT(tiny_backbone(name), prompts=PromptConfig(num_prompts=0)).eval()
    images = tiny_images(model)
    with torch.no_grad():
        for prefix in (False, True):
            expected, actual = (
                it.get_intermediate_layers(images, **options, return_prefix_tokens=prefix)
                for it in (model.backbone, model)
            )
            assert form(list(actual)) == form(list(expected))
            assert_same(flat(actual), flat(expected), 1e-12)


@pytest.mark.parametrize("prune", [{}, {"prune_norm": True}, {"prune_head": False}], ids=str)
def test_prune_intermediate_layers(architecture: str, prune: dict[str, bool]) -> None:
    model, theirs = tiny_model(architecture), tiny_backbone(architecture)
    images = tiny_images(model)
    with torch.no_grad():
        before = model.forward_intermediates(images, [1], intermediates_only=True)
    assert (
        model.prune_intermediate_layers([1], **prune) == theirs.prune_intermediate_layers([1], **prune) == [1]
    )
    assert len(model.backbone.blocks) == len(model.prompts.blocks) == 2
    with torch.no_grad():
        after = model.forward_intermediates(images, [1], intermediates_only=True)
        assert_same(flat(after), flat(before), 1e-12)
        assert form(model(images)) == form(theirs(images))
    if not prune.get("prune_head", True):
        assert_same(run(model, images), run(model, images, "reference"))


def test_reset_classifier(architecture: str) -> None:
    model, theirs = tiny_model(architecture), tiny_backbone(architecture)
    images = tiny_images(model)
    for num_classes, pool in [(5, None), (0, None), (4, "token" if "distilled" in architecture else "avg")]:
        model.train().reset_classifier(num_classes, pool)
        theirs.reset_classifier(num_classes, pool)
        model.double()
        assert model.num_classes == num_classes
        assert model.global_pool == theirs.global_pool
        with torch.no_grad():
            assert model.eval()(images).shape == theirs.double()(images).shape
        head = [p for name, p in model.named_parameters() if ".head" in name]
        assert all(p.requires_grad for p in head)
        assert bool(head) == (num_classes > 0)
        assert list(model.trainable_parameters())
    assert_same(run(model, images), run(model, images, "reference"))


def test_reset_classifier_refuses(vit: AdaptiveViT) -> None:
    before = vit.state_dict()
    with pytest.raises(ValueError, match="at least 0"):
        vit.reset_classifier(-1)
    with pytest.raises(TypeError, match="int"):
        vit.reset_classifier("10")
    with pytest.raises(ValueError, match="global_pool"):
        vit.reset_classifier(4, "map")
    assert_same(vit.state_dict(), before, 0)


# ---- input size


def test_set_input_size(architecture: str) -> None:
    model = tiny_model(architecture)
    height, width = (side // cells for side, cells in zip(tiny_images(model).shape[-2:], (2, 3), strict=True))
    model.set_input_size((4 * height, 3 * width))
    assert model.grid == (4, 3)
    images = tiny_images(model)
    assert images.shape[-2:] == (4 * height, 3 * width)
    assert model.prompts.blocks[1].token_projection.in_features == 3 * 2
    assert_same(run(model, images), run(model, images, "reference"))
    assert all(p.requires_grad for p in model.prompts.parameters())
    again = AdaptiveViT(tiny_backbone(architecture), prompts=model.config).double().eval()
    again.set_input_size((4 * height, 3 * width))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_same({"": again(images)}, {"": model(images)}, 0)


def test_set_input_size_unchanged(architecture: str) -> None:
    model = tiny_model(architecture)
    before, parameters = run(model, tiny_images(model)), list(model.parameters())
    model.set_input_size(tuple(tiny_images(model).shape[-2:]))
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert_same(run(model, tiny_images(model)), before, 0)


def test_set_input_size_keeps_what_is_uniform() -> None:
    """A prompt is a sum over positions: the same weight everywhere keeps giving the mean."""
    model = tiny_model(VIT, prompts=PromptConfig(num_prompts=3, conv_kernel=None, static_depth=0))
    projection = model.prompts.blocks[0].token_projection
    with torch.no_grad():
        projection.weight.fill_(1 / 6)
    model.set_input_size((64, 64))
    expected = torch.full((3, 16), 1 / 16, dtype=torch.float64)
    weight = model.prompts.blocks[0].token_projection.weight
    assert_same({"": weight}, {"": expected}, 1e-6)  # timm resamples in float32


@pytest.mark.parametrize(
    ("size", "error"), [((33, 48), ValueError), ((16, 48), ValueError), ("32", TypeError)]
)
def test_set_input_size_changes_all_or_nothing(vit: AdaptiveViT, size: Any, error: type) -> None:
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    with pytest.raises(error, match=r"img_size|conv_kernel=2"):
        vit.set_input_size(size)
    assert_same(vit.state_dict(), before, 0)
    assert vit.grid == (2, 3)
    vit(tiny_images(vit))


def test_other_sizes_are_refused(architecture: str) -> None:
    model = tiny_model(architecture)
    images = tiny_images(model)
    with pytest.raises(ValueError, match="set_input_size"):
        model(images.transpose(2, 3))


# ---- training


def test_train_mode(architecture: str) -> None:
    model = tiny_model(architecture, drop_rate=0.1)
    assert model.train() is model
    assert model.training
    assert model.prompts.training
    assert {name for name, module in model.backbone.named_modules() if module.training} == {"head_drop"}
    assert all(module.training for module in model.adapters.modules())
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    assert model.train(False) is model
    assert not model.training


def test_backbone_is_deterministic_in_training() -> None:
    config = PromptConfig(num_prompts=3, **NO_DROPOUT)
    rates = {"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "pos_drop_rate": 0.5}
    model = tiny_model(VIT, prompts=config, **rates).train()
    images = tiny_images(model)
    assert_same(run(model, images, seed=1), run(model, images, seed=2), 0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradient_checkpointing(architecture: str, backend: str) -> None:
    config = PromptConfig(num_prompts=3, projector_dim=4)
    model = tiny_model(architecture, prompts=config).train()
    images = tiny_images(model)
    expected = run(model, images, backend, seed=3)
    saved = {}
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        ):
            assert_same(run(model, images, backend, seed=3), expected, 1e-12)
        saved[enable] = sum(kept)
    assert saved[True] < saved[False], "nothing was recomputed"


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher(architecture: str, coarse: bool) -> None:
    """timm's groups of the backbone stay what they are; prompts go with their block."""
    model = tiny_model(architecture)
    theirs = group_parameters(model.backbone, model.backbone.group_matcher(coarse), reverse=True)
    ours = group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert ours.keys() == dict(model.named_parameters()).keys()
    for name, group in theirs.items():
        assert ours[f"backbone.{name}"] == group, name
    if not coarse:
        for name, group in ours.items():
            if name.startswith("prompts.blocks."):
                index = name.split(".")[2]
                assert group == ours[f"backbone.blocks.{index}.norm2.weight"], name


def test_layer_decay(vit: AdaptiveViT) -> None:
    optimizer = create_optimizer_v2(vit, "momentum", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in vit.named_parameters() if p.requires_grad}
    assert scales.keys() == {id(p) for p in trainable.values()}
    by_block = [scales[id(vit.prompts.blocks[0].table)]]
    by_block += [scales[id(vit.prompts.blocks[i].kernel)] for i in (1, 2)]
    assert by_block[1] == 2 * by_block[0]
    assert by_block[2] == 2 * by_block[1]
    assert scales[id(vit.head.weight)] == 1


@pytest.mark.parametrize("name", ["momentum", "sgd", "adamw", "lamb", "muon"])
def test_optimizers(name: str, vit: AdaptiveViT) -> None:
    images = tiny_images(vit)
    optimizer = create_optimizer_v2(vit, name, lr=0.1, weight_decay=0.1, momentum=0.9)
    before = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    run(vit, images)
    optimizer.step()
    changed = {key for key, tensor in vit.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key, p in vit.named_parameters() if p.requires_grad}
    assert_same(run(vit, images), run(vit, images, "reference"))


def test_adaptive_clipping_leaves_the_head(vit: AdaptiveViT) -> None:
    """timm clips all parameters but the last two, which it takes for the classifier."""
    parameters = list(vit.parameters())
    assert parameters[-2] is vit.head.weight
    assert parameters[-1] is vit.head.bias
    gradients = run(vit, tiny_images(vit))
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    dispatch_clip_grad(parameters[:-2], 1e-4, mode="agc")
    changed = {name for name, gradient in gradients.items() if not torch.equal(gradient, before[name])}
    assert changed == {name for name in gradients if ".prompts." in name}


# ---- copies and checkpoints


def through_a_file(model: AdaptiveViT) -> AdaptiveViT:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it)), through_a_file])
def test_copies(vit: AdaptiveViT, make: Any) -> None:
    images = tiny_images(vit)
    expected = run(vit, images)
    duplicate = make(vit)
    assert_same(run(duplicate, images), expected, 0)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert_same(run(vit, images), expected, 0)


def test_state_dict_is_whole(architecture: str) -> None:
    model = tiny_model(architecture)
    names = model.state_dict().keys()
    assert {name for name in names if name.startswith("backbone.")} == {
        f"backbone.{name}" for name in model.backbone.state_dict()
    }
    other = tiny_model(architecture, seed=10)
    images = tiny_images(model)
    run(other, images)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same(run(other, images), run(model, images), 0)


def test_unwrap(vit: AdaptiveViT) -> None:
    assert unwrap_model(vit) is vit
    wrapped = nn.Module()
    wrapped.module = vit
    assert unwrap_model(wrapped) is vit
    assert unwrap_model(torch.compile(vit, backend="eager")) is vit


@pytest.mark.parametrize("average", [ModelEmaV2, ModelEmaV3])
def test_moving_average(vit: AdaptiveViT, average: type) -> None:
    images = tiny_images(vit)
    start = copy.deepcopy(vit)
    ema = average(vit, decay=0.75)
    run(vit, images)
    create_optimizer_v2(vit, "momentum", lr=0.1, momentum=0.9).step()
    ema.update(vit)
    for (name, old), new, mean in zip(
        start.named_parameters(), vit.parameters(), ema.module.parameters(), strict=True
    ):
        assert_same({name: mean}, {name: 0.75 * old + 0.25 * new}, 1e-12)
    assert_same(run(ema.module, images), run(ema.module, images, "reference"))


def test_checkpoints(tmp_path: Path) -> None:
    model = tiny_model(VIT)
    images = tiny_images(model)
    optimizer = create_optimizer_v2(model, "momentum", lr=0.1, momentum=0.9)
    ema = ModelEmaV3(model, decay=0.5)
    run(model, images)
    optimizer.step()
    ema.update(model)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.0)

    resumed = tiny_model(VIT, seed=10)
    optimizer_again = create_optimizer_v2(resumed, "momentum", lr=0.1, momentum=0.9)
    timm.models.resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer=optimizer_again)
    assert_same(resumed.state_dict(), model.state_dict(), 0)
    for network, algorithm in ((model, optimizer), (resumed, optimizer_again)):
        run(network, images)
        algorithm.step()
    assert_same(resumed.state_dict(), model.state_dict(), 0)

    averaged = tiny_model(VIT, seed=10)
    timm.models.load_checkpoint(averaged, str(tmp_path / "last.pth.tar"), use_ema=True)
    assert_same(averaged.state_dict(), ema.module.state_dict(), 0)


# ---- formats and precisions


def test_channels_last(architecture: str) -> None:
    model = tiny_model(architecture)
    images = tiny_images(model)
    expected = run(model, images)
    model.to(memory_format=torch.channels_last)
    assert_same(run(model, images.to(memory_format=torch.channels_last)), expected, 1e-12)


def assert_rounded(model: AdaptiveViT, images: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Rounding costs no more than twice what it costs the literal method."""
    fast, literal = (run(model, images, backend) for backend in ("torch", "reference"))
    assert fast["logits"].dtype == literal["logits"].dtype == bare(model)(images).dtype
    error, literal_error = ((result["logits"] - exact).abs().max() for result in (fast, literal))
    assert error <= 2 * literal_error + 2 * torch.finfo(dtype).eps * exact.abs().max()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert fast[name].dtype == parameter.dtype, name
            assert fast[name].isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(architecture: str, dtype: torch.dtype, kind: str) -> None:
    model = tiny_model(architecture, prompts=KINDS[kind]).float()
    images = tiny_images(model)
    exact = run(model, images)["logits"]
    with torch.autocast("cpu", dtype=dtype):
        assert_rounded(model, images, exact, dtype)


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "backbone only"])
def test_low_precision(architecture: str, whole: bool) -> None:
    """--model-dtype converts everything; a bfloat16 backbone keeps float32 prompts."""
    model = tiny_model(architecture)
    images = tiny_images(model)
    exact = run(model, images)["logits"]
    model = model.to(torch.bfloat16)
    if not whole:
        model.prompts.float()
    assert_rounded(model, images.bfloat16(), exact, torch.bfloat16)
    assert model(images.bfloat16()).dtype == torch.bfloat16


def test_mixed_precision_needs_autocast(architecture: str) -> None:
    model = tiny_model(architecture)
    images = tiny_images(model)
    with pytest.raises((TypeError, RuntimeError), match=r"dtype"):
        model(images.float())
    with pytest.raises((TypeError, RuntimeError), match=r"dtype"):
        model.bfloat16()(images)


# ---- a whole training run out of timm's parts


def test_training_run(tmp_path: Path) -> None:
    """Dataset, loader, task, optimizer, schedule, average, clipping and checkpoints, as in train.py."""
    for label in range(2):
        for split in ("train", "val"):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for index in range(4):
                color = (10 * index, 200 * label, 100)
                Image.new("RGB", (48, 32), color).save(folder / f"{index}.png")

    torch.manual_seed(0)
    model = timm.create_model(
        f"vapt_{VIT}",
        **TINY,
        num_classes=2,
        num_prompts=3,
        drop_rate=0.1,
        drop_path_rate=0.1,
        global_pool="avg",
    )
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    data = resolve_model_data_config(model)
    loaders = {}
    for split in ("train", "val"):
        dataset = create_dataset("", root=str(tmp_path), split=split)
        loaders[split] = create_loader(
            dataset,
            batch_size=4,
            is_training=split == "train",
            use_prefetcher=False,
            num_workers=0,
            persistent_workers=False,
            **{key: data[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")},
        )
    optimizer = create_optimizer_v2(model, "momentum", lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=4, warmup_epochs=1)
    task = ClassificationTask(model)
    task.setup_ema(decay=0.5)
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(tmp_path))
    losses = []
    for epoch in range(epochs):
        task.train()
        for images, labels in loaders["train"]:
            optimizer.zero_grad()
            loss = task(images, labels)["loss"]
            loss.backward()
            dispatch_clip_grad(list(model.parameters())[:-2], 0.1, mode="agc")
            optimizer.step()
            task.update_ema()
        scheduler.step(epoch + 1)
        model.eval()
        with torch.no_grad():
            losses.append(sum(F.cross_entropy(model(x), y).item() for x, y in loaders["val"]))
        saver.save_checkpoint(epoch, metric=-losses[-1])
    assert losses[-1] < losses[0]
    assert_same({name: p for name, p in model.named_parameters() if name in frozen}, frozen, 0)
    again = timm.create_model(
        f"vapt_{VIT}", **TINY, num_classes=2, num_prompts=3, global_pool="avg",
        checkpoint_path=str(tmp_path / "last.pth.tar"),
    )  # fmt: skip
    assert_same(again.state_dict(), unwrap_model(task.get_trainable_module(ema=True)).state_dict(), 0)
