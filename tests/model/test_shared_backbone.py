"""Several models over one timm backbone: independent of each other, and the backbone stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tiny import assert_same, randomize, run, tiny_backbone, tiny_images
from torch import Tensor, nn

from vapt_fast import AdaptiveViT, PromptConfig

ARCHITECTURES = [
    *("vit_base_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"),
    *("beit_base_patch16_224", "naflexvit_base_patch16_map"),
]
VIT = ARCHITECTURES[0]
PROMPTS = PromptConfig(num_prompts=3, projector_dim=4)


def adapt(backbone: nn.Module, seed: int, **options: Any) -> AdaptiveViT:
    model = AdaptiveViT(backbone, prompts=PROMPTS, **options).double().eval()
    randomize(model.prompts, seed)
    return model


@pytest.fixture
def pair() -> tuple[nn.Module, AdaptiveViT, AdaptiveViT]:
    backbone = tiny_backbone(VIT)
    return backbone, adapt(backbone, 1), adapt(backbone, 2)


def logits(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model(images)}


def description(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that could change, besides the numbers."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = dict(model.named_modules())
    return {
        "modules": {name: (id(module), type(module)) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in modules.items()},
        "attributes": {name: set(module.__dict__) for name, module in modules.items()},
        "parameters": {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()},
        "classes": model.num_classes,
        "pooling": model.global_pool,
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_given_backbone_stays_as_it_was(name: str) -> None:
    """Whatever is done with the models made of it."""
    backbone = tiny_backbone(name).train()
    backbone.blocks[0].eval()
    backbone.blocks[1].requires_grad_(False)
    backbone.blocks[2].register_forward_hook(lambda *_: None)
    before, state = description(backbone), copy.deepcopy(backbone.state_dict())
    model, other = adapt(backbone, 1), adapt(backbone, 2, num_classes=7)
    for each in (model.train(), other.train()):
        run(each, tiny_images(each))
        each.requires_grad_(True)
        each.reset_classifier(5)
        with torch.no_grad():
            for parameter in each.adapters.parameters():
                parameter.add_(1)
    if name != "naflexvit_base_patch16_map":
        model.set_input_size(tuple(2 * side for side in model.pretrained_cfg["input_size"][1:]))
    other.backbone.blocks[1].register_forward_hook(lambda *_: None)
    other.float().eval()
    assert description(backbone) == before
    assert_same(dict(backbone.state_dict()), dict(state), 0.0)


def test_frozen_weights_share_their_memory(pair: tuple) -> None:
    backbone, *models = pair
    for model in models:
        parameters = dict(model.backbone.named_parameters())
        for name, parameter in backbone.named_parameters():
            if name.startswith("head."):
                assert name not in parameters
            else:
                assert parameters[name] is not parameter
                assert parameters[name].data_ptr() == parameter.data_ptr()
        own = {p.data_ptr() for p in model.adapters.parameters()}
        assert not own & {p.data_ptr() for p in backbone.parameters()}
    first, second = ({p.data_ptr() for p in model.adapters.parameters()} for model in models)
    assert not first & second


def test_copies_are_whole(pair: tuple) -> None:
    """A deep copy shares nothing."""
    _, model, _ = pair
    theirs = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model)
    assert not theirs & {t.data_ptr() for t in (*copied.parameters(), *copied.buffers())}


def train(model: AdaptiveViT) -> None:
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.5)
    run(model.train(), tiny_images(model))
    optimizer.step()
    model.eval()


def unfreeze_and_use_hooks(model: AdaptiveViT) -> None:
    model.requires_grad_(True)
    model.backbone.blocks[1].register_forward_hook(lambda module, inputs, out: out * 2)


def replace_weights(model: AdaptiveViT) -> None:
    """Other parameters, not other numbers in the shared ones."""
    model.backbone.blocks[1].attn.qkv.weight = nn.Parameter(torch.ones(96, 32, dtype=torch.float64))
    model.backbone.blocks[0] = nn.Identity()
    del model.backbone.blocks[2]


def load_another_adapter(model: AdaptiveViT) -> None:
    with TemporaryDirectory() as folder:
        adapt(tiny_backbone(VIT), 7).save_adapter(folder)
        model.load_adapter(folder)


CHANGES = {
    "other prompts": lambda model: randomize(model.adapters, 5),
    "training": train,
    "another adapter": load_another_adapter,
    "another head": lambda model: model.reset_classifier(9),
    "another pooling": lambda model: model.reset_classifier(3, "avg"),
    "requires_grad and hooks": unfreeze_and_use_hooks,
    "another size": lambda model: model.set_input_size((64, 64)),
    "dtype": lambda model: model.bfloat16(),
    "device": lambda model: model.to("meta"),
    "training mode": lambda model: model.backbone.train(),
    "other weights and blocks": replace_weights,
    "own head": lambda model: setattr(model, "head", nn.Linear(32, 3).double()),
    "pruning": lambda model: model.prune_intermediate_layers(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_independent(pair: tuple, change: str) -> None:
    backbone, model, other = pair
    images = tiny_images(other)
    before, bare = logits(other, images), logits(backbone, images)
    form = description(other.backbone)
    learns = {name: p.requires_grad for name, p in other.named_parameters()}
    CHANGES[change](model)
    assert_same(logits(other, images), before, 0.0)
    assert_same(logits(backbone, images), bare, 0.0)
    assert description(other.backbone) == form
    assert {name: p.requires_grad for name, p in other.named_parameters()} == learns


def test_unfrozen_stays_unfrozen() -> None:
    """Over another head, a second model of the same backbone and one of the first model's own."""
    backbone = tiny_backbone(VIT)
    model = adapt(backbone, 1)
    model.backbone.blocks[2].requires_grad_(True)
    expected = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert expected
    model.reset_classifier(5)
    adapt(backbone, 2)
    second = adapt(model.backbone, 3)
    model.train().eval()
    assert {name for name, p in model.backbone.named_parameters() if p.requires_grad} == expected
    assert not any(p.requires_grad for p in second.backbone.parameters())
    assert all(p.requires_grad for p in model.adapters.parameters())


def test_batch_norm_in_the_head(tmp_path: Path) -> None:
    """As for a linear probe of MAE: it trains, and its statistics belong to the adapter."""
    backbone = tiny_backbone(VIT)
    model = adapt(backbone, 1)
    model.head = nn.Sequential(nn.BatchNorm1d(32, affine=False), nn.Linear(32, 4)).double()
    images = tiny_images(model, batch=6)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    expected = run(model.train(), images, "reference")
    model.head[0].reset_running_stats()
    assert_same(run(model, images), expected)
    weight = model.head[1].weight.detach().clone()
    optimizer.step()
    assert (model.head[1].weight - weight).abs().max() > 1e-6
    state = model.adapter_state()
    assert state["head.0.running_mean"].abs().max() > 1e-3
    assert state["head.0.num_batches_tracked"] == 1
    assert "head.1.weight" in state
    model.eval()
    before = copy.deepcopy(state)
    trained = logits(model, images)
    assert_same(dict(model.adapter_state()), dict(before), 0.0)

    model.save_adapter(tmp_path)
    other = adapt(backbone, 2)
    other.head = nn.Sequential(nn.BatchNorm1d(32, affine=False), nn.Linear(32, 4)).double()
    other.load_adapter(tmp_path)
    assert_same(logits(other.eval(), images), trained, 0.0)
