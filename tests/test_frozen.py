"""Prepared frozen weights: exact, made once, and never stale."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vapt_fast import AdaptiveViT, PromptConfig, frozen, use_backend


@pytest.fixture
def preparations(monkeypatch):
    """The number of times a block was prepared."""
    count = []
    real = frozen.prepare
    monkeypatch.setattr(frozen, "prepare", lambda *a, **k: (count.append(1), real(*a, **k))[1])
    return count


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = (
        AdaptiveViT("test_vit", prompts=PromptConfig(kind="deep", num_prompts=3), num_classes=4)
        .double()
        .eval()
    )
    for parameter in model.backbone.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def images(model):
    return torch.randn(2, 3, *model._image_size, dtype=torch.float64)


def assert_right(model, images):
    with torch.no_grad():
        with use_backend("reference"):
            expected = model(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-11)


def test_made_once(model, images, preparations):
    for _ in range(3):
        assert_right(model, images)
    assert len(preparations) == len(model.backbone.blocks)


def change_in_place(model):
    with torch.no_grad():
        model.backbone.blocks[1].attn.qkv.weight.mul_(1.5)


def change_norm(model):
    with torch.no_grad():
        model.backbone.blocks[2].norm1.bias.add_(0.5)


def replace_parameter(model):
    attn = model.backbone.blocks[0].attn
    attn.proj.weight = nn.Parameter(attn.proj.weight * 2, requires_grad=False)


def load_whole(model):
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


def load_backbone(model):
    model.backbone.load_state_dict({k: v * 0.9 for k, v in model.backbone.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_norm, replace_parameter, load_whole, load_backbone],
    ids=lambda f: f.__name__,
)
def test_never_stale(model, images, change):
    assert_right(model, images)
    before = model(images)
    change(model)
    assert_right(model, images)
    assert not torch.allclose(before, model(images))


def test_follows_the_dtype(model, images):
    model(images)
    model.float()
    assert model(images.float()).dtype == torch.float32
    model.double()
    assert_right(model, images)


def test_weights_that_someone_trains_are_prepared_with_their_gradient(model, images, preparations):
    weight = model.backbone.blocks[1].attn.qkv.weight.requires_grad_(True)
    grads = {}
    for name in ("reference", "torch"):
        with use_backend(name):
            (grads[name],) = torch.autograd.grad(model(images).square().sum(), weight)
    assert grads["reference"].any()
    torch.testing.assert_close(grads["torch"], grads["reference"], rtol=1e-10, atol=1e-10)


def test_made_under_inference_mode_serves_training_too(model, images):
    with torch.inference_mode():
        model(images)
    model(images).sum().backward()
    assert model.prompts.blocks[0].table.grad.any()


def test_is_no_part_of_the_model(model, images):
    names = set(model.state_dict())
    model(images)
    assert set(model.state_dict()) == names
    assert not any("prepared" in name for name, _ in [*model.named_buffers(), *model.named_parameters()])
    assert not copy.deepcopy(model)._prepared._entries
    assert not pickle.loads(pickle.dumps(model._prepared))._entries
    assert_right(copy.deepcopy(model), images)


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


def test_autocast_casts_once(model, images, preparations):
    model, images = model.float(), images.float()
    with torch.no_grad(), autocast(), use_backend("reference"):
        expected = model(images)
    for _ in range(3):
        with torch.no_grad(), autocast():
            logits = model(images)
    assert len(preparations) == len(model.backbone.blocks)
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)
    _, prepared = model._prepared._entries[0]
    low = [prepared.qkv_weight, prepared.proj_weight, *prepared.mlp]
    assert {tensor.dtype for tensor in low} == {torch.bfloat16}


def test_autocast_leaves_nothing_behind(model, images):
    model, images = model.float(), images.float()
    with torch.no_grad():
        before = model(images)
        with autocast():
            model(images)
        assert torch.equal(model(images), before)


def test_what_need_not_change_is_not_copied(model, images):
    model(images)
    for index, (_, prepared) in model._prepared._entries.items():
        block = model.backbone.blocks[index]
        assert prepared.proj_weight is block.attn.proj.weight
        assert prepared.mlp[0] is block.mlp.fc1.weight


def change_mlp(model):
    with torch.no_grad():
        model.backbone.blocks[1].mlp.fc2.weight.mul_(1.5)


def test_casts_are_never_stale(model, images):
    model, images = model.float(), images.float()
    with torch.no_grad(), autocast():
        before = model(images)
        change_mlp(model)
        after = model(images)
        model._prepared.clear()
        assert torch.equal(model(images), after)
    assert not torch.allclose(before, after)
