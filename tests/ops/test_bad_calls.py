"""Bad calls: the exact exception, a message with what was given and what is expected, no change."""

import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vapt_fast
from vapt_fast import (
    AdapterError,
    AdaptiveViT,
    BackendUnavailableError,
    PromptConfig,
    functional,
    use_backend,
)

Z = torch.zeros


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AdaptiveViT("test_vit", prompts=PromptConfig(num_prompts=3), num_classes=4)


@pytest.fixture
def adapter(model, tmp_path):
    model.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def snapshot(model):
    """Everything a bad call could have changed: tensors, which of them learn, modes, the random state."""
    modes = [module.training for module in model.modules()]
    learn = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, (modes, learn, model.backbone_args, model.grid), torch.get_rng_state()


def assert_unchanged(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])


# ---- options

CONFIG = [
    (
        {"kind": "vapt"},
        ValueError,
        "kind must be one of ('adaptive', 'deep', 'fourier', 'kv', 'shallow'), got 'vapt'",
    ),
    (
        {"kind": None},
        TypeError,
        "kind must be a str, one of ('adaptive', 'deep', 'fourier', 'kv', 'shallow'), got None",
    ),
    ({"num_prompts": -1}, ValueError, "num_prompts must be at least 0, got -1"),
    ({"num_prompts": 2.0}, TypeError, "num_prompts must be an int, got 2.0"),
    ({"num_prompts": True}, TypeError, "num_prompts must be an int, got True"),
    ({"static_depth": -2}, ValueError, "static_depth must be at least 0, got -2"),
    ({"static_depth": "1"}, TypeError, "static_depth must be an int, got '1'"),
    ({"conv_kernel": 0}, ValueError, "conv_kernel must be at least 1, got 0"),
    ({"conv_kernel": (2, 2)}, TypeError, "conv_kernel must be an int, got (2, 2)"),
    ({"conv_padding": -1}, ValueError, "conv_padding must be at least 0, got -1"),
    ({"conv_padding": 2}, ValueError, "conv_padding must be smaller than conv_kernel (2), got 2"),
    (
        {"conv_kernel": None, "conv_padding": 1},
        ValueError,
        "conv_padding must be smaller than conv_kernel (None), got 1",
    ),
    ({"conv_shared": 1}, TypeError, "conv_shared must be a bool, got 1"),
    ({"projector_dim": 0}, ValueError, "projector_dim must be at least 1, got 0"),
    ({"projector_dim": 8.0}, TypeError, "projector_dim must be an int, got 8.0"),
    ({"projector_shared": None}, TypeError, "projector_shared must be a bool, got None"),
    ({"projector_activation": "tanh"}, ValueError, "projector_activation must be one of ('relu', 'gelu', "),
    ({"projector_activation": nn.ReLU}, TypeError, "projector_activation must be a str, one of "),
    ({"projector_dropout": 1.0}, ValueError, "projector_dropout must be in [0, 1), got 1.0"),
    ({"projector_dropout": "0.1"}, TypeError, "projector_dropout must be a float, got '0.1'"),
    ({"prompt_dropout": -0.1}, ValueError, "prompt_dropout must be in [0, 1), got -0.1"),
    ({"channel_dropout": float("nan")}, ValueError, "channel_dropout must be in [0, 1), got nan"),
    ({"projector_scale_learnable": "no"}, TypeError, "projector_scale_learnable must be a bool, got 'no'"),
    ({"pool_prompts": 0}, TypeError, "pool_prompts must be a bool, got 0"),
]


@pytest.mark.parametrize(("options", "error", "message"), CONFIG, ids=lambda v: str(v)[:40])
def test_options(options, error, message):
    with pytest.raises(error) as caught:
        PromptConfig(**options)
    assert caught.type is error
    assert message in str(caught.value)


def test_unknown_option():
    with pytest.raises(TypeError, match=r"unknown prompt options \['prompts'\], expected some of \['kind', "):
        PromptConfig.from_dict({"prompts": 5})


# ---- making a model

MODELS = [
    (
        lambda: AdaptiveViT(nn.Linear(2, 2)),
        NotImplementedError,
        "backbone Linear (family 'linear') is not supported",
    ),
    (
        lambda: AdaptiveViT("resnet10t"),
        NotImplementedError,
        "backbone ResNet (family 'resnet') is not supported: its tokens do not form one sequence",
    ),
    (
        lambda: AdaptiveViT("vit_bas_patch16_224"),
        ValueError,
        "backbone 'vit_bas_patch16_224' is no timm model; similar names: ",
    ),
    (
        lambda: AdaptiveViT("vapt_vit_base_patch16_224"),
        ValueError,
        "got 'vapt_vit_base_patch16_224'; use 'vit_base_patch16_224' here, or timm.create_model",
    ),
    (lambda: AdaptiveViT(None), TypeError, "backbone must be a timm model or the name of one, got NoneType"),
    (
        lambda: AdaptiveViT(AdaptiveViT("test_vit")),
        TypeError,
        "backbone must be a timm model without prompts, got an AdaptiveViT",
    ),
    (
        lambda: AdaptiveViT("test_vit", prompts={"num_prompts": 3}),
        TypeError,
        "prompts must be a PromptConfig, got dict",
    ),
    (lambda: AdaptiveViT("test_vit", prompts=10), TypeError, "prompts must be a PromptConfig, got int"),
    (lambda: AdaptiveViT("test_vit", features_only=True), ValueError, "use forward_intermediates"),
    (
        lambda: AdaptiveViT(timm.create_model("test_vit"), img_size=64),
        TypeError,
        "options ['img_size'] need the name of a backbone",
    ),
    (
        lambda: AdaptiveViT(timm.create_model("test_vit"), pretrained=True),
        ValueError,
        "pretrained=True needs the name of a backbone",
    ),
    (
        lambda: AdaptiveViT(timm.create_model("test_vit"), num_classes=-1),
        ValueError,
        "num_classes must be at least 0, got -1",
    ),
    (
        lambda: AdaptiveViT("vit_base_patch16_gap_224", patch_drop_rate=0.5, depth=1),
        NotImplementedError,
        "backbone has patch_drop_rate > 0",
    ),
    (
        lambda: AdaptiveViT("test_vit", prompts=PromptConfig(pool_prompts=True)),
        ValueError,
        "pool_prompts=True needs a backbone with global_pool in ('avg', 'avgmax', 'max'), got 'token'",
    ),
    (
        lambda: AdaptiveViT("test_vit", img_size=32, prompts=PromptConfig(conv_kernel=3)),
        ValueError,
        "conv_kernel=3 with conv_padding=0 does not fit the 2x2 patch grid",
    ),
    (
        lambda: AdaptiveViT("test_vit", backend="tritn"),
        ValueError,
        "backend must be one of ('auto', 'reference', 'torch', 'triton', 'cuda'), got 'tritn'",
    ),
    (
        lambda: AdaptiveViT("test_vit", backend=1),
        TypeError,
        "backend must be a str, one of ('auto', 'reference', 'torch', 'triton', 'cuda'), got 1",
    ),
    (lambda: AdaptiveViT("test_vit", backend="cuda"), BackendUnavailableError, "backend 'cuda' can't run: "),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), MODELS, ids=lambda v: v[:30] if isinstance(v, str) else ""
)
def test_making_a_model(call, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert caught.type is error


# ---- using it

CALLS = [
    (lambda m: m([1, 2]), TypeError, "images must be a tensor, got list"),
    (
        lambda m: m(Z(3, 160, 160)),
        ValueError,
        "images must be (B, in_chans=3, height, width), got (3, 160, 160)",
    ),
    (
        lambda m: m(Z(1, 1, 160, 160)),
        ValueError,
        "images must be (B, in_chans=3, height, width), got (1, 1, ",
    ),
    (
        lambda m: m(Z(1, 3, 160, 160, dtype=torch.uint8)),
        TypeError,
        "floating dtype, got torch.uint8; normalise",
    ),
    (lambda m: m(Z(1, 3, 160, 160).double()), TypeError, "dtype torch.float32, got torch.float64"),
    (lambda m: m(Z(1, 3, 160, 160, device="meta")), ValueError, "on the model's device cpu, got meta"),
    (
        lambda m: m(Z(1, 3, 224, 224)),
        ValueError,
        "images must be 160x160 pixels (the prompts are made for 10x10 patches), got 224x224; resize the "
        "images, or call model.set_input_size((224, 224))",
    ),
    (lambda m: m(Z(1, 3, 160, 176)), ValueError, "got 160x176"),
    (lambda m: m.forward_intermediates(Z(1, 3, 160, 160), output_fmt="NHWC"), ValueError, "got 'NHWC'"),
    (
        lambda m: m.set_input_size((100, 160)),
        ValueError,
        "multiple of the patch size (16, 16), got (100, 160)",
    ),
    (lambda m: m.set_input_size((16, 160)), ValueError, "does not fit the 1x10 patch grid"),
    (lambda m: m.set_input_size("160"), TypeError, "img_size must be (height, width) in pixels, got '160'"),
    (lambda m: m.set_input_size((160, 0)), ValueError, "img_size must be positive, got (160, 0)"),
    (lambda m: m.set_input_size(patch_size=(16,)), TypeError, "patch_size must be (height, width) in pixels"),
    (lambda m: m.reset_classifier("10"), TypeError, "num_classes must be an int, got '10'"),
    (lambda m: m.reset_classifier(-3), ValueError, "num_classes must be at least 0, got -3"),
    (
        lambda m: m.reset_classifier(3, "mean"),
        ValueError,
        "global_pool='mean' does not suit VisionTransformer",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), CALLS, ids=lambda v: v[:40] if isinstance(v, str) else ""
)
def test_using_a_model(model, call, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(message)) as caught:
        call(model)
    assert caught.type is error
    assert_unchanged(before, snapshot(model))


# ---- the ops


def norm(x=(2, 6, 4), branch=(2, 6, 4), **shapes):
    tensors = {name: Z(shape) for name, shape in shapes.items()}
    return functional.add_norm(Z(x), None if branch is None else Z(branch), **tensors)


def pool(x=(2, 6, 4), matrix=(3, 5), weight=(4,), bias=(4,), num_prefix=1, dtype=torch.float32, **residual):
    tensors = (Z(x, dtype=dtype), Z(matrix), Z(weight), Z(bias))
    residual = {name: Z(shape) for name, shape in residual.items()}
    return functional.prompt_pool(*tensors, num_prefix=num_prefix, **residual)


def pool_with(num_prefix=1, **options):
    return functional.prompt_pool(Z(2, 6, 4), Z(3, 5), Z(4), Z(4), num_prefix=num_prefix, **options)


def project(pooled=(2, 3, 4), bias=(3,), down=(5, 4), up=(4, 5), **options):
    weights = [None if shape is None else Z(shape) for shape in (down, up)]
    return functional.prompt_projector(Z(pooled), Z(bias), *weights, **options)


def attend(q=(2, 5, 4, 3), k=(2, 5, 4, 3), v=(2, 5, 4, 3), pk=(2, 1, 4, 3), pv=(2, 1, 4, 3), **options):
    tensors = (Z(shape) for shape in (q, k, v, pk, pv))
    return functional.prompt_attention(*tensors, **{"scale": 1.0} | options)


def attend_packed(qkv=(2, 5, 24), prompt_kv=(2, 1, 12), num_heads=4, num_kv_heads=2, **options):
    return functional.prompt_attention_packed(
        Z(qkv), Z(prompt_kv), num_heads=num_heads, num_kv_heads=num_kv_heads, **{"scale": 1.0} | options
    )


def mlp(x=(2, 5, 4), w1=(8, 4), b1=(8,), w2=(4, 8), b2=(4,), dtype=torch.float32):
    return functional.mlp(Z(x, dtype=dtype), Z(w1), Z(b1), Z(w2), Z(b2))


def attend_cls(q=(2, 1, 4, 3), x=(2, 5, 6), prompts=(2, 1, 6), wk=(4, 3, 6), wv=(4, 3, 6), **options):
    tensors = (Z(shape) for shape in (q, x, prompts, wk, wv))
    return functional.absorbed_attention(*tensors, **{"scale": 1.0} | options)


def matrices(weight=(2, 3, 6), kernel=(2, 2, 2), grid=(3, 4), **options):
    return functional.prompt_matrices(Z(weight), None if kernel is None else Z(kernel), grid, **options)


OPS = [
    (lambda: norm(x=(6, 4)), ValueError, "x must be (B, T, C) = ('any', 'any', 'any'), got (6, 4)"),
    (lambda: norm(branch=(6, 4)), ValueError, "branch must be (B, T, C) = (2, 6, 4), got (6, 4)"),
    (lambda: norm(branch=(1, 6, 4)), ValueError, "branch must be (B, T, C) = (2, 6, 4), got (1, 6, 4)"),
    (lambda: norm(layer_scale=(1,)), ValueError, "layer_scale must be (C,) = (4,), got (1,)"),
    (
        lambda: norm(branch=None, layer_scale=(4,)),
        ValueError,
        "layer_scale must be None where branch is, got a tensor",
    ),
    (lambda: norm(weight=(4,)), ValueError, "weight and bias must be given both or not at all, got weight a"),
    (lambda: norm(bias=(4,)), ValueError, "weight and bias must be given both or not at all, got bias alone"),
    (lambda: norm(weight=(5,), bias=(4,)), ValueError, "weight must be (C,) = (4,), got (5,)"),
    (lambda: norm(weight=(4,), bias=(4, 1)), ValueError, "bias must be (C,) = (4,), got (4, 1)"),
    (
        lambda: functional.add_norm(Z(1, 2, 3), 1.0),
        TypeError,
        "branch must be a tensor (B, T, C), got float",
    ),
    (
        lambda: functional.add_norm(Z(1, 2, 3), Z(1, 2, 3, dtype=torch.int64)),
        TypeError,
        "branch must be of a floating dtype, got torch.int64",
    ),
    (
        lambda: functional.add_norm(Z(1, 2, 3), Z(1, 2, 3, device="meta")),
        ValueError,
        "all tensors must be on one device, got {'x': device(type='cpu')",
    ),
    (
        lambda: pool(branch=(2, 5, 4)),
        ValueError,
        "branch must be (B, T, C) = (2, 6, 4), got (2, 5, 4)",
    ),
    (lambda: pool(layer_scale=(4,)), ValueError, "layer_scale must be None where branch is, got a tensor"),
    (
        lambda: pool(branch=(2, 6, 4), layer_scale=(6,)),
        ValueError,
        "layer_scale must be (C,) = (4,), got (6,)",
    ),
    (lambda: attend_packed(qkv=(2, 5, 8, 3)), ValueError, "qkv must be (B, T, (h + 2g) * d)"),
    (lambda: attend_packed(qkv=(2, 5, 25)), ValueError, "qkv must be (B, T, 8 * d), got (2, 5, 25)"),
    (lambda: attend_packed(qkv=(2, 5, 0)), ValueError, "qkv must be (B, T, 8 * d), got (2, 5, 0)"),
    (
        lambda: attend_packed(prompt_kv=(2, 1, 24)),
        ValueError,
        "prompt_kv must be (B or 1, P, 2g * d) = ('any', 'any', 12), got (2, 1, 24)",
    ),
    (
        lambda: attend_packed(prompt_kv=(3, 1, 12)),
        ValueError,
        "prompt_kv must have a batch of 1 or 2, got 3",
    ),
    (lambda: attend_packed(num_kv_heads=3), ValueError, "num_kv_heads must divide num_heads = 4, got 3"),
    (lambda: attend_packed(num_heads=0), ValueError, "num_heads must be at least 1, got 0"),
    (lambda: attend_packed(num_heads=4.0), TypeError, "num_heads must be an int, got 4.0"),
    (lambda: attend_packed(bias=Z(4, 5, 6)), ValueError, "bias must be (..., 5, 5), got (4, 5, 6)"),
    (lambda: attend(backend="flash"), ValueError, "backend must be one of "),
    (lambda: mlp(x=(2, 4)), ValueError, "x must be (B, T, C) = ('any', 'any', 'any'), got (2, 4)"),
    (lambda: mlp(w1=(8, 5)), ValueError, "fc1_weight must be (D, C) = ('any', 4), got (8, 5)"),
    (lambda: mlp(w2=(8, 4)), ValueError, "fc2_weight must be (E, D) = ('any', 8), got (8, 4)"),
    (lambda: mlp(b1=(4,)), ValueError, "fc1_bias must be (D,) = (8,), got (4,)"),
    (lambda: mlp(b2=(1, 4)), ValueError, "fc2_bias must be (E,) = (4,), got (1, 4)"),
    (lambda: mlp(dtype=torch.int8), TypeError, "x must be of a floating dtype, got torch.int8"),
    (
        lambda: functional.mlp(Z(1, 2, 3), Z(4, 3), None, Z(3, 4, device="meta"), None),
        ValueError,
        "all tensors must be on one device, got {'x': device(type='cpu')",
    ),
    (lambda: functional.mlp(Z(1, 2, 3), None, None, Z(3, 4), None), TypeError, "fc1_weight must be a tensor"),
    (lambda: pool(x=(2, 6)), ValueError, "x must be (B, T, C) = ('any', 'any', 'any'), got (2, 6)"),
    (lambda: pool(num_prefix=6), ValueError, "num_prefix must leave at least one of 6 tokens, got 6"),
    (lambda: pool(num_prefix=-1), ValueError, "num_prefix must be at least 0, got -1"),
    (lambda: pool(matrix=(3, 6)), ValueError, "matrix must be (R, N) = ('any', 5), got (3, 6)"),
    (lambda: pool(weight=(5,)), ValueError, "weight must be (C,) = (4,), got (5,)"),
    (lambda: pool(bias=(1, 4)), ValueError, "bias must be (C,) = (4,), got (1, 4)"),
    (lambda: pool(bias=(2, 4)), ValueError, "bias must be (C,) = (4,), got (2, 4)"),
    (lambda: pool(weight=(2, 4)), ValueError, "bias must be (B, C) = (2, 4), got (4,)"),
    (lambda: pool(weight=(3, 4), bias=(3, 4)), ValueError, "weight must be (B, C) = (2, 4), got (3, 4)"),
    (lambda: pool(matrix=(1, 3, 5)), ValueError, "matrix must be (B, R, N) = (2, 'any', 5), got (1, 3, 5)"),
    (lambda: pool(matrix=(2, 3, 6)), ValueError, "matrix must be (B, R, N) = (2, 'any', 5), got (2, 3, 6)"),
    (lambda: pool(dtype=torch.int64), TypeError, "x must be of a floating dtype, got torch.int64"),
    (
        lambda: functional.prompt_pool([1.0], Z(1, 1), Z(1), Z(1), num_prefix=0),
        TypeError,
        "x must be a tensor (B, T, C), got list",
    ),
    (
        lambda: functional.prompt_pool(Z(1, 2, 3), Z(1, 1), Z(3, device="meta"), Z(3), num_prefix=1),
        ValueError,
        "all tensors must be on one device, got {'x': device(type='cpu')",
    ),
    (lambda: project(down=(5, 3)), ValueError, "down must be (r, C) = ('any', 4), got (5, 3)"),
    (lambda: project(up=(5, 4)), ValueError, "up must be (C, r) = (4, 5), got (5, 4)"),
    (lambda: project(pooled=(2, 3)), ValueError, "pooled must be (B, P, C) = ('any', 'any', 'any'), got"),
    (lambda: project(bias=(4,)), ValueError, "bias must be (P,) = (3,), got (4,)"),
    (lambda: project(bias=(3, 3)), ValueError, "bias must be (B, P) = (2, 3), got (3, 3)"),
    (lambda: project(down=(1, 5, 4)), ValueError, "down must be (B, r, C) = (2, 'any', 4), got (1, 5, 4)"),
    (lambda: project(down=(2, 5, 4)), ValueError, "up must be (B, C, r) = (2, 4, 5), got (4, 5)"),
    (lambda: project(up=(2, 4, 5)), ValueError, "up must be (C, r) = (4, 5), got (2, 4, 5)"),
    (
        lambda: project(down=(2, 5, 4), up=(2, 5, 4)),
        ValueError,
        "up must be (B, C, r) = (2, 4, 5), got (2, 5, 4)",
    ),
    (lambda: project(up=None), ValueError, "down and up must be given together, got down alone"),
    (lambda: project(down=None), ValueError, "down and up must be given together, got up alone"),
    (
        lambda: project(channel_mask=Z(2, 4)),
        ValueError,
        "channel_mask must be (B, 1, C) = (2, 1, 4), got (2, 4)",
    ),
    (
        lambda: project(feature_mask=Z(2, 3, 4)),
        ValueError,
        "feature_mask must be (B, P, r) = (2, 3, 5), got (2, 3, 4)",
    ),
    (
        lambda: project(down=None, up=None, feature_mask=Z(2, 3, 5)),
        ValueError,
        "feature_mask must be None without down and up",
    ),
    (lambda: project(scale=Z(3)), ValueError, "scale must be (1,) or (B,) = (2,), got (3,)"),
    (lambda: project(scale=Z(2, 1)), ValueError, "scale must be (1,) or (B,) = ('any',), got (2, 1)"),
    (
        lambda: project(scale="1"),
        TypeError,
        "scale must be a finite number or a tensor (1,) or (B,), got '1'",
    ),
    (
        lambda: project(dtype=torch.int32),
        TypeError,
        "dtype must be a floating dtype, got torch.int32",
    ),
    (
        lambda: project(bias=(3,), scale=Z(1, dtype=torch.int64)),
        TypeError,
        "scale must be of a floating dtype, got torch.int64",
    ),
    (
        lambda: project(activation="tanh"),
        ValueError,
        "activation must be one of ('relu', 'gelu', 'sigmoid', ",
    ),
    (lambda: attend(q=(2, 5, 12)), ValueError, "q must be (B, Tq, h, d)"),
    (
        lambda: attend(k=(1, 5, 4, 3)),
        ValueError,
        "k must be (B, T, g, d) = (2, 'any', 'any', 3), got (1, 5, 4, 3)",
    ),
    (lambda: attend(v=(2, 6, 4, 3)), ValueError, "v must be (B, T, g, d) = (2, 5, 4, 3), got (2, 6, 4, 3)"),
    (
        lambda: attend(k=(2, 5, 3, 3), v=(2, 5, 3, 3)),
        ValueError,
        "k must have heads that divide q's 4, got 3",
    ),
    (
        lambda: attend(pv=(2, 2, 4, 3)),
        ValueError,
        "prompt_v must be (B or 1, P, g, d) = (2, 1, 4, 3), got (2, 2,",
    ),
    (
        lambda: attend(pk=(3, 1, 4, 3), pv=(3, 1, 4, 3)),
        ValueError,
        "prompt_k must have a batch of 1 or 2, got 3",
    ),
    (lambda: attend(bias=Z(1, 4, 5, 6)), ValueError, "bias must be (..., 5, 5), got (1, 4, 5, 6)"),
    (lambda: attend_cls(x=(2, 5)), ValueError, "x must be (B, T, C) = (2, 'any', 'any'), got (2, 5)"),
    (lambda: attend_cls(prompts=(3, 1, 6)), ValueError, "prompts must have a batch of 1 or 2, got 3"),
    (lambda: attend_cls(wk=(3, 4, 6)), ValueError, "key_weight must be (h, d, C) = (4, 3, 6), got (3, 4, 6)"),
    (lambda: attend_cls(bias=Z(1, 4, 2, 5)), ValueError, "bias must be (..., 1, 5), got (1, 4, 2, 5)"),
    (
        lambda: matrices(kernel=None),
        ValueError,
        "weight must be (A, P, H*W) = ('any', 'any', 12), got (2, 3, 6)",
    ),
    (lambda: matrices(weight=(2, 3, 12)), ValueError, "weight must be (A, P, H'W') = (2, 'any', 6), got"),
    (lambda: matrices(kernel=(1, 2, 2)), ValueError, "kernel must be (A, K, K) = (2, 2, 2), got (1, 2, 2)"),
    (
        lambda: matrices(depthwise=True),
        ValueError,
        "kernel must be (A, C, K, K) = (2, 'any', 2, 2), got (2, 2, 2)",
    ),
]

# What every op that takes a backend is called with.
CALLS_OF_OPS = {
    "add_norm": lambda **o: functional.add_norm(Z(1, 2, 3), None, **o),
    "prompt_pool": pool_with,
    "prompt_projector": project,
    "prompt_attention": attend,
    "prompt_attention_packed": attend_packed,
    "absorbed_attention": attend_cls,
    "mlp": lambda **o: functional.mlp(Z(1, 2, 3), Z(4, 3), None, Z(3, 4), None, **o),
}

OPS += [
    # the affine of a norm
    (
        lambda: pool(norm_weight=(4,)),
        ValueError,
        "norm_weight and norm_bias must be given both or not at all, got norm_weight alone",
    ),
    (lambda: pool(norm_weight=(4,), norm_bias=(1,)), ValueError, "norm_bias must be (C,) = (4,), got (1,)"),
    (lambda: project(eps=1.0, norm_bias=Z(4)), ValueError, "norm_weight and norm_bias must be given both or"),
    (lambda: project(norm_weight=Z(4), norm_bias=Z(4)), ValueError, "norm_weight must be None where eps is"),
    (
        lambda: project(eps=1.0, norm_weight=Z(5), norm_bias=Z(4)),
        ValueError,
        "norm_weight must be (C,) = (4,), got (5,)",
    ),
    # tensors that are none
    (
        lambda: project(eps=1.0, norm_weight=[1.0] * 4, norm_bias=Z(4)),
        TypeError,
        "norm_weight must be a tensor (C,), got list",
    ),
    (
        lambda: functional.add_norm(Z(1, 2, 3), None, [1.0] * 3, Z(3)),
        TypeError,
        "weight must be a tensor (C,), got list",
    ),
    (
        lambda: functional.mlp(Z(1, 2, 3), Z(4, 3), [0.0], Z(3, 4), None),
        TypeError,
        "fc1_bias must be a tensor (D,), got list",
    ),
    (
        lambda: project(channel_mask=np.zeros((2, 1, 4))),
        TypeError,
        "channel_mask must be a tensor (B, 1, C), got ndarray",
    ),
    (lambda: attend(bias=[0.0]), TypeError, "bias must be a tensor (..., 5, 5), got list"),
    (lambda: attend(bias=np.zeros((5, 5))), TypeError, "bias must be a tensor (..., 5, 5), got ndarray"),
    (
        lambda: functional.prompt_matrices([[[1.0]]], None, (1, 1)),
        TypeError,
        "weight must be a tensor (A, P, H'W'), got list",
    ),
    (
        lambda: functional.prompt_matrices(Z(2, 3, 6), np.zeros((2, 2, 2)), (3, 4)),
        TypeError,
        "kernel must be a tensor (A, K, K), got ndarray",
    ),
    # numbers and names
    *(
        (lambda n=number: pool_with(num_prefix=n), TypeError, f"num_prefix must be an int, got {number!r}")
        for number in (1.5, True, "1")
    ),
    *(
        (
            lambda op=op, name=name, number=number: CALLS_OF_OPS[op](**{name: number}),
            error,
            f"{name} must be a finite number of at least 0",
        )
        for op, name in [
            ("add_norm", "eps"),
            ("prompt_pool", "eps"),
            ("prompt_pool", "prompt_eps"),
            ("prompt_projector", "eps"),
        ]
        for number, error in [
            (-1.0, ValueError),
            (math.nan, ValueError),
            (math.inf, ValueError),
            ("x", TypeError),
            (True, TypeError),
            (Z(1), TypeError),
        ]
    ),
    *(
        (
            lambda op=op, scale=scale: CALLS_OF_OPS[op](scale=scale),
            error,
            "scale must be a finite number",
        )
        for op in ("prompt_projector", "prompt_attention", "prompt_attention_packed", "absorbed_attention")
        for scale, error in [
            ("x", TypeError),
            (True, TypeError),
            (math.nan, ValueError),
            (-math.inf, ValueError),
        ]
    ),
    (lambda: attend_packed(num_heads=True), TypeError, "num_heads must be an int, got True"),
    (lambda: attend_packed(num_kv_heads="2"), TypeError, "num_kv_heads must be an int, got '2'"),
    (lambda: project(dtype="float32"), TypeError, "dtype must be a torch.dtype, as torch.float32, got 'flo"),
    (lambda: project(activation=3), TypeError, "activation must be a str, one of ('relu', 'gelu', "),
    (lambda: project(activation=["relu"]), TypeError, "activation must be a str, one of ('relu', 'gelu', "),
    (lambda: matrices(kernel=(2, 5, 5)), ValueError, "kernel must fit into grid (3, 4) with padding 0, got"),
    (lambda: matrices(grid=(3, 4.5)), TypeError, "grid[1] must be an int, got 4.5"),
    (lambda: matrices(grid=(0, 4)), ValueError, "grid[0] must be at least 1, got 0"),
    (lambda: matrices(grid=(3, 4, 1)), ValueError, "grid must be (H, W), got (3, 4, 1)"),
    (lambda: matrices(grid=12), TypeError, "grid must be a tuple (H, W), got 12"),
    (lambda: matrices(padding=1.0), TypeError, "padding must be an int, got 1.0"),
    (lambda: matrices(padding=True), TypeError, "padding must be an int, got True"),
    (lambda: matrices(padding=-1), ValueError, "padding must be at least 0, got -1"),
    (lambda: matrices(depthwise=1), TypeError, "depthwise must be a bool, got 1"),
    # a bias of scores
    (lambda: attend(bias=Z(3, 4, 5, 5)), ValueError, "bias must be broadcastable to (2, 4, 5, 5), got (3, 4"),
    (
        lambda: attend(bias=Z(1, 1, 1, 5, 5)),
        ValueError,
        "bias must be broadcastable to (2, 4, 5, 5), got (1",
    ),
    (
        lambda: attend_cls(bias=Z(2, 4, 1, 5)),
        ValueError,
        "bias must be broadcastable to (1, 4, 1, 5), got (",
    ),
    # numbers of prompts
    *(
        (
            lambda call=call, lengths=lengths: call(prompt_lengths=lengths),
            error,
            f"prompt_lengths must be {message}",
        )
        for call in (attend, attend_packed, attend_cls)
        for lengths, error, message in [
            ([1, 1], TypeError, "a tensor (B,), got list"),
            (Z(3, dtype=torch.int64), ValueError, "(B,) = (2,), got (3,)"),
            (Z(2, 1, dtype=torch.int64), ValueError, "(B,) = (2,), got (2, 1)"),
            (Z(2), TypeError, "int32 or int64, got torch.float32"),
            (Z(2, dtype=torch.bool), TypeError, "int32 or int64, got torch.bool"),
            (torch.tensor([1, 2]), ValueError, "0 to 1, got [1, 2]"),
            (torch.tensor([-1, 1]), ValueError, "0 to 1, got [-1, 1]"),
        ]
    ),
    *(
        (
            lambda call=call: call(prompt_lengths=Z(2, dtype=torch.int64, device="meta")),
            ValueError,
            "all tensors must be on one device, got {",
        )
        for call in (attend, attend_packed, attend_cls)
    ),
    (
        lambda: attend_cls(x=(2, 0, 6), prompt_lengths=torch.tensor([0, 1])),
        ValueError,
        "x must have at least one token where prompt_lengths are given, got none",
    ),
    # dtypes
    *(
        (
            lambda backend=backend: functional.prompt_attention(
                Z(2, 5, 4, 3).half(), *[Z(2, 5, 4, 3)] * 4, scale=1.0, backend=backend
            ),
            TypeError,
            "must be of one dtype, unless autocast casts them, got q torch.float16, k torch.float32",
        )
        for backend in (None, "torch", "auto")
    ),
    (
        lambda: functional.prompt_attention_packed(
            Z(2, 5, 24).half(), Z(2, 1, 12), num_heads=4, num_kv_heads=2, scale=1.0
        ),
        TypeError,
        "got qkv torch.float16, prompt_kv torch.float32",
    ),
    (
        lambda: functional.mlp(Z(1, 2, 3), Z(4, 3).bfloat16(), None, Z(3, 4), None),
        TypeError,
        "got x torch.float32, fc1_weight torch.bfloat16, fc2_weight torch.float32",
    ),
    # backends
    *(
        (
            lambda call=call: call(backend="reference"),
            ValueError,
            f"{op} has no backend 'reference', which is that of a whole model",
        )
        for op, call in CALLS_OF_OPS.items()
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), OPS, ids=lambda v: v[:40] if isinstance(v, str) else ""
)
def test_ops(call, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert caught.type is error


@pytest.mark.parametrize("op", CALLS_OF_OPS)
def test_an_op_within_the_reference_needs_a_backend(op):
    with use_backend("reference"):
        with pytest.raises(ValueError, match=r"has no backend 'reference', .* give the op backend='torch'"):
            CALLS_OF_OPS[op]()
        CALLS_OF_OPS[op](backend="torch")


def test_numbers_of_numpy_are_numbers():
    x, matrix = torch.randn(2, 6, 4), torch.randn(3, 5)
    expected = functional.prompt_pool(x, matrix, Z(4), Z(4), num_prefix=1, eps=0.5, prompt_eps=1.0)
    numbers = {"num_prefix": np.int64(1), "eps": np.float32(0.5), "prompt_eps": np.int32(1)}
    actual = functional.prompt_pool(x, matrix, Z(4), Z(4), **numbers)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    heads = {"num_heads": np.int64(4), "num_kv_heads": np.uint8(2), "scale": np.float16(0.5)}
    assert attend_packed(**heads).shape == (2, 5, 4, 3)
    grid = (np.int64(3), np.int64(4))
    assert matrices(grid=grid, padding=np.int64(0)).shape == (2, 3, 12)
    assert functional.add_norm(x, None, eps=0)[1].isfinite().all()


def test_under_autocast_dtypes_may_differ():
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.mlp(Z(1, 2, 3), Z(4, 3).bfloat16(), None, Z(3, 4), None)
        assert out.dtype == torch.bfloat16
        tensors = (Z(2, 5, 4, 3).bfloat16(), *[Z(2, 5, 4, 3)] * 4)
        assert functional.prompt_attention(*tensors, scale=1.0).shape == (2, 5, 4, 3)
        with pytest.raises(TypeError, match="unless autocast casts them, got x"):
            functional.mlp(Z(1, 2, 3).double(), Z(4, 3), None, Z(3, 4), None)


# ---- files and folders


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def break_weights(folder):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FILES = [
    (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
    (lambda folder: (folder / "adapter_config.json").write_text("[]"), "adapter_config.json"),
    (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 5),
        "adapter_model.safetensors",
    ),
    (break_weights, "sha256"),
]


@pytest.mark.parametrize(("damage", "message"), FILES, ids=lambda v: v if isinstance(v, str) else "")
def test_damaged_adapters(model, adapter, damage, message):
    damage(adapter)
    before = snapshot(model)
    for call in (model.load_adapter, AdaptiveViT.from_adapter):
        with pytest.raises(AdapterError, match=message) as caught:
            call(adapter)
        assert str(adapter) in str(caught.value)
    assert_unchanged(before, snapshot(model))


def test_missing_folder_and_a_file_in_its_place(model, tmp_path):
    for path in (tmp_path / "nothing", tmp_path / "file"):
        if path.name == "file":
            path.write_text("")
        with pytest.raises(AdapterError, match=re.escape(str(path))):
            model.load_adapter(path)
    with pytest.raises((AdapterError, OSError), match=re.escape(str(tmp_path / "file"))):
        model.save_adapter(tmp_path / "file")


OTHERS = [
    ({"prompts": PromptConfig(num_prompts=4)}, "num_prompts"),
    ({"prompts": PromptConfig(num_prompts=3, kind="deep")}, "kind"),
    ({"num_classes": 5}, "num_classes: the adapter has 4, the model 5; call model.reset_classifier(4) first"),
    ({"img_size": 128}, "grid"),
    ({"backbone": "test_vit2"}, "backbone depth: the adapter was made for 6, the model has 8"),
    ({}, "check_backbone=False"),  # the same architecture with other frozen weights
]


@pytest.mark.parametrize(("options", "message"), OTHERS, ids=lambda v: v if isinstance(v, str) else "")
def test_adapters_of_other_models(adapter, options, message):
    defaults = {"backbone": "test_vit", "prompts": PromptConfig(num_prompts=3), "num_classes": 4}
    other = AdaptiveViT(**{**defaults, **options})
    before = snapshot(other)
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        other.load_adapter(adapter)
    assert f"the adapter in {adapter} does not fit the model" in str(caught.value)
    assert_unchanged(before, snapshot(other))


def test_official_state_dicts():
    with pytest.raises(ValueError, match="position_embeddings: expected shape"):
        vapt_fast.from_official({}, num_heads=4, prompts=PromptConfig())
    with pytest.raises(TypeError, match=r"must hold tensors only, got something else under \['head'\]"):
        vapt_fast.from_official({"head": None}, num_heads=4, prompts=PromptConfig())


def test_there_are_at_least_60():
    assert len(CONFIG) + len(MODELS) + len(CALLS) + len(OPS) + 2 * len(FILES) + len(OTHERS) >= 60
