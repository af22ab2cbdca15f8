"""Adapter files: round trips, misfits, damaged files, interrupted saves."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vapt_fast
from vapt_fast import AdapterError, AdaptiveViT, BackendUnavailable, PromptConfig, adapters

CONFIG, WEIGHTS = adapters.CONFIG_NAME, adapters.WEIGHTS_NAME
VIT = {"img_size": 16, "patch_size": 4, "num_classes": 3, "embed_dim": 8, "depth": 3, "num_heads": 2}
SMALL = PromptConfig(num_prompts=2, projector_dim=2)


def make_backbone(
    seed: int = 0, family: type = VisionTransformer, num_classes: int = 3, **options: Any
) -> nn.Module:
    torch.manual_seed(seed)
    backbone = family(**VIT | options)
    if num_classes != backbone.num_classes:
        backbone.reset_classifier(num_classes)
    return backbone


def make_model(config: PromptConfig = SMALL, seed: int = 0, **options: Any) -> AdaptiveViT:
    """A tiny model: the seed is that of what it has learned, the backbone is always the same."""
    model = AdaptiveViT(make_backbone(**options), prompts=config)
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        for _, parameter in model.named_adapter_parameters():
            parameter.normal_()
    return model


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_adapter_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit-equal, NaN included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].flatten().view(torch.uint8).equal(right[name].flatten().view(torch.uint8))
        for name in left
    )


def snapshot(model: AdaptiveViT) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, copy.deepcopy(model.adapter_metadata)


def assert_unchanged(model: AdaptiveViT, before: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    state, metadata = snapshot(model)
    assert same(state, before[0])
    assert metadata == before[1]


def assert_refused(model: AdaptiveViT, folder: Path, *parts: str, **options: Any) -> AdapterError:
    """Loading fails with a message that has all these parts, and changes nothing."""
    before = snapshot(model)
    with pytest.raises(AdapterError) as raised:
        model.load_adapter(folder, **options)
    for part in parts:
        assert part in str(raised.value)
    assert_unchanged(model, before)
    return raised.value


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None], *, checksum: bool = True) -> None:
    """Forge an adapter: change its config in both files, and make the checksum right."""
    weights = (folder / WEIGHTS).read_bytes()
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    if checksum:
        config["config_sha256"] = adapters._config_sha256(config)
    tensors = safetensors.torch.load(weights)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors, {"adapter_config": json.dumps(config)}))
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of ``make_model()``."""
    make_model().save_adapter(tmp_path / "adapter", metadata={"note": "first", "accuracy": 0.5})
    return tmp_path / "adapter"


# ---- round trips

CONFIGS = {
    "adaptive": {},
    "no_prompts": {"num_prompts": 0},
    "deep": {"kind": "deep"},
    "shallow": {"kind": "shallow"},
    "static_depth_0": {"static_depth": 0},
    "static_depth_2": {"static_depth": 2},
    "no_conv": {"conv_kernel": None},
    "padded": {"conv_kernel": 3, "conv_padding": 1},
    "depthwise": {"conv_shared": False},
    "no_projector": {"projector_dim": None},
    "own_projectors": {"projector_shared": False},
    "scaled": {"projector_scale_learnable": True, "projector_activation": "gelu"},
    "own_scaled": {"projector_scale_learnable": True, "projector_shared": False},
    "dropouts": {"projector_dropout": 0.0, "prompt_dropout": 0.3, "channel_dropout": 0.2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    config = replace(SMALL, **CONFIGS[name])
    model = make_model(config).to(dtype).eval()
    model.save_adapter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]

    other = make_model(config, seed=1).to(dtype).eval()
    other.load_adapter(tmp_path)
    assert same(learned(other), learned(model))
    built = AdaptiveViT.from_adapter(tmp_path, backbone=make_backbone().to(dtype)).to(dtype).eval()
    assert built.config == config
    assert same(learned(built), learned(model))
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    assert torch.equal(built(images), model(images))
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg"},
        {"global_pool": "map", "class_token": False},
        {"num_classes": 0},
        {"reg_tokens": 2},
        {"img_size": (16, 24), "patch_size": (8, 4)},
        {"family": VisionTransformerDistilled},
    ],
    ids=str,
)
def test_round_trip_of_other_backbones(tmp_path: Path, options: dict[str, Any]) -> None:
    model = make_model(**options)
    model.save_adapter(tmp_path)
    built = AdaptiveViT.from_adapter(tmp_path, backbone=make_backbone(**options))
    assert same(built.state_dict(), model.state_dict())


def test_pooled_prompts(tmp_path: Path) -> None:
    config = replace(SMALL, pool_prompts=True)
    model = make_model(config, global_pool="avg")
    model.save_adapter(tmp_path)
    assert AdaptiveViT.from_adapter(tmp_path, backbone=make_backbone(global_pool="avg")).config == config


def test_file_holds_only_prompts_and_head(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    assert same(tensors, learned(make_model()))
    assert all(name.startswith(("prompts.", "backbone.head.")) for name in tensors)


@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_model_keeps_its_dtype(tmp_path: Path, saved: torch.dtype, loaded: torch.dtype) -> None:
    source = make_model().to(saved)
    source.save_adapter(tmp_path)
    model = make_model(seed=1).to(loaded)
    # The float32 copy of a bfloat16 backbone counts as the same one, and the other way round.
    if loaded == torch.float32:
        model.backbone.to(torch.bfloat16).to(torch.float32)
    model.load_adapter(tmp_path)
    assert same(learned(model), {name: value.to(loaded) for name, value in learned(source).items()})


def test_float32_prompts_on_a_bfloat16_backbone(tmp_path: Path) -> None:
    model = AdaptiveViT(make_backbone().bfloat16(), prompts=SMALL)
    model.save_adapter(tmp_path)
    built = AdaptiveViT.from_adapter(tmp_path, backbone=make_backbone().bfloat16())
    assert same(built.state_dict(), model.state_dict())
    assert built.prompts.blocks[0].table.dtype == torch.float32


def test_values_are_the_users(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.prompts.blocks[0].table.copy_(torch.tensor([float("nan"), float("inf"), -0.0, 1e-45] * 2))
    model.save_adapter(tmp_path)
    other = make_model(seed=1)
    other.load_adapter(tmp_path)
    assert same(learned(other), learned(model))


def test_optimizer_keeps_its_parameters(folder: Path) -> None:
    model = make_model(seed=1)
    before = list(model.parameters())
    model.load_adapter(folder)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in make_model().parameters()
    ]


def test_dropout_rates_may_differ(folder: Path) -> None:
    model = make_model(replace(SMALL, channel_dropout=0.0, prompt_dropout=0.5, projector_dropout=0.0), seed=1)
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model()))


def test_saving_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make_model().save_adapter(tmp_path / "again", metadata={"note": "first", "accuracy": 0.5})
    for name in (CONFIG, WEIGHTS):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_metadata_travels(folder: Path, tmp_path: Path) -> None:
    model = make_model()
    model.load_adapter(folder)
    assert model.adapter_metadata == {"note": "first", "accuracy": 0.5}
    model.save_adapter(tmp_path / "again")
    again = AdaptiveViT.from_adapter(tmp_path / "again", backbone=make_backbone())
    assert again.adapter_metadata == model.adapter_metadata


def test_config_tells_everything(tmp_path: Path) -> None:
    model = AdaptiveViT("vit_tiny_patch16_224.augreg_in21k", prompts=SMALL, num_classes=5, img_size=(64, 96))
    model.save_adapter(tmp_path, metadata={"task": "pets"})
    config = adapters.read_config(tmp_path)
    assert config == json.loads((tmp_path / CONFIG).read_text())
    assert config["library_version"] == vapt_fast.__version__
    backbone = config["backbone"]
    assert backbone["name"] == "vit_tiny_patch16_224.augreg_in21k"
    assert (backbone["grid"], backbone["patch_size"], backbone["num_classes"]) == ([4, 6], [16, 16], 5)
    assert (backbone["dim"], backbone["depth"], backbone["global_pool"]) == (192, 12, "token")
    assert PromptConfig.from_dict(config["prompts"]) == SMALL
    assert config["data"] == {
        "input_size": [3, 64, 96],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
    }
    assert config["metadata"] == {"task": "pets"}
    assert set(config["tensors"]) == set(learned(model))


# ---- building the backbone by its name


def offline(name: str, *, pretrained: bool, **options: Any) -> AdaptiveViT:
    """AdaptiveViT with random weights in the place of the downloaded ones."""
    assert pretrained
    torch.manual_seed(0)
    return AdaptiveViT(name, **options)


def test_build_by_name(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"
    model = offline(
        name, pretrained=True, prompts=SMALL, num_classes=5, img_size=(64, 96), in_chans=1, global_pool="avg"
    )
    model.save_adapter(tmp_path)
    built = adapters.build(offline, tmp_path, backend="reference")
    assert same(built.state_dict(), model.state_dict())
    assert (built.grid, built.num_classes, built.backend) == ((4, 6), 5, "reference")


def test_build_finds_out_wrong_weights(tmp_path: Path) -> None:
    offline("vit_tiny_patch16_224", pretrained=True, prompts=SMALL, img_size=32).save_adapter(tmp_path)

    def wrong(name: str, *, pretrained: bool, **options: Any) -> AdaptiveViT:
        torch.manual_seed(1)
        return AdaptiveViT(name, **options)

    with pytest.raises(AdapterError, match="fingerprints differ"):
        adapters.build(wrong, tmp_path)
    assert adapters.build(wrong, tmp_path, check_backbone=False).grid == (2, 2)


def test_backbone_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline("vit_tiny_patch16_224", pretrained=True, prompts=SMALL, img_size=32).save_adapter(tmp_path)

    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(AdapterError, match=r"no route to host[\s\S]*pass it: backbone=") as raised:
        AdaptiveViT.from_adapter(tmp_path)
    assert isinstance(raised.value.__cause__, ConnectionError)


def test_backbone_without_a_name(folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"does not tell how timm makes it.*backbone="):
        AdaptiveViT.from_adapter(folder)


def test_unavailable_backend_is_not_blamed_on_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline("vit_tiny_patch16_224", pretrained=True, prompts=SMALL, img_size=32).save_adapter(tmp_path)

    def unavailable(*args: Any, **options: Any) -> None:
        raise BackendUnavailable("no GPU")

    with pytest.raises(BackendUnavailable, match="no GPU"):
        adapters.build(unavailable, tmp_path)


def test_where_one_machine_keeps_weights_is_not_saved(tmp_path: Path) -> None:
    class Local(AdaptiveViT):
        backbone_args = {"num_classes": 3, "checkpoint_path": "/home/me/vit.pth"}  # noqa: RUF012

    Local(make_backbone(), prompts=SMALL).save_adapter(tmp_path)
    assert adapters.read_config(tmp_path)["backbone"]["args"] == {"num_classes": 3}


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_an_adapter_may_not_choose_files(folder: Path, name: str) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["backbone"] |= {"name": "vit_tiny_patch16_224", "args": {name: "/etc/passwd"}}

    edit_config(folder, edit)
    with pytest.raises(AdapterError, match=f"arguments .*{name}.*, which no adapter may choose"):
        AdaptiveViT.from_adapter(folder)


def test_arguments_that_json_cannot_express(tmp_path: Path) -> None:
    class Custom(AdaptiveViT):
        backbone_args = {"norm_layer": nn.LayerNorm}  # noqa: RUF012

    Custom(make_backbone(), prompts=SMALL).save_adapter(tmp_path)
    assert adapters.read_config(tmp_path)["backbone"]["args"] is None


# ---- misfits


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
        "prompts.projector.down.weight: the model has no such parameter",
    )
    assert len(error.problems) == len(str(error).splitlines()) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 20}, "backbone grid: the adapter was made for [4, 4], the model has [5, 5]"),
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
    assert_refused(model, folder, message)


def test_wrong_backbone_is_handed_back_as_it_was(folder: Path) -> None:
    backbone = make_backbone(seed=1, num_classes=7)
    head = backbone.head
    with pytest.raises(AdapterError, match="fingerprints differ"):
        AdaptiveViT.from_adapter(folder, backbone=backbone)
    assert backbone.head is head


def test_check_backbone_can_be_left_out(folder: Path) -> None:
    model = AdaptiveViT(make_backbone(seed=1), prompts=SMALL)
    model.load_adapter(folder, check_backbone=False)
    assert same(learned(model), learned(make_model()))
    half = make_model(seed=1).half()
    assert_refused(half, folder, "check_backbone=False", "float16")
    half.load_adapter(folder, check_backbone=False)


def test_fingerprint_sees_every_frozen_tensor() -> None:
    model = make_model()
    expected = adapters.backbone_fingerprint(model)
    assert expected == adapters.backbone_fingerprint(make_model(seed=5))
    assert expected == adapters.backbone_fingerprint(make_model(num_classes=9))
    assert expected == adapters.backbone_fingerprint(make_model().to(torch.bfloat16))
    model.backbone.register_buffer("scale", torch.ones(1))
    assert adapters.backbone_fingerprint(model) != expected
    for name, _ in make_backbone().named_parameters():
        changed = make_model()
        with torch.no_grad():
            changed.backbone.get_parameter(name).flatten()[-1] += 1
        assert (adapters.backbone_fingerprint(changed) == expected) == name.startswith("head.")


def test_fingerprint_is_the_same_after_training() -> None:
    model = make_model()
    expected = adapters.backbone_fingerprint(model)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    before = learned(model)
    for _ in range(100):
        model(torch.randn(4, 3, 16, 16)).logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not same(learned(model), before)
    assert adapters.backbone_fingerprint(model) == expected


def test_other_number_of_classes(folder: Path) -> None:
    model = make_model(num_classes=7)
    assert_refused(model, folder, "call model.reset_classifier(3) first", "head.weight: shape (3, 8)")
    model.reset_classifier(3)
    model.load_adapter(folder)
    built = AdaptiveViT.from_adapter(folder, backbone=make_backbone(num_classes=7))
    assert built.num_classes == 3
    assert same(learned(built), learned(model))


def test_model_on_the_meta_device(folder: Path) -> None:
    model = make_model().to("meta")
    with pytest.raises(AdapterError, match=r"meta device; call model.to_empty"):
        model.load_adapter(folder, check_backbone=False)


# ---- what is refused when saving


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([1], "metadata must be a dict, got list"),
        ({"when": object()}, "metadata must be made of what JSON knows: Object of type object"),
        ({"loss": float("nan")}, "metadata must be made of what JSON knows: Out of range float"),
    ],
)
def test_metadata_that_json_cannot_express(tmp_path: Path, metadata: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make_model().save_adapter(tmp_path / "new", metadata=metadata)
    assert not (tmp_path / "new").exists()


def test_trained_backbone_is_not_dropped_in_silence(tmp_path: Path) -> None:
    model = make_model()
    model.backbone.cls_token.requires_grad_(True)
    model.backbone.norm.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"backbone.cls_token is trainable") as raised:
        model.save_adapter(tmp_path / "new")
    assert len(raised.value.problems) == 3
    assert not (tmp_path / "new").exists()


# ---- files that are not as they were saved


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    error = assert_refused(make_model(seed=1), folder, name, "does not exist")
    assert isinstance(error, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=name):
        AdaptiveViT.from_adapter(folder, backbone=make_backbone())


def test_missing_folder(tmp_path: Path) -> None:
    assert_refused(make_model(), tmp_path / "nowhere", "nowhere", "does not exist")
    (tmp_path / "file").touch()
    assert_refused(make_model(), tmp_path / "file", "does not exist")


def test_unknown_keys_and_layout_are_tolerated(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config |= {"peft_type": "VAPT", "metadata": {"note": "edited"}}
    config["backbone"]["licence"] = "apache-2.0"
    (folder / CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    model = make_model(seed=1)
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model()))
    assert model.adapter_metadata == {"note": "edited"}


def test_keys_of_a_later_version_are_tolerated(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(future={"a": 1}))
    make_model().load_adapter(folder)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("prompts", "projector_activation", "gelu", "prompts.projector_activation: saved 'relu', now 'gelu'"),
        ("backbone", "grid", [5, 5], "backbone.grid: saved [4, 4], now [5, 5]"),
        ("backbone", "fingerprint", "0", "backbone.fingerprint: saved"),
        ("tensors", "prompts.blocks.0.table", {}, "tensors.prompts.blocks.0.table.sha256: saved"),
    ],
)
def test_edited_config(folder: Path, section: str, key: str, value: Any, message: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config[section][key] = value
    (folder / CONFIG).write_text(json.dumps(config))
    assert_refused(make_model(seed=1), folder, "was changed after it was saved", message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version is 2, and vapt_fast"),
        (lambda c: c.pop("prompts"), "'prompts' is missing"),
        (lambda c: c["prompts"].update(temperature=2), "unknown prompt options ['temperature']"),
        (lambda c: c["prompts"].update(num_prompts=-1), "num_prompts must be at least 0, got -1"),
        (lambda c: c["prompts"].update(conv_kernel="2"), "conv_kernel must be an int, got '2'"),
        (lambda c: c["backbone"].update(num_classes=True), "backbone num_classes is True"),
        (lambda c: c["tensors"].pop("prompts.blocks.0.table"), "saved no such tensor, now"),
        (lambda c: c["tensors"].update(extra={}), "extra: missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "edit",
)
def test_forged_config(folder: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_config(folder, edit)
    assert_refused(make_model(seed=1), folder, message)


def test_config_edited_in_both_files(folder: Path) -> None:
    edit_config(folder, lambda c: c["prompts"].update(projector_activation="gelu"), checksum=False)
    assert_refused(make_model(seed=1), folder, "its config was changed after it was saved")


def test_tensors_of_integers(tmp_path: Path) -> None:
    """Such a file can only be made on purpose: same shapes, checksums in order, no floating-point numbers."""
    model = make_model()
    model.prompts.blocks[0].table = nn.Parameter(torch.ones(2, 8, dtype=torch.int32), requires_grad=False)
    model.save_adapter(tmp_path)
    assert_refused(
        make_model(), tmp_path, "blocks.0.table: dtype torch.int32, expected floating-point numbers"
    )


def test_other_safetensors_file(folder: Path) -> None:
    safetensors.torch.save_file(learned(make_model()), folder / WEIGHTS)
    assert_refused(make_model(), folder, "not a file that save_adapter wrote")


def test_exchanged_files(folder: Path, tmp_path: Path) -> None:
    """Weights are complete by themselves; a config of another save is noticed and not used."""
    make_model(seed=2).save_adapter(tmp_path / "other", metadata={"note": "other"})
    (folder / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    model = make_model(seed=1)
    with pytest.warns(UserWarning, match="was not saved together with"):
        model.load_adapter(folder)
    assert same(learned(model), learned(make_model(seed=2)))
    assert model.adapter_metadata == {"note": "other"}

    (folder / WEIGHTS).write_bytes((folder / CONFIG).read_bytes())
    assert_refused(model, folder, "not a whole safetensors file")


# ---- 2000 damaged adapters

SEED, MUTATIONS = 20250118, 2000
NASTY = [
    None, True, False, -1, 0, 1, 2**31, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "\x00", "é",
    "../../etc/passwd", [], {}, [[]], {"": {}}, [1, 2], "relu", "0" * 64,
]  # fmt: skip


def _flip_bits(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _cut(data: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(rng.choices(range(len(data) + 1), k=2))
    return rng.choice([data[:start], data[start:], data[:start] + data[stop:], data[:start] + b"\0" * 9])


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.choice([0, 8, len(data), rng.randrange(len(data))])
    return (
        data[:at]
        + rng.choice([rng.randbytes(rng.randrange(1, 99)), data, b"\0", b" ", b"[" * 99999])
        + data[at:]
    )


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(rng.choices(range(len(data) + 1), k=2))
    filling = rng.choice([b"\0" * (stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start)])
    return data[:start] + filling + data[stop:]


def _containers(value: Any) -> Iterator[dict | list]:
    if isinstance(value, (dict, list)) and value:
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _containers(child)


def _edit_json(text: bytes | str, rng: random.Random) -> str:
    """Change, remove, rename or add a random value of a JSON document, or only its layout."""
    document = json.loads(text)
    container = rng.choice(list(_containers(document)))
    key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
    action = rng.choice(["set", "set", "set", "remove", "rename", "layout"])
    if action == "set":
        container[key] = rng.choice(NASTY)
    elif action == "remove":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[rng.choice(["x", "", key + "x"])] = container.pop(key)
    return json.dumps(document, indent=rng.choice([None, 1, 4]), ensure_ascii=rng.random() < 0.5)


def _edit_header(data: bytes, rng: random.Random) -> bytes:
    """Edit the header of a safetensors file and write its length anew."""
    length = int.from_bytes(data[:8], "little")
    header = _edit_json(data[8 : 8 + length], rng).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _forge(config: bytes, weights: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """Edit the config in both files and make its checksum right."""
    edited = json.loads(_edit_json(config, rng))
    edited["config_sha256"] = adapters._config_sha256(edited)
    text = json.dumps(edited)
    return text.encode(), safetensors.torch.save(safetensors.torch.load(weights), {"adapter_config": text})


def mutate(config: bytes, weights: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    kind = rng.choice(
        ["config", "config json", "weights", "weights", "weights header", "both", "forge", "swap"]
    )
    damage = [_flip_bits, _flip_bits, _cut, _insert, _overwrite]
    if kind in ("config", "both"):
        config = rng.choice(damage)(config, rng)
    if kind in ("weights", "both"):
        weights = rng.choice(damage)(weights, rng)
    if kind == "config json":
        config = _edit_json(config, rng).encode()
    if kind == "weights header":
        weights = _edit_header(weights, rng)
    if kind == "forge":
        config, weights = _forge(config, weights, rng)
    if kind == "swap":
        config, weights = rng.choice([(weights, config), (config, config), (weights, weights)])
    return config, weights


def load_or_refusal(model: AdaptiveViT, folder: Path) -> AdapterError | None:
    try:
        model.load_adapter(folder)
    except AdapterError as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore:.*was not saved together with")
def test_damaged_files(folder: Path) -> None:
    """Each is refused with the model unchanged or, if harmless, gives the adapter as it was saved."""
    rng = random.Random(SEED)
    original = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    expected = learned(make_model())
    model = make_model(seed=1)
    before = snapshot(model)
    num_refused = 0
    for number in range(MUTATIONS):
        config, weights = mutate(*original, rng)
        (folder / CONFIG).write_bytes(config)
        (folder / WEIGHTS).write_bytes(weights)
        try:
            refusal = load_or_refusal(model, folder)
        except Exception as error:
            pytest.fail(f"mutation {number} of seed {SEED}: {type(error).__name__}: {error}")
        if refusal is None:
            assert same(learned(model), expected), f"mutation {number} of seed {SEED}"
            model.load_state_dict(before[0])
            model.adapter_metadata = copy.deepcopy(before[1])
        else:
            num_refused += 1
            assert refusal.problems
            assert_unchanged(model, before)
    print(f"{num_refused} of {MUTATIONS} refused")
    assert 0.5 * MUTATIONS < num_refused < 0.98 * MUTATIONS


@pytest.mark.filterwarnings("ignore:.*was not saved together with")
def test_damaged_config_never_builds_another_model(folder: Path) -> None:
    rng = random.Random(SEED + 1)
    original = (folder / CONFIG).read_bytes()
    expected, num_built = make_model(), 0
    for _ in range(300):
        damage = rng.choice([_flip_bits, _cut, lambda *args: _edit_json(*args).encode()])
        (folder / CONFIG).write_bytes(damage(original, rng))
        try:
            model = AdaptiveViT.from_adapter(folder, backbone=make_backbone())
        except AdapterError:
            continue
        num_built += 1
        assert model.config == expected.config
        assert same(model.state_dict(), expected.state_dict())
    assert 0 < num_built < 300


# ---- interrupted saves


class DiskFull(OSError):
    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "No space left on device")


def fail_at(function: Callable, turn: int, error: type[BaseException]) -> Callable:
    """``function``, but the call of this number (from 0) raises."""
    calls = iter(range(99))

    def wrapper(*args: Any, **options: Any) -> Any:
        if next(calls) == turn:
            raise error()
        return function(*args, **options)

    return wrapper


def fail_writing(turn: int, error: type[BaseException]) -> Callable:
    """``open``, but the file of this number (from 0) takes half of what is written to it, then raises."""

    class HalfWritten(io.FileIO):
        def write(self, content: bytes) -> int:
            super().write(content[: len(content) // 2])
            raise error()

    calls = iter(range(99))
    return lambda *args: HalfWritten(*args) if next(calls) == turn else open(*args)


def interrupt(patch: pytest.MonkeyPatch, step: str, turn: int, error: type[BaseException]) -> None:
    """Let a step of saving one of the two files fail."""
    if step == "write":
        patch.setattr(adapters, "open", fail_writing(turn, error), raising=False)
    elif step == "open":
        patch.setattr(adapters, "open", fail_at(open, turn, error), raising=False)
    else:
        patch.setattr(os, step, fail_at(getattr(os, step), turn, error))


STEPS = ["open", "write", "fsync", "replace"]


@pytest.mark.parametrize("error", [DiskFull, KeyboardInterrupt])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.filterwarnings("ignore:.*was not saved together with")
def test_interrupted_save_leaves_the_earlier_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, turn: int, error: type[BaseException]
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, step, turn, error)
        with pytest.raises(error):
            make_model(seed=3).save_adapter(folder, metadata={"note": "second"})
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    model = make_model(seed=1)
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model()))
    assert model.adapter_metadata == {"note": "first", "accuracy": 0.5}
    # and the next save is as any other
    make_model(seed=3).save_adapter(folder, metadata={"note": "second"})
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model(seed=3)))


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("step", STEPS)
def test_interrupted_first_save_leaves_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, turn: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, step, turn, DiskFull)
        with pytest.raises(OSError, match="No space left"):
            make_model().save_adapter(tmp_path)
    assert set(os.listdir(tmp_path)) <= {CONFIG}
    assert_refused(make_model(), tmp_path, "does not exist")


# ---- other processes

HERE = Path(__file__).parent
LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_adapters import AdaptiveViT, make_backbone
model = AdaptiveViT.from_adapter(sys.argv[2], backbone=make_backbone()).eval()
torch.save(model(torch.ones(2, 3, 16, 16)), sys.argv[3])
"""
SAVE_FOREVER = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
from test_adapters import make_model
models = [make_model(seed=seed) for seed in (0, 2)]
for turn in itertools.count():
    models[turn % 2].save_adapter(sys.argv[2], metadata={"seed": 2 * (turn % 2)})
    print(turn, flush=True)
"""


def start(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", script, str(HERE), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_new_process(folder: Path, tmp_path: Path) -> None:
    processes = [start(LOAD, folder, tmp_path / f"{i}.pt") for i in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    expected = make_model().eval()(torch.ones(2, 3, 16, 16))
    for i in range(2):
        assert torch.equal(torch.load(tmp_path / f"{i}.pt", weights_only=True), expected)


@pytest.mark.filterwarnings("ignore:.*was not saved together with")
def test_readers_and_a_killed_writer(tmp_path: Path) -> None:
    """While a process saves over and over, and after it is killed, each load gives one whole adapter."""
    states = {seed: learned(make_model(seed=seed)) for seed in (0, 2)}
    model, seen = make_model(seed=1), set()

    def check() -> None:
        model.load_adapter(tmp_path)
        assert same(learned(model), states[model.adapter_metadata["seed"]])
        seen.add(model.adapter_metadata["seed"])

    writer = start(SAVE_FOREVER, tmp_path)
    try:
        assert writer.stdout.readline() == "0\n"
        end = time.monotonic() + 2
        while time.monotonic() < end:
            check()
    finally:
        writer.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        writer.wait(60)
        writer.stdout.close()
    check()
    assert seen == {0, 2}


# ---- the rest


def test_trainable_summary() -> None:
    model = make_model()
    own = sum(parameter.numel() for parameter in model.trainable_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (
        adapters.trainable_summary(model) == f"trainable: {own:,} of {total:,} parameters ({own / total:.2%})"
    )
    assert adapters.trainable_summary(nn.Identity()) == "trainable: 0 of 0 parameters (0.00%)"


def test_no_pickle() -> None:
    package = Path(adapters.__file__).parent
    for name in ("adapters.py", "official.py"):
        assert not re.search(r"pickle|(?<!safetensors\.)torch\.(load|save)", (package / name).read_text()), (
            name
        )
