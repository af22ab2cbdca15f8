"""Recipes, methods, training and evaluation: what learns, from what, and the same bits after a stop."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft_import import peft
from torch import nn
from torch.utils.data import TensorDataset
from training_cases import BACKBONE, CLASSES, assert_same_training, make_model, recipes

from vapt_fast.training import METHODS, Recipe, Trainer, UserError, build_model, evaluate
from vapt_fast.training.evaluation import evaluate_by_class
from vapt_fast.training.methods import method_name, param_groups, trained_state


def test_learning_rate_warms_up_then_falls_to_zero():
    recipe = Recipe(0.5, epochs=10, warmup_epochs=2, batch_size=64)
    lrs = [recipe.learning_rate(step, steps_per_epoch=4) for step in range(40)]
    assert lrs[7] == max(lrs) == pytest.approx(0.5 * 64 / 256)
    assert lrs[0] == pytest.approx(lrs[7] / 8)
    assert all(a < b for a, b in pairwise(lrs[:8]))
    assert all(a >= b for a, b in pairwise(lrs[8:]))
    assert 0 < lrs[-1] < 0.01 * lrs[7]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("base_lr", 0.0, "must be a positive number, got 0.0"),
        ("base_lr", float("nan"), "must be a positive number"),
        ("base_lr", True, "must be float, got True"),
        ("weight_decay", -1.0, "must be at least 0"),
        ("epochs", 0, "must be at least 1, got 0"),
        ("epochs", "5", "must be int, got '5'"),
        ("batch_size", 0, "must be at least 1, got 0"),
        ("batch_size", 2.5, "must be int, got 2.5"),
        ("warmup_epochs", -1, "must be at least 0"),
        ("momentum", 1.0, r"must be in \[0, 1\)"),
        ("label_smoothing", 1.5, r"must be in \[0, 1\)"),
        ("clip_grad", 0.0, "must be a positive number"),
        ("clip_grad", "no", r"must be float \| None, got 'no'"),
        ("amp", "int8", "must be one of"),
        ("seed", -1, "must be in"),
        ("optimizer", "lion", "must be one of"),
    ],
)
def test_bad_recipes(option, value, message):
    with pytest.raises(UserError, match=f"{option} {message}"):
        Recipe(**{"base_lr": 1.0, option: value})


# ---- methods


needs_peft = pytest.mark.skipif(peft is None, reason="needs peft")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=needs_peft if METHODS[name].lora else ()) for name in METHODS]
)
def test_every_method_learns_and_only_what_it_should(method, toy):
    torch.manual_seed(0)
    model = make_model(method)
    trained = trained_state(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, recipes(2.0 if method != "full" else 0.1, epochs=6)[0], toy.train)
    losses = [trainer.run_epoch().train_loss for _ in range(6)]
    assert trainer.finished
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= set(trained)
    assert any("head" in name for name in changed)
    own = {name for name in changed if "lora_" not in name}
    assert (method == "full") == any(name.startswith("blocks.") for name in own)


@pytest.mark.parametrize("method", ["vapt", "full"])
def test_everything_decays_but_the_bias_of_the_head(method):
    model = make_model(method)
    decayed, exempt = param_groups(model, 0.3)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert [p.shape for p in exempt["params"]] == [(CLASSES,)]
    assert len(decayed["params"]) + 1 == sum(p.requires_grad for p in model.parameters())


def test_no_bias_of_a_head_of_several_layers_decays():
    model = make_model()
    model.head = nn.Sequential(nn.Linear(model.embed_dim, 7), nn.GELU(), nn.Linear(7, CLASSES))
    decayed, exempt = model.param_groups(0.3)
    assert [p.shape for p in exempt["params"]] == [(7,), (CLASSES,)]
    assert len(decayed["params"]) + 2 == len(list(model.trainable_parameters()))


@pytest.mark.parametrize(
    ("kind", "method"), [("adaptive", "vapt"), ("deep", "vpt-deep"), ("shallow", "vpt-shallow")]
)
def test_a_method_may_be_called_by_its_kind_of_prompts(kind, method):
    assert method_name(kind) == method_name(method) == method
    assert make_model(kind).config.kind == kind
    with pytest.raises(UserError, match=rf"'{kind}' for '{method}'.*got '{kind}s'"):
        make_model(f"{kind}s")


@pytest.mark.parametrize("num_classes", ["3", 2.0, 0, True, None])
def test_numbers_of_classes_that_are_none(num_classes):
    with pytest.raises(UserError, match=f"num_classes must be a positive int, got {num_classes!r}"):
        build_model("full", BACKBONE, num_classes)


# ---- training


def test_adamw(toy):
    """The optimizer is torch's own AdamW at the recipe's learning rate, momentum and weight decay."""
    recipe = recipes(0.01, optimizer="adamw", weight_decay=0.3, momentum=0.8)[0]
    trainer = Trainer(make_model("full"), recipe, toy.train)
    optimizer = trainer._optimizer
    assert type(optimizer) is torch.optim.AdamW
    decayed, exempt = optimizer.param_groups
    assert decayed["betas"] == (0.8, 0.999)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert trainer.run_epoch().lr == pytest.approx(0.01 * 5 / 256)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["vapt", "full"])
def test_resumed_training_gives_the_same_bits(method, optimizer, toy):
    recipe = recipes(1.0 if method == "vapt" else 0.1, epochs=4, seed=7, optimizer=optimizer)[0]
    trainers = []
    for _ in range(3):
        torch.manual_seed(0)
        trainers.append(Trainer(make_model(method), recipe, toy.train))
    whole, first, second = trainers
    while not whole.finished:
        whole.run_epoch()
    first.run_epoch()
    first.run_epoch()
    state = first.state_dict()
    random.random(), np.random.rand(), torch.rand(3)  # whatever happens in between must not matter
    second.load_state_dict(state)
    while not second.finished:
        second.run_epoch()
    assert_same_training(whole.model, second.model)


def test_a_state_of_another_recipe_is_refused(toy):
    trainer, other = (Trainer(make_model(), recipe, toy.train) for recipe in recipes(1.0, 2.0))
    with pytest.raises(ValueError, match="the state is of the recipe"):
        other.load_state_dict(trainer.state_dict())


@pytest.mark.parametrize("options", [{"amp": "bfloat16"}, {"clip_grad": 0.1}, {"label_smoothing": 0.1}])
def test_training_options(options, toy):
    trainer = Trainer(make_model(), recipes(1.0, **options)[0], toy.train)
    losses = [trainer.run_epoch().train_loss for _ in range(3)]
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]


# ---- evaluation


class Named(torch.nn.Module):
    """Says the class that an image's first pixel is the number of."""

    def forward(self, images):
        return 5.0 * F.one_hot(images[:, 0, 0, 0].long(), 4)


def test_evaluation():
    said, labels = torch.tensor([0, 0, 1, 1, 1, 3, 3]), torch.tensor([0, 0, 0, 1, 1, 1, 3])
    images, seen = said.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), []
    dataset, names = TensorDataset(images, labels), ["a", "b", "c", "d"]
    result = evaluate_by_class(
        Named(), dataset, names, batch_size=3, progress=lambda *done: seen.append(done)
    )
    assert result.confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert result.num_images == 7
    assert result.accuracy == pytest.approx(5 / 7)
    two_thirds = pytest.approx(2 / 3)
    assert result.by_class == [("a", 3, two_thirds), ("b", 3, two_thirds), ("c", 0, None), ("d", 1, 1.0)]
    assert result.mean_class_accuracy == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert result.largest_confusions(5) == [("a", "b", 1), ("b", "d", 1)]
    assert result.largest_confusions(1) == [("a", "b", 1)]
    assert result.loss == pytest.approx(F.cross_entropy(Named()(images), labels).item(), rel=1e-5)
    written = json.loads(json.dumps(result.as_dict()))
    assert written["classes"][2] == {"class": "c", "images": 0, "accuracy": None}
    assert seen == [(3, 7), (6, 7), (7, 7)]
    score = evaluate(Named(), dataset, batch_size=3)
    assert (score.accuracy, score.loss) == (result.accuracy, result.loss)
    with pytest.raises(UserError, match="tells 4 classes apart, but has 3 class names"):
        evaluate_by_class(Named(), dataset, names[:3])
