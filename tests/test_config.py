"""PromptConfig: what its options mean for a backbone. Bad values are in test_bad_calls.py."""

import dataclasses

import pytest

from vapt_fast import PromptConfig


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
    config = PromptConfig(**options)
    assert config.num_static_blocks(12) == static
    assert config.num_adaptive_blocks(12) == adaptive


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (13, 9)),
        ({"conv_kernel": None}, (14, 10)),
        ({"conv_kernel": 3, "conv_padding": 1}, (14, 10)),
        ({"conv_kernel": 10}, (5, 1)),
        ({"conv_kernel": 3, "conv_padding": 2}, (16, 12)),
    ],
)
def test_conv_output(options, expected):
    assert PromptConfig(**options).conv_output((14, 10)) == expected
