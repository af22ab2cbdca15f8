"""PromptConfig: what its options mean for a backbone. Bad values are in test_bad_calls.py."""

import dataclasses

import numpy as np
import pytest
import timm
import torch

from vapt_fast import AdaptiveViT, PromptConfig
from vapt_fast.prompts import AdaptivePrompts, Geometry, Prompts, StaticPrompts


def test_the_default_is_the_papers_recipe():
    config = PromptConfig()
    assert (config.kind, config.num_prompts, config.static_depth) == ("adaptive", 10, 1)
    assert (config.conv_kernel, config.conv_padding, config.conv_shared) == (2, 0, True)
    assert (config.projector_dim, config.projector_shared, config.projector_activation) == (8, True, "relu")
    assert (config.projector_dropout, config.channel_dropout, config.prompt_dropout) == (0.1, 0.1, 0.0)
    assert config.projector_scale_learnable is False


def test_is_frozen_and_comparable():
    config = PromptConfig(num_prompts=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_prompts = 6
    assert config == PromptConfig.from_dict(dataclasses.asdict(config))
    assert hash(config) == hash(PromptConfig(num_prompts=5))


@pytest.mark.parametrize(
    ("options", "static", "adaptive"),
    [
        ({}, 1, 11),
        ({"static_depth": 0}, 0, 12),
        ({"static_depth": 4}, 4, 8),
        ({"static_depth": 99}, 12, 0),
        ({"kind": "deep"}, 12, 0),
        ({"kind": "shallow"}, 1, 0),
        ({"num_prompts": 0}, 0, 0),
        ({"kind": "deep", "num_prompts": 0}, 0, 0),
    ],
)
def test_blocks_of_each_sort(options, static, adaptive):
    blocks = Prompts(PromptConfig(**options), Geometry(4, 12, (3, 3), (4, 4))).blocks
    assert sum(isinstance(block, StaticPrompts) for block in blocks) == static
    assert sum(isinstance(block, AdaptivePrompts) for block in blocks) == adaptive


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 13 * 9),
        ({"conv_kernel": None}, 14 * 10),
        ({"conv_kernel": 3, "conv_padding": 1}, 14 * 10),
        ({"conv_kernel": 10}, 5 * 1),
        ({"conv_kernel": 3, "conv_padding": 2}, 16 * 12),
    ],
)
def test_positions_after_the_convolution(options, expected):
    prompts = Prompts(PromptConfig(static_depth=0, **options), Geometry(4, 1, (14, 10), (4, 4)))
    assert prompts.blocks[0].token_projection.in_features == expected


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array, torch.tensor])
@pytest.mark.parametrize("real", [np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_become_pythons(integer, real):
    config = PromptConfig(num_prompts=integer(4), conv_kernel=integer(3), channel_dropout=real(0.25))
    assert config == PromptConfig(num_prompts=4, conv_kernel=3, channel_dropout=0.25)
    assert [type(value) for value in dataclasses.astuple(config)] == [
        type(value) for value in dataclasses.astuple(PromptConfig())
    ]
    assert PromptConfig(pool_prompts=np.bool_(True)).pool_prompts is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": np.float32(4)}, "num_prompts must be an int"),
        ({"num_prompts": np.array([4])}, "num_prompts must be an int"),
        ({"num_prompts": torch.tensor(True)}, "num_prompts must be an int"),
        ({"num_prompts": np.bool_(True)}, "num_prompts must be an int"),
        ({"channel_dropout": np.array([0.1])}, "channel_dropout must be a float"),
        ({"channel_dropout": torch.tensor(0.1 + 0j)}, "channel_dropout must be a float"),
        ({"pool_prompts": np.int64(1)}, "pool_prompts must be a bool"),
    ],
)
def test_other_numbers_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        PromptConfig(**options)


def test_options_as_keywords():
    given = {"num_prompts": 3, "conv_kernel": None, "projector_dim": 0}
    model = AdaptiveViT("test_vit", num_classes=2, **given)
    expected = PromptConfig(num_prompts=3, conv_kernel=None, projector_dim=None)
    assert (model.config, model.num_classes) == (expected, 2)
    assert AdaptiveViT(timm.create_model("test_vit"), **given).config == expected
    with pytest.raises(TypeError, match=r"got both: \['num_prompts'\] beside prompts"):
        AdaptiveViT("test_vit", prompts=PromptConfig(), num_prompts=3)


@pytest.mark.parametrize("name", ["test_vit", "naflexvit_base_patch16_gap", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("make", [AdaptiveViT, lambda name, **kw: timm.create_model("vapt_" + name, **kw)])
@pytest.mark.parametrize(
    ("typo", "meant"),
    [("nprompts", "num_prompts"), ("conv_kernal", "conv_kernel"), ("numclasses", "num_classes")],
)
def test_a_mistyped_option_is_named_with_the_one_that_was_meant(name, make, typo, meant):
    with pytest.raises(TypeError, match=f"{typo!r} is an option neither .*did you mean {meant!r}"):
        make(name, **{typo: 5})


def test_weights_of_a_timm_model_are_refused_with_advice(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    for load in (
        lambda: timm.create_model("vapt_test_vit", checkpoint_path=str(path)),
        lambda: AdaptiveViT("test_vit").load_state_dict(timm.create_model("test_vit").state_dict()),
    ):
        with pytest.raises(RuntimeError, match=r"a timm model without prompts.*--pretrained-path FILE"):
            load()
    overlay = {"file": str(path), "num_classes": -1}  # as timm's train.py does with --pretrained-path
    model = timm.create_model("vapt_test_vit", pretrained=True, num_classes=2, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.backbone.cls_token, torch.load(path)["cls_token"])


@pytest.mark.parametrize(
    ("method", "kind"), [("vapt", "adaptive"), ("vpt-deep", "deep"), ("vpt-shallow", "shallow")]
)
def test_the_name_of_a_method_is_answered_with_its_kind(method, kind):
    with pytest.raises(
        ValueError, match=f"kind must be one of .*, got '{method}'; that method's kind is '{kind}'"
    ):
        PromptConfig(kind=method)
