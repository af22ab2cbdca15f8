"""The public implementation's state dicts: its results from its weights, and bit-equal round trips."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import OPTIONS, Golden, official_grads
from timm.layers import QuickGELU
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

import vapt_fast
from vapt_fast import AdaptiveViT, PromptConfig, from_official, to_official
from vapt_fast.official import PATCHES


@pytest.fixture(scope="module", params=OPTIONS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def default() -> Golden:
    return Golden("official_vapt_default")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
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
    learned = {id(parameter) for _, parameter in model.named_adapter_parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == learned
    assert {id(p) for p in model.parameters() if p.grad is not None} == learned
    for name, expected in golden.grads.items():
        error = grads[name] - expected
        assert error.norm() <= 1e-8 * expected.norm(), name
        assert error.abs().max() <= 1e-8 * expected.abs().max(), name


def test_golden_round_trip(golden: Golden) -> None:
    model, config = golden.model(), golden.config
    assert_same(to_official(model), golden.state)
    backbone, block = model.backbone, model.backbone.blocks[0]
    assert (model.grid, model.num_classes) == ((14, 14), config["num_classes"])
    assert (len(backbone.blocks), backbone.embed_dim) == (config["depth"], config["embed_dim"])
    assert (block.mlp.fc1.out_features, block.attn.num_heads) == (config["mlp_dim"], config["num_heads"])
    assert block.norm1.eps == 1e-6


def test_nothing_is_shared_with_the_state_dict(default: Golden) -> None:
    state = {name: value.clone() for name, value in default.state.items()}
    model = from_official(state, num_heads=4, prompts=default.prompts)
    for values in (state, to_official(model)):
        for value in values.values():
            value.zero_()
        assert_same(to_official(model), default.state)


# ---- every kind and option

VARIANTS = [
    {},
    {"num_prompts": 0},
    {"kind": "deep"},
    {"kind": "shallow"},
    {"static_depth": 9},
    {"static_depth": 0, "projector_dim": None},
    {"static_depth": 3, "conv_kernel": 4, "projector_activation": "gelu", "projector_dim": 5},
    {"conv_kernel": None, "projector_shared": False},
    {"conv_kernel": None, "projector_dim": None},
    {"conv_kernel": 1, "projector_scale_learnable": True},
    {"conv_kernel": 3, "conv_padding": 2},
    {"conv_shared": False, "projector_shared": False, "projector_scale_learnable": True},
    {"conv_shared": False, "conv_kernel": 3, "conv_padding": 1},
]


def make_model(prompts: dict[str, Any], **vit_options: Any) -> AdaptiveViT:
    vit: dict[str, Any] = {
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
    config = PromptConfig(**{"num_prompts": 2} | prompts)
    model = AdaptiveViT(VisionTransformer(**vit | vit_options), prompts=config)
    with torch.no_grad():  # also what starts as zeros or ones must be seen to arrive
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_round_trip(options: dict[str, Any]) -> None:
    """In both directions, bit for bit; and the same logits by both ways of computing them."""
    model = make_model(options).double()
    state = to_official(model)
    again = from_official(state, num_heads=2, prompts=model.config).eval()
    assert again.config == model.config
    assert_same(again.state_dict(), model.state_dict())
    assert_same(to_official(again), state)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(again(images), model(images))
    with vapt_fast.use_backend("reference"):
        expected = model(images)
    torch.testing.assert_close(again(images), expected, rtol=0, atol=1e-9)


def test_names_that_no_golden_model_has() -> None:
    model = make_model({"conv_kernel": None, "static_depth": 3})
    state = {name.removeprefix("transformer."): value for name, value in to_official(model).items()}
    projection = model.prompts.blocks[3].token_projection
    assert torch.equal(state["deep_prompt_downsample.0.weight"], projection.weight)
    assert torch.equal(state["deep_prompt_downsample.0.bias"], projection.bias)
    for i in (1, 2):  # in their order
        assert torch.equal(state["deep_prompt_embeddings"][i - 1], model.prompts.blocks[i].table)


@pytest.mark.parametrize(
    ("vit", "img_size"),
    [
        ({"img_size": (16, 40)}, (np.int64(16), torch.tensor(40))),
        ({"img_size": (8, 12), "patch_size": (4, 6), "in_chans": 1, "mlp_ratio": 2.25}, (8, 12)),
        ({}, 32),
    ],
    ids=str,
)
def test_other_geometries_and_dtypes(vit: dict[str, Any], img_size: Any) -> None:
    model = make_model({"conv_kernel": None}, **vit)
    model.backbone.bfloat16()
    again = from_official(to_official(model), num_heads=np.int32(2), prompts=model.config, img_size=img_size)
    assert again.grid == model.grid
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
    messages = (
        r"head.bias: shape \(8,\), expected \(7,\)",
        r"transformer.encoder.layer.2.attn.query.bias: missing, expected shape \(64,\)",
        r"enc.extra: unexpected",
        r"transformer.encoder.encoder_norm.weight: dtype torch.int64, expected floating-point numbers",
        r".*query.weight, .*value.weight: must have one dtype, got \['torch.float32', 'torch.float64'\]",
    )
    assert re.fullmatch(
        "".join(rf"\n  - {message}" for message in messages), str(raised.value).partition(":")[2]
    )


WIDE = {"img_size": (16, 40)}
NO_CONV = {"conv_kernel": None}


@pytest.mark.parametrize(
    ("vit", "state", "arguments", "message"),
    [
        ({}, {}, {"num_prompts": 6}, "prompts.num_prompts is 6, the tensors tell 2"),
        (
            {},
            {},
            {"static_depth": 2},
            "makes 2 static tables and 2 adaptive blocks of 4, the tensors have",
        ),
        (
            {},
            {},
            {"kind": "deep"},
            "makes 4 static tables and 0 adaptive blocks of 4, the tensors have",
        ),
        ({}, {}, {"conv_kernel": None}, "prompts.conv_kernel is None, the tensors tell 2"),
        ({}, {}, {"conv_kernel": 3}, "prompts.conv_kernel is 3, the tensors tell 2"),
        ({}, {}, {"conv_padding": 1}, "prompts.conv_padding is 1, the tensors tell 0"),
        ({}, {}, {"conv_shared": False}, "prompts.conv_shared is False, the tensors tell True"),
        ({}, {}, {"projector_dim": 4}, "prompts.projector_dim is 4, the tensors tell 8"),
        ({}, {}, {"projector_dim": None}, "prompts.projector_dim is None, the tensors tell 8"),
        ({}, {}, {"projector_shared": False}, "prompts.projector_shared is False, the tensors tell True"),
        (
            {},
            {},
            {"projector_scale_learnable": True},
            "learnable is True, the tensors tell False",
        ),
        ({}, {}, {"pool_prompts": True}, "pool_prompts=True needs"),
        ({"prompts": NO_CONV}, {}, {}, "prompts.conv_kernel is 2, the tensors tell None"),
        (
            {},
            {f"{PATCHES}.weight": None},
            {},
            "weight: expected shape (C, channels, height, width), got no",
        ),
        ({}, {"head.weight": torch.zeros(7)}, {}, "head.weight: expected shape (classes, C), got (7,)"),
        ({}, {}, {"num_heads": 0}, "num_heads must divide the 12 channels"),
        ({}, {}, {"num_heads": -4}, "num_heads must divide the 12 channels"),
        ({}, {}, {"num_heads": 5}, "num_heads must divide the 12 channels"),
        (WIDE, {}, {}, "10 patches, expected a square grid of patches; for other images pass img_size"),
        (WIDE, {}, {"img_size": (32, 40)}, "10 patches, expected 4x5 patches"),
    ],
    ids=str,
)
def test_contradictions(vit: dict, state: dict, arguments: dict, message: str) -> None:
    given = to_official(make_model(**{"prompts": {}} | vit)) | state
    given = {name: value for name, value in given.items() if value is not None}
    others = {"num_heads": 2} | {k: v for k, v in arguments.items() if k in ("num_heads", "img_size")}
    prompts = {"num_prompts": 2} | {k: v for k, v in arguments.items() if k not in others}
    with pytest.raises(ValueError, match=re.escape(message)):
        from_official(given, prompts=PromptConfig(**prompts), **others)


def test_wrong_types(default: Golden) -> None:
    with pytest.raises(TypeError, match="num_heads must be an int"):
        from_official(default.state, num_heads=4.0, prompts=default.prompts)
    with pytest.raises(TypeError, match=r"img_size must be \(height, width\) in pixels"):
        from_official(default.state, num_heads=4, prompts=default.prompts, img_size=(32, 32, 3))
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
def test_models_without_a_public_form(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="do not fit") as raised:
        to_official(make_model({}, **options))
    assert message in str(raised.value)
