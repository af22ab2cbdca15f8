"""Adapter files: round trips, misfits, damaged files, interrupted saves."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vapt_fast
from vapt_fast import AdapterError, AdaptiveViT, BackendUnavailableError, PromptConfig, adapters, source

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
    return {name: value.detach().clone() for name, value in model.adapter_state().items()}


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
    assert all(name.startswith(("prompts.", "head.")) for name in tensors)


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
        "crop_mode": "center",
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
        raise BackendUnavailableError("no GPU")

    with pytest.raises(BackendUnavailableError, match="no GPU"):
        adapters.build(unavailable, tmp_path)


TINY = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


def timm_model(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **TINY | {"num_classes": 3} | options)


@pytest.fixture
def local_dir(tmp_path: Path) -> str:
    """A backbone in a folder, as timm's save_for_hf leaves it."""
    save_for_hf(timm_model(num_classes=7), str(tmp_path / "published"))
    return f"local-dir:{tmp_path / 'published'}"


def test_a_folder_of_timms_is_named_but_only_opened_if_the_user_says_so(
    tmp_path: Path, local_dir: str
) -> None:
    model = AdaptiveViT(local_dir, pretrained=True, num_classes=3, prompts=SMALL)
    model.save_adapter(tmp_path / "adapter")
    saved = adapters.read_config(tmp_path / "adapter")["backbone"]
    assert (saved["name"], saved["architecture"]) == (local_dir, "vit_tiny_patch16_224")
    assert saved["args"]["depth"] == 2
    with pytest.raises(AdapterError) as raised:
        AdaptiveViT.from_adapter(tmp_path / "adapter")
    assert f"if you trust that folder, pass it: backbone={local_dir!r}" in str(raised.value)
    built = AdaptiveViT.from_adapter(tmp_path / "adapter", backbone=local_dir)
    assert same(built.state_dict(), model.state_dict())


@pytest.mark.parametrize("source", ["local-dir", "LOCAL-DIR", " local-dir"])
def test_no_spelling_of_a_folder_is_opened(
    folder: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(folder, lambda c: c["backbone"].update(name=f"{source}:/etc", args={}))
    monkeypatch.setattr(timm.models._factory, "load_model_config_from_path", lambda *_: pytest.fail("opened"))
    with pytest.raises(AdapterError):
        AdaptiveViT.from_adapter(folder)


def test_a_timm_model_of_the_users_is_named(tmp_path: Path, local_dir: str) -> None:
    backbone = timm.create_model(local_dir, pretrained=True, num_classes=3)
    AdaptiveViT(backbone, prompts=SMALL).save_adapter(tmp_path / "a")
    assert adapters.read_config(tmp_path / "a")["backbone"]["name"] == local_dir
    AdaptiveViT(timm_model(), prompts=SMALL).save_adapter(tmp_path / "b")
    saved = adapters.read_config(tmp_path / "b")["backbone"]
    assert saved["name"] == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert {key: saved["args"][key] for key in ("depth", "embed_dim", "num_heads")} == {
        "depth": 2,
        "embed_dim": 24,
        "num_heads": 2,
    }


def test_a_repository_of_the_hub_is_named() -> None:
    backbone = timm_model()
    backbone.pretrained_cfg |= {"source": "hf-hub", "hf_hub_id": "someone/model@v1"}
    assert AdaptiveViT(backbone).backbone_name == "hf-hub:someone/model@v1"


@pytest.mark.parametrize("how", ["checkpoint_path", "file"])
def test_a_file_of_weights_is_named_but_only_opened_if_the_user_says_so(tmp_path: Path, how: str) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm_model(seed=5).state_dict(), path)
    if how == "checkpoint_path":
        options: dict[str, Any] = {"checkpoint_path": str(path)}
    else:
        options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 3}}
    model = AdaptiveViT("vit_tiny_patch16_224", prompts=SMALL, num_classes=3, **TINY, **options)
    model.save_adapter(tmp_path / "adapter")
    saved = adapters.read_config(tmp_path / "adapter")["backbone"]
    assert saved["weights_path"] == str(path)
    assert not adapters.LOCAL_ARGS & saved["args"].keys()
    with pytest.raises(AdapterError) as raised:
        AdaptiveViT.from_adapter(tmp_path / "adapter")
    assert f"if you trust that file, pass it: weights={str(path)!r}" in str(raised.value)
    built = AdaptiveViT.from_adapter(tmp_path / "adapter", weights=path)
    assert same(built.state_dict(), model.state_dict())


def test_the_packages_own_weights_are_no_file_of_the_users(tmp_path: Path) -> None:
    AdaptiveViT("vit_digits_patch4_32", pretrained=True, prompts=SMALL).save_adapter(tmp_path)
    assert adapters.read_config(tmp_path)["backbone"]["weights_path"] is None
    AdaptiveViT.from_adapter(tmp_path)


def test_weights_are_for_a_backbone_made_by_its_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="weights are for a backbone that is made by its name"):
        AdaptiveViT.from_adapter(folder, backbone=make_backbone(), weights=tmp_path / "w.pth")


def write_weights(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    state = timm_model().state_dict()
    torch.save(change(state) or state, path)
    return path


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_files_of_weights(tmp_path: Path, key: str | None) -> None:
    path = write_weights(tmp_path / "w.pth", lambda state: {key: state, "epoch": 3} if key else state)
    backbone = timm_model(seed=1, num_classes=9)
    head = backbone.head.weight.clone()
    source.load_weights(backbone, path)
    for name, value in timm_model().state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value) or name.startswith("head.")
    assert torch.equal(backbone.head.weight, head)


def test_files_of_weights_that_do_not_fit(tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        del state["norm.weight"]
        state["extra"] = torch.zeros(1)
        state["cls_token"] = torch.zeros(1, 1, 5)

    backbone = timm_model(seed=1)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit VisionTransformer") as raised:
        source.load_weights(backbone, write_weights(tmp_path / "w.pth", change))
    assert str(raised.value).splitlines()[1:] == [
        "  - norm.weight: missing",
        "  - cls_token: shape (1, 1, 5), expected (1, 1, 24)",
        "  - extra: unexpected",
    ]
    assert same(backbone.state_dict(), before)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        source.load_weights(timm_model(), tmp_path / "w.pth")
    for content in (b"", b"x" * 100, (tmp_path.name * 9).encode()):
        for name in ("w.pth", "w.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match="can't be read as a state dict"):
                source.load_weights(timm_model(), tmp_path / name)
    with pytest.raises(ValueError, match="can't be read as a state dict"):
        source.load_weights(timm_model(), write_weights(tmp_path / "w.pth", lambda _: {"code": os.system}))
    whole = AdaptiveViT(timm_model(), prompts=SMALL).state_dict()
    with pytest.raises(ValueError, match="of a whole AdaptiveViT"):
        source.load_weights(timm_model(), write_weights(tmp_path / "w.pth", lambda _: whole))


# ---- the backbone in the folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_folder_with_its_backbone_needs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=3, drop_rate=0.1, **TINY)
    model = AdaptiveViT(backbone, prompts=SMALL).to(dtype).eval()
    model.save_adapter(tmp_path, include_backbone=True)
    config = adapters.read_config(tmp_path)
    digits = config["backbone"]["file_sha256"][:16]
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS, f"backbone-{digits}.safetensors"]
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: pytest.fail("downloaded"))
    built = AdaptiveViT.from_adapter(tmp_path)
    assert same(built.state_dict(), model.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    assert torch.equal(built(images), model(images))
    assert not any(p.requires_grad for n, p in built.named_parameters() if n.startswith("backbone.blocks"))
    # the adapter alone also goes into a backbone of the user's
    AdaptiveViT.from_adapter(tmp_path, backbone=copy.deepcopy(backbone))


def with_backbone(folder: Path, seed: int = 0) -> tuple[AdaptiveViT, Path]:
    model = AdaptiveViT(timm_model(seed), prompts=SMALL)
    model.save_adapter(folder, include_backbone=True)
    (path,) = folder.glob("backbone-*")
    return model, path


def test_a_damaged_or_missing_backbone_is_refused(tmp_path: Path) -> None:
    _, path = with_backbone(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="sha256 differs"):
        AdaptiveViT.from_adapter(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        AdaptiveViT.from_adapter(tmp_path)


@pytest.mark.parametrize("digest", ["../../../etc/passwd", "0" * 63, 5])
def test_an_adapter_may_not_choose_the_backbones_file(tmp_path: Path, digest: Any) -> None:
    with_backbone(tmp_path)
    edit_config(tmp_path, lambda c: c["backbone"].update(file_sha256=digest))
    with pytest.raises(AdapterError, match="file_sha256 is"):
        AdaptiveViT.from_adapter(tmp_path)


def test_a_backbone_never_takes_the_place_of_one_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, first = with_backbone(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, "replace", 2, DiskFull)  # the adapter itself
        with pytest.raises(DiskFull):
            with_backbone(tmp_path, seed=1)
    with pytest.warns(UserWarning, match="was not saved together with"):
        assert same(AdaptiveViT.from_adapter(tmp_path).state_dict(), model.state_dict())
    second_model, second = with_backbone(tmp_path, seed=1)  # and removes the one that no adapter needs
    assert second != first
    assert same(AdaptiveViT.from_adapter(tmp_path).state_dict(), second_model.state_dict())
    second_model.save_adapter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_a_backbone_that_timm_cannot_make_again_is_not_included(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"a backbone that timm.create_model has made; .*backbone="):
        make_model().save_adapter(tmp_path / "new", include_backbone=True)
    backbone = timm_model()
    backbone.blocks[1].attn.proj = nn.Sequential(backbone.blocks[1].attn.proj)
    model = AdaptiveViT(backbone, prompts=SMALL)
    with pytest.raises(AdapterError, match=r"which was changed: \['blocks.1.attn.proj.0.weight'"):
        model.save_adapter(tmp_path / "new", include_backbone=True)
    assert not (tmp_path / "new").exists()


def test_random_weights_are_told(tmp_path: Path) -> None:
    model = AdaptiveViT("vit_digits_patch4_32", prompts=SMALL)
    model.save_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"pretrained=False.*include_backbone=True"):
        AdaptiveViT.from_adapter(tmp_path)
    model.save_adapter(tmp_path, include_backbone=True)
    assert same(AdaptiveViT.from_adapter(tmp_path).state_dict(), model.state_dict())


def test_resampled_positions_come_back(tmp_path: Path) -> None:
    """From one size to another and back, the backbone is the same, and its adapters fit again."""
    model = AdaptiveViT(timm_model(), prompts=SMALL).eval()
    model.set_input_size((64, 48))
    model.save_adapter(tmp_path / "other")
    model.set_input_size((96, 96))
    model.set_input_size((32, 32))
    original = AdaptiveViT(timm_model(), prompts=SMALL)
    assert same(model.backbone.state_dict(), original.backbone.state_dict())
    model.save_adapter(tmp_path / "back")
    built = AdaptiveViT.from_adapter(tmp_path / "back", backbone=timm_model())
    assert same(built.state_dict(), model.state_dict())
    direct = timm_model()
    direct.set_input_size((64, 48))
    AdaptiveViT.from_adapter(tmp_path / "other", backbone=direct)


def test_positions_of_a_state_dict_are_the_new_originals() -> None:
    model, other = (AdaptiveViT(timm_model(seed), prompts=SMALL) for seed in (0, 1))
    for one in (model, other):
        one.set_input_size((64, 64))
    model.load_state_dict(other.state_dict())
    before = timm_model(0).pos_embed
    model.set_input_size((32, 32))
    assert not torch.equal(model.backbone.pos_embed, before)
    expected = timm_model(1)
    expected.set_input_size((64, 64))
    expected.set_input_size((32, 32))
    assert torch.equal(model.backbone.pos_embed, expected.pos_embed)


# ---- class names and the preparation of images


def test_class_names_and_data_config_travel(tmp_path: Path) -> None:
    model = AdaptiveViT(timm_model(), prompts=SMALL)
    data = {"mean": (0.1, 0.2, 0.3), "crop_pct": np.float32(1.0), "crop_mode": "squash"}
    model.save_adapter(tmp_path / "a", class_names=np.array(["ant", "bee", "cat"]), data_config=data)
    built = AdaptiveViT.from_adapter(tmp_path / "a", backbone=timm_model())
    assert built.class_names == ("ant", "bee", "cat")
    built.save_adapter(tmp_path / "b")
    for name in ("a", "b"):
        config = adapters.read_config(tmp_path / name)
        assert config["class_names"] == ["ant", "bee", "cat"]
        assert config["data"] == {
            "input_size": [3, 32, 32],
            "mean": [0.1, 0.2, 0.3],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
    built.set_input_size((64, 64))
    built.save_adapter(tmp_path / "c")
    assert adapters.read_config(tmp_path / "c")["data"]["input_size"] == [3, 64, 64]
    built.reset_classifier(3)
    assert built.class_names is None  # a new head means other classes


def test_transform_is_timms(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    model = AdaptiveViT(timm_model(), prompts=SMALL)
    config = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    expected = timm.data.create_transform(**config)(Image.fromarray(pixels))
    assert torch.equal(model.transform()(Image.fromarray(pixels)), expected)
    model.save_adapter(tmp_path, data_config={"crop_mode": "squash", "std": [1, 1, 2]})
    config |= {"crop_mode": "squash", "std": (1.0, 1.0, 2.0)}
    expected = timm.data.create_transform(**config)(Image.fromarray(pixels))
    built = AdaptiveViT.from_adapter(tmp_path, backbone=timm_model())
    assert torch.equal(built.transform()(Image.fromarray(pixels)), expected)
    grey = Image.fromarray(pixels[..., 0])
    assert torch.equal(built.transform()(grey), built.transform()(grey.convert("RGB")))


def test_transform_for_other_channels() -> None:
    image = Image.fromarray(np.full((40, 40, 3), 255, dtype=np.uint8))
    model = AdaptiveViT(timm_model(in_chans=1), prompts=SMALL)
    assert torch.equal(model.transform()(image), torch.ones(1, 32, 32))
    with pytest.raises(ValueError, match="images of 5 channels, which PIL does not have"):
        AdaptiveViT(timm_model(in_chans=5), prompts=SMALL).transform()


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
        ({"data_config": {"input_size": (3, 64, 64)}}, r"input_size must be the model's \[3, 32, 32\]"),
    ],
    ids=str,
)
def test_class_names_and_data_configs_that_are_none(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        AdaptiveViT(timm_model(), prompts=SMALL).save_adapter(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# ---- numbers of numpy and torch


@pytest.mark.parametrize(
    "integer", [np.int64, np.uint8, np.array, torch.tensor], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("real", [np.float32, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_numbers_of_numpy_and_torch(tmp_path: Path, integer: Callable, real: Callable) -> None:
    model = AdaptiveViT(
        "vit_tiny_patch16_224",
        prompts=PromptConfig(num_prompts=integer(2), projector_dropout=real(0.25)),
        num_classes=integer(3),
        img_size=(integer(32), integer(32)),
        depth=integer(2),
        drop_rate=real(0.5),
    )
    model.save_adapter(tmp_path, metadata={"best": real(0.5), "epochs": [integer(7)]}, include_backbone=True)
    config = adapters.read_config(tmp_path)
    args = config["backbone"]["args"]
    assert (args["num_classes"], args["depth"], args["drop_rate"]) == (3, 2, 0.5)
    assert (config["prompts"]["num_prompts"], config["prompts"]["projector_dropout"]) == (2, 0.25)
    assert config["metadata"] == {"best": 0.5, "epochs": [7]}
    assert same(AdaptiveViT.from_adapter(tmp_path).state_dict(), model.state_dict())
    model.reset_classifier(integer(5))
    model.set_input_size((integer(64), integer(32)))
    assert (type(model.num_classes), model.grid) == (int, (4, 2))


def test_a_timm_model_with_numpys_number_of_classes(tmp_path: Path) -> None:
    backbone = timm_model(num_classes=np.int64(4))
    model = AdaptiveViT(copy.deepcopy(backbone), prompts=SMALL)
    model.save_adapter(tmp_path)
    assert AdaptiveViT.from_adapter(tmp_path, backbone=backbone).num_classes == 4


# ---- heads with more than parameters


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


def test_names_of_the_head_before_it_was_a_part_of_its_own(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    old = {f"backbone.{n}" if n.startswith("head") else n: value for n, value in tensors.items()}
    config = json.loads((folder / CONFIG).read_text())
    config["tensors"] = adapters._tensor_table(safetensors.torch.save(old))
    for key in ("class_names", "crop_mode"):
        (config if key in config else config["data"]).pop(key)
    config["config_sha256"] = adapters._config_sha256(config)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(old, {"adapter_config": json.dumps(config)}))
    (folder / CONFIG).write_text(json.dumps(config))
    model = make_model(seed=1)
    model.load_adapter(folder)
    assert same(learned(model), learned(make_model()))


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_an_adapter_may_not_choose_files(folder: Path, name: str) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["backbone"] |= {"name": "vit_tiny_patch16_224", "args": {name: "/etc/passwd"}}

    edit_config(folder, edit)
    with pytest.raises(AdapterError, match=f"arguments .*{name}.*, which no adapter may choose"):
        AdaptiveViT.from_adapter(folder)


def test_arguments_that_json_cannot_express(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    model = AdaptiveViT(name, prompts=SMALL, img_size=32, depth=2, drop_rate=0.1, norm_layer=nn.LayerNorm)
    model.save_adapter(tmp_path)
    saved = adapters.read_config(tmp_path)["backbone"]
    assert (saved["args"]["depth"], saved["args"]["drop_rate"]) == (2, 0.1)
    assert saved["args_left_out"] == ["norm_layer"]
    with pytest.raises(AdapterError, match=r"\['norm_layer'\], which JSON can't express.*backbone="):
        AdaptiveViT.from_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"include_backbone.*\['norm_layer'\]"):
        model.save_adapter(tmp_path, include_backbone=True)


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
    for name, parameter in make_model().named_parameters():
        changed = make_model()
        with torch.no_grad():
            changed.get_parameter(name).flatten()[-1] += 1
        assert (adapters.backbone_fingerprint(changed) == expected) == parameter.requires_grad


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
        (lambda c: c["data"].update(std=[0, 1, 1]), "data: data_config std must be positive"),
        (lambda c: c.update(class_names=["a"]), "class_names must be 3, one a class, got 1"),
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


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(format_version=2),
        lambda c: c["prompts"].update(rank_dropout=0.0),
        lambda c: c["prompts"].update(kind="prefix"),
    ],
)
def test_an_adapter_of_another_version_says_which(folder: Path, edit: Callable[[dict], None]) -> None:
    edit_config(folder, lambda config: [config.update(library_version="7.1"), edit(config)])
    assert_refused(make_model(), folder, "saved by vapt_fast 7.1", vapt_fast.__version__)


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
        for _ in itertools.count():
            check()
            if len(seen) == len(states) or writer.poll() is not None:
                break
        for _ in range(50):
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


# ---- the format, which later versions read


def test_format_1_is_read() -> None:
    """An adapter as the first version wrote it, with its backbone and the logits it gave in float64."""
    model = AdaptiveViT.from_adapter(HERE / "golden" / "adapter_format_1")
    images = torch.linspace(-1, 1, 3 * 32 * 32, dtype=torch.float64).view(1, 3, 32, 32)
    expected = torch.tensor([model.adapter_metadata["logits"]], dtype=torch.float64)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-9)
    assert model.class_names == ("ant", "bee")


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_names_in_the_file(tmp_path: Path, options: dict[str, Any]) -> None:
    """They are promised: adapters.py says them."""
    make_model(replace(SMALL, **options)).save_adapter(tmp_path)
    projector = r"projector\.(down\.weight|up\.weight|scale)"
    block = rf"(table|norm\.(weight|bias)|kernel|token_projection\.(weight|bias)|{projector})"
    promised = re.compile(rf"prompts\.(blocks\.\d+\.{block}|{projector})|head\.(weight|bias)")
    names = safetensors.torch.load_file(tmp_path / WEIGHTS).keys()
    assert [name for name in names if not promised.fullmatch(name)] == []


def test_keys_of_the_config(folder: Path) -> None:
    config = adapters.read_config(folder)
    described = adapters.__doc__
    for key in (*config, *config["backbone"], *config["data"], *config["tensors"]["head.bias"]):
        assert f"``{key}``" in described, key
