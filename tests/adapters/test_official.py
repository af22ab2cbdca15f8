"""The public implementation's state dicts: its results from its weights, and bit-equal round trips."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.layers import QuickGELU
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

import vapt_fast
from vapt_fast import AdaptiveViT, PromptConfig, from_official, to_official

GOLDEN = Path(__file__).parent / "golden"
OPTIONS = {
    "official_vapt_default": PromptConfig(num_prompts=5),
    "official_vapt_variant": PromptConfig(
        num_prompts=4,
        static_depth=2,
        conv_kernel=3,
        conv_shared=False,
        projector_activation="gelu",
        projector_shared=False,
        projector_scale_learnable=True,
    ),
}


class Golden:
    """A tiny model of the public implementation: weights, input, and what it computed in float64."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.config = json.loads(file.metadata()["config"])
        self.state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        self.grads = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
        self.image, self.target = tensors["image"].double(), tensors["target"]
        self.logits, self.loss = tensors["logits"], tensors["loss"]
        self.prompts = OPTIONS[name]

    def model(self) -> AdaptiveViT:
        return from_official(self.state, num_heads=self.config["num_heads"], prompts=self.prompts)


@pytest.fixture(scope="module", params=OPTIONS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def default() -> Golden:
    return Golden("official_vapt_default")


def official_grads(model: AdaptiveViT) -> dict[str, torch.Tensor]:
    """The gradients of ``model`` under the public names: those of a copy that has them for weights."""
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for own, parameter in zip(shadow.parameters(), model.parameters(), strict=True):
            own.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return to_official(shadow)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# ---- the public implementation's results


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_golden(golden: Golden, backend: str) -> None:
    model = golden.model().double().eval()
    with vapt_fast.use_backend(backend):
        logits = model(golden.image)
        loss = F.cross_entropy(logits, golden.target)
        loss.backward()
    torch.testing.assert_close(logits, golden.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(loss.reshape(1), golden.loss.reshape(1), rtol=0, atol=1e-9)

    grads = official_grads(model)
    trained = {id(parameter) for _, parameter in model.named_adapter_parameters()}
    assert {id(parameter) for parameter in model.parameters() if parameter.grad is not None} == trained
    for name, expected in golden.grads.items():
        error = grads[name] - expected
        assert error.norm() <= 1e-8 * expected.norm(), name
        assert error.abs().max() <= 1e-8 * expected.abs().max(), name


def test_golden_round_trip(golden: Golden) -> None:
    assert_same(to_official(golden.model()), golden.state)


def test_dimensions_come_from_shapes(golden: Golden) -> None:
    model, config = golden.model(), golden.config
    assert (model.grid, model.num_classes) == ((14, 14), config["num_classes"])
    block = model.backbone.blocks[0]
    assert len(model.backbone.blocks) == config["depth"]
    assert model.backbone.embed_dim == config["embed_dim"]
    assert (block.mlp.fc1.out_features, block.attn.num_heads) == (config["mlp_dim"], config["num_heads"])
    assert block.norm1.eps == 1e-6


def test_nothing_is_shared_with_the_state_dict(default: Golden) -> None:
    state = {name: value.clone() for name, value in default.state.items()}
    model = from_official(state, num_heads=4, prompts=default.prompts)
    for value in state.values():
        value.zero_()
    back = to_official(model)
    assert_same(back, default.state)
    for value in back.values():
        value.zero_()
    assert_same(to_official(model), default.state)


def test_only_prompts_and_head_are_trainable(golden: Golden) -> None:
    model = golden.model()
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for _, parameter in model.named_adapter_parameters()}


# ---- every kind and option

VARIANTS = {
    "default": {},
    "no_prompts": {"num_prompts": 0},
    "deep": {"kind": "deep"},
    "shallow": {"kind": "shallow"},
    "all_static": {"static_depth": 9},
    "adaptive_from_block_0": {"static_depth": 0},
    "three_static": {"static_depth": 3},
    "no_conv": {"conv_kernel": None},
    "no_conv_no_projector": {"conv_kernel": None, "projector_dim": None},
    "no_conv_own_projectors": {"conv_kernel": None, "projector_shared": False},
    "kernel_1": {"conv_kernel": 1},
    "kernel_4": {"conv_kernel": 4},
    "padded": {"conv_kernel": 3, "conv_padding": 1},
    "padded_twice": {"conv_kernel": 3, "conv_padding": 2},
    "depthwise": {"conv_shared": False},
    "depthwise_padded": {"conv_shared": False, "conv_kernel": 3, "conv_padding": 1},
    "wide_projector": {"projector_dim": 5},
    "gelu": {"projector_activation": "gelu"},
    "sigmoid": {"projector_activation": "sigmoid"},
    "softmax": {"projector_activation": "softmax"},
    "identity": {"projector_activation": "identity"},
    "no_projector": {"projector_dim": None},
    "own_projectors": {"projector_shared": False},
    "scaled": {"projector_scale_learnable": True},
    "own_scaled_projectors": {"projector_shared": False, "projector_scale_learnable": True},
}


def make_model(config: PromptConfig, **vit_options: object) -> AdaptiveViT:
    options = {
        "img_size": (32, 32),
        "patch_size": 8,
        "num_classes": 3,
        "embed_dim": 12,
        "depth": 4,
        "num_heads": 2,
        "mlp_ratio": 1.5,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    torch.manual_seed(0)
    model = AdaptiveViT(VisionTransformer(**options | vit_options), prompts=config)
    with torch.no_grad():  # also what starts as zeros or ones must be seen to arrive
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name: str) -> None:
    """In both directions, bit for bit; and the same logits and gradients by both ways of computing them."""
    config = PromptConfig(**{"num_prompts": 2, **VARIANTS[name]})
    model = make_model(config).double()
    state = to_official(model)
    again = from_official(state, num_heads=2, prompts=config).eval()
    assert again.config == config
    assert_same(again.state_dict(), model.state_dict())
    assert_same(to_official(again), state)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(again(images), model(images))
    with vapt_fast.use_backend("reference"):
        expected = model(images)
    torch.testing.assert_close(again(images), expected, rtol=0, atol=1e-9)


def test_names_without_a_convolution() -> None:
    state = to_official(make_model(PromptConfig(num_prompts=2, conv_kernel=None)))
    names = {name: tuple(value.shape) for name, value in state.items() if "downsample" in name}
    assert names == {
        f"transformer.deep_prompt_downsample.{j}.{leaf}": shape
        for j in range(3)
        for leaf, shape in (("weight", (2, 16)), ("bias", (2,)))
    }


def test_what_no_name_can_express_is_refused() -> None:
    state = to_official(make_model(PromptConfig(num_prompts=2)))
    with pytest.raises(ValueError, match="pool_prompts=True needs"):
        from_official(state, num_heads=2, prompts=PromptConfig(num_prompts=2, pool_prompts=True))


@pytest.mark.parametrize(("saved", "given"), [(None, 2), (2, None)])
def test_a_convolution_that_is_not_there(saved: int | None, given: int | None) -> None:
    state = to_official(make_model(PromptConfig(num_prompts=2, conv_kernel=saved)))
    with pytest.raises(ValueError, match=f"prompts.conv_kernel is {given}, the tensors tell {saved}"):
        from_official(state, num_heads=2, prompts=PromptConfig(num_prompts=2, conv_kernel=given))


def test_numbers_of_numpy() -> None:
    config = PromptConfig(num_prompts=2)
    state = to_official(make_model(config, img_size=(16, 40)))
    size = (np.int64(16), torch.tensor(40))
    assert_same(
        to_official(from_official(state, num_heads=np.int32(2), prompts=config, img_size=size)), state
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("deep", {"prompt_embeddings": (1, 2, 12), "deep_prompt_embeddings": (3, 2, 12)}),
        ("shallow", {"prompt_embeddings": (1, 2, 12)}),
    ],
)
def test_names_of_vpt(kind: str, expected: dict[str, tuple[int, ...]]) -> None:
    state = to_official(make_model(PromptConfig(kind=kind, num_prompts=2)))
    assert {k: tuple(v.shape) for k, v in state.items() if "prompt" in k} == {
        f"transformer.{name}": shape for name, shape in expected.items()
    }


def test_tables_keep_their_order() -> None:
    model = make_model(PromptConfig(kind="deep", num_prompts=2))
    state = to_official(model)
    assert torch.equal(state["transformer.prompt_embeddings"][0], model.prompts.blocks[0].table)
    for i in (1, 2, 3):
        assert torch.equal(state["transformer.deep_prompt_embeddings"][i - 1], model.prompts.blocks[i].table)


def test_mixed_dtypes_are_kept() -> None:
    config = PromptConfig(num_prompts=2)
    state = {
        name: value if "prompt" in name else value.bfloat16()
        for name, value in to_official(make_model(config)).items()
    }
    model = from_official(state, num_heads=2, prompts=config)
    assert model.backbone.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert_same(to_official(model), state)


def test_images_that_are_not_square() -> None:
    config = PromptConfig(num_prompts=2)
    model = make_model(config, img_size=(16, 40))
    state = to_official(model)
    with pytest.raises(ValueError, match=r"10 patches, expected a square grid.*pass img_size"):
        from_official(state, num_heads=2, prompts=config)
    with pytest.raises(ValueError, match="10 patches, expected 4x5 patches"):
        from_official(state, num_heads=2, prompts=config, img_size=(32, 40))
    again = from_official(state, num_heads=2, prompts=config, img_size=(16, 40))
    assert again.grid == (2, 5)
    assert_same(to_official(again), state)


def test_other_channels_and_patches() -> None:
    config = PromptConfig(num_prompts=2, conv_kernel=None)
    model = make_model(config, img_size=(8, 12), patch_size=(4, 6), in_chans=1, mlp_ratio=2.25)
    again = from_official(to_official(model), num_heads=2, prompts=config, img_size=(8, 12))
    assert_same(again.state_dict(), model.state_dict())


# ---- refusals


def test_all_misfits_are_listed(default: Golden) -> None:
    state = dict(default.state)
    del state["transformer.encoder.layer.2.attn.query.bias"]
    state["enc.extra"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(8)
    state["transformer.encoder.encoder_norm.weight"] = torch.zeros(64, dtype=torch.int64)
    state["transformer.encoder.layer.0.attn.key.weight"] = torch.zeros(64, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="do not fit") as raised:
        from_official(state, num_heads=4, prompts=default.prompts)
    lines = str(raised.value).splitlines()[1:]
    assert len(lines) == 5
    for part in (
        r"layer.2.attn.query.bias: missing, expected shape (64,)",
        r"enc.extra: unexpected",
        r"head.bias: shape (8,), expected (7,)",
        r"encoder_norm.weight: dtype torch.int64",
        r"must have one dtype, got ['torch.float32', 'torch.float64']",
    ):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_prompts": 6}, "prompts.num_prompts is 6, the tensors tell 5"),
        ({"static_depth": 2}, "makes 2 static tables and 2 adaptive blocks of 4, the tensors have 1 and 3"),
        ({"kind": "deep"}, "makes 4 static tables and 0 adaptive blocks of 4, the tensors have 1 and 3"),
        ({"conv_kernel": None}, "prompts.conv_kernel is None, the tensors tell 2"),
        ({"conv_kernel": 3}, "prompts.conv_kernel is 3, the tensors tell 2"),
        ({"conv_padding": 1}, "prompts.conv_padding is 1, the tensors tell 0"),
        ({"conv_shared": False}, "prompts.conv_shared is False, the tensors tell True"),
        ({"projector_dim": 4}, "prompts.projector_dim is 4, the tensors tell 8"),
        ({"projector_dim": None}, "prompts.projector_dim is None, the tensors tell 8"),
        ({"projector_shared": False}, "prompts.projector_shared is False, the tensors tell True"),
        ({"projector_scale_learnable": True}, "projector_scale_learnable is True, the tensors tell False"),
    ],
)
def test_options_that_contradict_the_tensors(default: Golden, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match="do not fit") as raised:
        from_official(default.state, num_heads=4, prompts=replace(default.prompts, **change))
    assert message in str(raised.value)


def test_a_state_dict_of_another_kind_of_model(default: Golden) -> None:
    backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"patch_embeddings.weight: expected shape .* got no such tensor"):
        from_official(backbone.state_dict(), num_heads=2, prompts=PromptConfig())
    squeezed = dict(default.state, **{"head.weight": torch.zeros(7)})
    with pytest.raises(ValueError, match=r"head.weight: expected shape \(classes, C\), got \(7,\)"):
        from_official(squeezed, num_heads=4, prompts=default.prompts)


@pytest.mark.parametrize("num_heads", [0, -4, 5])
def test_num_heads_must_divide_the_channels(default: Golden, num_heads: int) -> None:
    with pytest.raises(ValueError, match="num_heads must divide the 64 channels"):
        from_official(default.state, num_heads=num_heads, prompts=default.prompts)


def test_wrong_types(default: Golden) -> None:
    with pytest.raises(TypeError, match="num_heads must be an int"):
        from_official(default.state, num_heads=4.0, prompts=default.prompts)
    with pytest.raises(TypeError, match=r"tensors only.*\['epoch'\]"):
        from_official({**default.state, "epoch": 3}, num_heads=4, prompts=default.prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "avg"}, "global_pool: 'avg', expected 'token'"),
        ({"no_embed_class": True}, "pos_embed: has no row for the class token"),
        ({"reg_tokens": 2}, "backbone.reg_token: has no public name"),
        ({"init_values": 0.1}, "backbone.blocks.0.ls1.gamma: has no public name"),
        ({"qkv_bias": False}, "backbone.blocks.0.attn.qkv.bias: missing, but has a public name"),
        ({"num_classes": 0}, "head.weight: missing, but has a public name"),
        ({"act_layer": QuickGELU}, "mlp.act: QuickGELU(), expected the exact GELU"),
        ({"act_layer": partial(nn.GELU, approximate="tanh")}, "expected the exact GELU"),
        ({"norm_layer": partial(nn.LayerNorm, eps=1e-5)}, "norm1: eps 1e-05, expected 1e-06"),
        ({"block_fn": ResPostBlock}, "ResPostBlock, expected timm's Block"),
    ],
)
def test_models_without_a_public_form(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="do not fit") as raised:
        to_official(make_model(PromptConfig(num_prompts=2), **options))
    assert message in str(raised.value)
