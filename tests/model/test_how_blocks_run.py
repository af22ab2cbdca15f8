"""What is said about the blocks of a model: how they run, and why some can't be taken apart."""

import logging

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import nn
from typer.testing import CliRunner

from vapt_fast import use_backend
from vapt_fast.cli import app
from vapt_fast.functional import prompt_pool
from vapt_fast.info import forward_report

VIT = "vit_tiny_patch16_224"


def test_every_block_of_a_plain_model_is_rewritten():
    lines = forward_report(tiny_model(VIT)).splitlines()
    assert [line.strip() for line in lines] == [
        "block 0: rewritten",
        "blocks 1 to 2: rewritten; prompts pooled",
    ]


def change_attention(model):
    model.backbone.blocks[1].attn.proj.register_forward_hook(lambda *_: None)


def change_norm(model):
    model.backbone.blocks[1].norm1 = nn.RMSNorm(model.embed_dim, dtype=torch.float64)


def change_prompts(model):
    model.prompts.blocks[1].token_projection.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            change_attention,
            "block 1: called as it is, without rewrites: attn.proj has hooks or another forward",
        ),
        (change_norm, "block 1: rewritten, norm1 called; prompts pooled"),
        (change_prompts, "block 1: rewritten; prompts called"),
    ],
)
def test_what_was_changed_is_named(change, said):
    model = tiny_model(VIT)
    change(model)
    assert said in forward_report(model)


def test_a_block_that_is_called_as_it_is_says_so_once_a_call(caplog):
    model = tiny_model(VIT)
    images = tiny_images(model)
    with caplog.at_level(logging.DEBUG, logger="vapt_fast"):
        model(images)
        assert not caplog.records
        change_attention(model)
        model(images)
        with use_backend("reference"):  # which rewrites nothing
            model(images)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "block 1" in record.getMessage()
    assert "attn.proj" in record.getMessage()


@pytest.mark.parametrize("change", ["assign", "reset"])
def test_a_head_of_the_backbone_is_not_ignored(change):
    model = tiny_model(VIT)
    images = tiny_images(model)
    if change == "assign":
        model.backbone.head = nn.Linear(model.embed_dim, 3).double()
    else:
        model.backbone.reset_classifier(3)
    for backend in ("torch", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match=r"set model\.head"):
            model(images)
    model.head = model.backbone.head
    model.backbone.head = nn.Identity()
    assert model(images).shape == (2, 3)


def test_info_tells_of_a_backbone_by_name():
    result = CliRunner().invoke(app, ["info", "test_vit"])
    assert result.exit_code == 0, result.output
    assert "rewritten; prompts pooled" in result.stdout


def test_info_of_a_name_that_is_none():
    result = CliRunner().invoke(app, ["info", "test_vitt"])
    assert result.exit_code == 2
    assert "test_vit" in result.stderr


@pytest.mark.parametrize("affine", [True, False])
def test_backward_of_pooling_casts_nothing_under_autocast(affine):
    """Autograd runs a hand-written backward in the caller's context: its products must not be cast."""
    torch.manual_seed(0)
    x, matrix, weight, bias = (torch.randn(s).requires_grad_() for s in ((2, 7, 8), (3, 6), (8,), (8,)))
    norm = {"norm_weight": torch.randn(8), "norm_bias": torch.randn(8)} if affine else {}
    gradients = []
    for inside in (False, True):
        total, normed, pooled = prompt_pool(x, matrix, weight, bias, num_prefix=1, **norm)
        loss = (total + normed).square().sum() + pooled.square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, (x, matrix, weight, bias)))
    assert all(map(torch.equal, *gradients))
