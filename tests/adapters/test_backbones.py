"""The backbone of an adapter: made again by its name, from files of weights, from the adapter's folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from small_adapters import (
    CONFIG,
    SMALL,
    TINY,
    WEIGHTS,
    edit_config,
    make_backbone,
    make_model,
    same,
    timm_model,
)
from timm.models import save_for_hf
from torch import nn

from vapt_fast import AdapterError, AdaptiveViT, BackendUnavailableError, PromptConfig, adapters, source

NAME = "vit_tiny_patch16_224"


def saved_backbone(folder: Path) -> dict[str, Any]:
    return adapters.read_config(folder)["backbone"]


# ---- by its name


def offline(name: str, *, pretrained: bool, seed: int = 0, **options: Any) -> AdaptiveViT:
    """AdaptiveViT with random weights in the place of the downloaded ones."""
    assert pretrained
    torch.manual_seed(seed)
    return AdaptiveViT(name, **options)


def test_build_by_name(tmp_path: Path) -> None:
    options = {"num_classes": 5, "img_size": (64, 96), "in_chans": 1, "global_pool": "avg"}
    model = offline(f"{NAME}.augreg_in21k", pretrained=True, prompts=SMALL, **options)
    model.save_adapter(tmp_path)
    assert saved_backbone(tmp_path)["name"] == f"{NAME}.augreg_in21k"
    built = adapters.build(offline, tmp_path, backend="reference")
    assert same(built.state_dict(), model.state_dict())
    assert (built.grid, built.num_classes, built.backend) == ((4, 6), 5, "reference")

    def wrong(*args: Any, **options: Any) -> AdaptiveViT:
        return offline(*args, seed=1, **options)

    with pytest.raises(AdapterError, match="fingerprints differ"):
        adapters.build(wrong, tmp_path)
    assert adapters.build(wrong, tmp_path, check_backbone=False).grid == (4, 6)


def test_a_backbone_that_cannot_be_made(tmp_path: Path) -> None:
    AdaptiveViT(NAME, prompts=SMALL, **TINY).save_adapter(tmp_path)

    def failing(error: Exception) -> Callable[..., AdaptiveViT]:
        def fail(*args: Any, **options: Any) -> AdaptiveViT:
            raise error

        return fail

    with pytest.raises(AdapterError, match=r"no route to host[\s\S]*pass it: backbone=") as raised:
        adapters.build(failing(ConnectionError("no route to host")), tmp_path)
    assert isinstance(raised.value.__cause__, ConnectionError)
    with pytest.raises(BackendUnavailableError, match="no GPU"):  # which is not blamed on the download
        adapters.build(failing(BackendUnavailableError("no GPU")), tmp_path)
    make_model().save_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"does not tell how timm makes it.*backbone="):
        AdaptiveViT.from_adapter(tmp_path)


@pytest.fixture
def local_dir(tmp_path: Path) -> str:
    """A backbone in a folder, as timm's save_for_hf leaves it."""
    save_for_hf(timm_model(num_classes=7), str(tmp_path / "published"))
    return f"local-dir:{tmp_path / 'published'}"


def test_a_folder_of_timms_is_named_but_only_opened_if_the_user_says_so(
    tmp_path: Path, local_dir: str
) -> None:
    model = AdaptiveViT(local_dir, pretrained=True, num_classes=3, prompts=SMALL)
    model.save_adapter(tmp_path)
    saved = saved_backbone(tmp_path)
    assert (saved["name"], saved["architecture"], saved["args"]["depth"]) == (local_dir, NAME, 2)
    with pytest.raises(AdapterError) as raised:
        AdaptiveViT.from_adapter(tmp_path)
    assert f"if you trust that folder, pass it: backbone={local_dir!r}" in str(raised.value)
    built = AdaptiveViT.from_adapter(tmp_path, backbone=local_dir)
    assert same(built.state_dict(), model.state_dict())


def test_timm_models_of_the_users_are_named(tmp_path: Path, local_dir: str) -> None:
    assert AdaptiveViT(timm.create_model(local_dir, pretrained=True)).backbone_name == local_dir
    backbone = timm_model()
    AdaptiveViT(backbone, prompts=SMALL).save_adapter(tmp_path)
    saved = saved_backbone(tmp_path)
    assert saved["name"] == f"{NAME}.augreg_in21k_ft_in1k"
    assert saved["args"].items() >= {"depth": 2, "embed_dim": 24, "num_heads": 2}.items()
    backbone.pretrained_cfg |= {"source": "hf-hub", "hf_hub_id": "someone/model@v1"}
    assert AdaptiveViT(backbone).backbone_name == "hf-hub:someone/model@v1"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"name": "local-dir:/etc", "args": {}}, "no adapter may choose which files are opened"),
        ({"name": "LOCAL-DIR:/etc", "args": {}}, "no adapter may choose which files are opened"),
        ({"name": " local-dir:/etc", "args": {}}, "no adapter may choose which files are opened"),
        ({"name": NAME, "args": {"checkpoint_path": "/etc/passwd"}}, r"arguments .*, which no adapter may"),
        (
            {"name": NAME, "args": {"pretrained_cfg_overlay": {}}},
            r"arguments .*, which no adapter may",
        ),
    ],
)
def test_an_adapter_may_not_choose_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], message: str
) -> None:
    make_model().save_adapter(tmp_path)
    edit_config(tmp_path, lambda config: config["backbone"].update(told))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(AdapterError, match=message):
        AdaptiveViT.from_adapter(tmp_path)


def test_arguments_that_json_cannot_express(tmp_path: Path) -> None:
    model = AdaptiveViT(NAME, prompts=SMALL, img_size=32, depth=2, drop_rate=0.1, norm_layer=nn.LayerNorm)
    model.save_adapter(tmp_path)
    saved = saved_backbone(tmp_path)
    assert (saved["args"]["depth"], saved["args"]["drop_rate"]) == (2, 0.1)
    assert saved["args_left_out"] == ["norm_layer"]
    with pytest.raises(AdapterError, match=r"\['norm_layer'\], which JSON can't express.*backbone="):
        AdaptiveViT.from_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"include_backbone.*\['norm_layer'\]"):
        model.save_adapter(tmp_path, include_backbone=True)


@pytest.mark.parametrize("integer", [np.uint8, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("real", [np.float32, np.array, torch.tensor], ids=["numpy", "array", "torch"])
def test_numbers_of_numpy_and_torch(tmp_path: Path, integer: Callable, real: Callable) -> None:
    model = AdaptiveViT(
        NAME,
        prompts=PromptConfig(num_prompts=integer(2), projector_dropout=real(0.25)),
        num_classes=integer(3),
        img_size=(integer(32), integer(32)),
        depth=integer(2),
        drop_rate=real(0.5),
    )
    model.save_adapter(tmp_path, metadata={"best": real(0.5), "epochs": [integer(7)]}, include_backbone=True)
    config = adapters.read_config(tmp_path)
    expected = {"num_classes": 3, "depth": 2, "drop_rate": 0.5}
    assert config["backbone"]["args"].items() >= expected.items()
    assert config["prompts"].items() >= {"num_prompts": 2, "projector_dropout": 0.25}.items()
    assert config["metadata"] == {"best": 0.5, "epochs": [7]}
    assert same(AdaptiveViT.from_adapter(tmp_path).state_dict(), model.state_dict())
    model.reset_classifier(integer(5))
    model.set_input_size((integer(64), integer(32)))
    assert (type(model.num_classes), model.grid) == (int, (4, 2))


def test_a_timm_model_with_numpys_number_of_classes(tmp_path: Path) -> None:
    backbone = timm_model(num_classes=np.int64(4))
    AdaptiveViT(copy.deepcopy(backbone), prompts=SMALL).save_adapter(tmp_path)
    assert AdaptiveViT.from_adapter(tmp_path, backbone=backbone).num_classes == 4


# ---- files of weights


@pytest.mark.parametrize("how", ["checkpoint_path", "file"])
def test_a_file_of_weights_is_named_but_only_opened_if_the_user_says_so(tmp_path: Path, how: str) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm_model(seed=5).state_dict(), path)
    options: dict[str, Any] = {"checkpoint_path": str(path)}
    if how == "file":
        options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 3}}
    model = AdaptiveViT(NAME, prompts=SMALL, num_classes=3, **TINY, **options)
    model.save_adapter(tmp_path)
    saved = saved_backbone(tmp_path)
    assert saved["weights_path"] == str(path)
    assert not source.LOCAL_ARGS & saved["args"].keys()
    with pytest.raises(AdapterError) as raised:
        AdaptiveViT.from_adapter(tmp_path)
    assert f"if you trust that file, pass it: weights={str(path)!r}" in str(raised.value)
    built = AdaptiveViT.from_adapter(tmp_path, weights=path)
    assert same(built.state_dict(), model.state_dict())
    with pytest.raises(AdapterError, match=r"can't be made[\s\S]*no such file"):
        AdaptiveViT.from_adapter(tmp_path, weights=tmp_path / "nowhere")
    with pytest.raises(TypeError, match="weights are for a backbone that is made by its name"):
        AdaptiveViT.from_adapter(tmp_path, backbone=make_backbone(), weights=path)


def test_the_packages_own_weights_are_no_file_of_the_users(tmp_path: Path) -> None:
    AdaptiveViT("vit_digits_patch4_32", pretrained=True, prompts=SMALL).save_adapter(tmp_path)
    assert saved_backbone(tmp_path)["weights_path"] is None
    AdaptiveViT.from_adapter(tmp_path)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_files_of_weights(tmp_path: Path, key: str | None) -> None:
    state = timm_model().state_dict()
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "w.pth")
    backbone = timm_model(seed=1, num_classes=9)
    head = backbone.head.weight.clone()
    source.load_weights(backbone, tmp_path / "w.pth")
    for name, value in state.items():
        assert torch.equal(backbone.state_dict()[name], value) or name.startswith("head.")
    assert torch.equal(backbone.head.weight, head)


def test_files_of_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = timm_model().state_dict()
    del state["norm.weight"]
    torch.save(state | {"extra": torch.zeros(1), "cls_token": torch.zeros(1, 1, 5)}, tmp_path / "w.pth")
    backbone = timm_model(seed=1)
    with pytest.raises(ValueError, match="do not fit VisionTransformer") as raised:
        source.load_weights(backbone, tmp_path / "w.pth")
    assert str(raised.value).splitlines()[1:] == [
        "  - cls_token: shape (1, 1, 5), expected (1, 1, 24)",
        "  - norm.weight: missing, expected shape (24,)",
        "  - extra: unexpected",
    ]
    assert same(backbone.state_dict(), timm_model(seed=1).state_dict())


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(FileNotFoundError, match="no such file"):
        source.load_weights(timm_model(), path)
    for content in (b"", b"x" * 100, (tmp_path.name * 9).encode()):
        for name in ("w.pth", "w.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match="can't be read as a state dict"):
                source.load_weights(timm_model(), tmp_path / name)
    torch.save({"code": os.system}, path)
    with pytest.raises(ValueError, match="can't be read as a state dict"):
        source.load_weights(timm_model(), path)
    torch.save(AdaptiveViT(timm_model(), prompts=SMALL).state_dict(), path)
    with pytest.raises(ValueError, match="of a whole AdaptiveViT"):
        source.load_weights(timm_model(), path)


# ---- the backbone in the folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [NAME, "deit_tiny_distilled_patch16_224"])
def test_a_folder_with_its_backbone_needs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    backbone = timm_model(name=name, drop_rate=0.1)
    model = AdaptiveViT(backbone, prompts=SMALL).to(dtype).eval()
    model.save_adapter(tmp_path, include_backbone=True)
    digits = saved_backbone(tmp_path)["file_sha256"][:16]
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS, f"backbone-{digits}.safetensors"]
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: pytest.fail("downloaded"))
    built = AdaptiveViT.from_adapter(tmp_path)
    assert same(built.state_dict(), model.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    assert torch.equal(built(images), model(images))
    assert not any(p.requires_grad for n, p in built.named_parameters() if n.startswith("backbone.blocks"))
    # the adapter alone also goes into a backbone of the user's
    AdaptiveViT.from_adapter(tmp_path, backbone=copy.deepcopy(backbone))


def test_a_damaged_or_missing_backbone_is_refused(tmp_path: Path) -> None:
    AdaptiveViT(timm_model(), prompts=SMALL).save_adapter(tmp_path, include_backbone=True)
    (path,) = tmp_path.glob("backbone-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="sha256 differs"):
        AdaptiveViT.from_adapter(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        AdaptiveViT.from_adapter(tmp_path)


def test_a_backbone_that_timm_cannot_make_again_is_not_included(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"a backbone that timm.create_model has made; .*backbone="):
        make_model().save_adapter(tmp_path / "new", include_backbone=True)
    backbone = timm_model()
    backbone.blocks[1].attn.proj = nn.Sequential(backbone.blocks[1].attn.proj)
    model = AdaptiveViT(backbone, prompts=SMALL)
    with pytest.raises(AdapterError, match=r"which was changed: \['blocks.1.attn.proj.0.weight'"):
        model.save_adapter(tmp_path / "new", include_backbone=True)
    assert not (tmp_path / "new").exists()


def test_a_quantised_backbone(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = make_model()
    model.save_adapter(tmp_path / "exact")
    torchao.quantize_(model.backbone, torchao.Int8WeightOnlyConfig())
    model.save_adapter(tmp_path / "quantised")
    with pytest.raises(AdapterError, match="include_backbone"):
        model.save_adapter(tmp_path / "whole", include_backbone=True)
    model.load_adapter(tmp_path / "quantised")
    with pytest.raises(AdapterError, match="quantised copy"):
        model.load_adapter(tmp_path / "exact")
    model.load_adapter(tmp_path / "exact", check_backbone=False)


def test_random_weights_are_told(tmp_path: Path) -> None:
    model = AdaptiveViT("vit_digits_patch4_32", prompts=SMALL)
    model.save_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"pretrained=False.*include_backbone=True"):
        AdaptiveViT.from_adapter(tmp_path)
    model.save_adapter(tmp_path, include_backbone=True)
    assert same(AdaptiveViT.from_adapter(tmp_path).state_dict(), model.state_dict())


# ---- resampled positions


def test_resampled_positions_come_back(tmp_path: Path) -> None:
    """From one size to another and back, the backbone is the same, and its adapters fit again."""
    model = AdaptiveViT(timm_model(), prompts=SMALL).eval()
    model.set_input_size((64, 48))
    model.save_adapter(tmp_path / "other")
    model.set_input_size((96, 96))
    model.set_input_size((32, 32))
    assert same(model.backbone.state_dict(), AdaptiveViT(timm_model()).backbone.state_dict())
    model.save_adapter(tmp_path / "back")
    built = AdaptiveViT.from_adapter(tmp_path / "back", backbone=timm_model())
    assert same(built.state_dict(), model.state_dict())
    direct = timm_model()
    direct.set_input_size((64, 48))
    AdaptiveViT.from_adapter(tmp_path / "other", backbone=direct)


def test_positions_of_a_state_dict_are_the_new_originals() -> None:
    model, other = (AdaptiveViT(timm_model(seed), prompts=SMALL) for seed in (0, 1))
    expected = timm_model(1)
    for one in (model, other, expected):
        one.set_input_size((64, 64))
    model.load_state_dict(other.state_dict())
    for one in (model, expected):
        one.set_input_size((32, 32))
    assert torch.equal(model.backbone.pos_embed, expected.pos_embed)
    assert not torch.equal(model.backbone.pos_embed, timm_model(0).pos_embed)
