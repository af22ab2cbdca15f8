"""``vapt-fast info`` of a model: its costs, by the options that make it."""

import pytest
from command import error_of, invoke, succeed

from vapt_fast import AdaptiveViT
from vapt_fast.accounting import account

DIGITS = "vit_digits_patch4_32"


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {"num_classes": 100}),
        (
            ["--num-prompts", "4,0,0,3", "--method", "vpt-deep", "--num-classes", "7", "--image-size", "64"],
            {"num_classes": 7, "num_prompts": (4, 0, 0, 3), "kind": "deep", "img_size": 64},
        ),
        (["--conv-kernel", "none", "--projector-dim", "5"], {"conv_kernel": None, "projector_dim": 5}),
    ],
)
@pytest.mark.full
def test_costs_are_those_of_the_model(flags, options, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    costs = account(AdaptiveViT(DIGITS, **{"num_classes": 100, **options}), batch_size=2)
    shown = succeed("info", DIGITS, "--batch-size", 2, *flags).stdout
    for number in (costs.backbone, costs.prompts, costs.head):
        assert f"{number:,}" in shown
    for one in (costs.bare, costs.literal, costs.rewritten):
        assert f"{one.forward / 1e6:.3g} M" in shown
        assert f"({one.forward / costs.bare.forward - 1:+.1%})" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "full"], "--method must leave the backbone frozen"),
        (["--num-prompts", "1,2"], "--num-prompts must have one number for each"),
        (["--num-prompts", "few"], "--num-prompts must be an integer"),
    ],
)
def test_a_model_that_cannot_be(flags, message):
    assert message in error_of("info", DIGITS, *flags)
    assert not invoke("info", DIGITS, *flags).stdout
