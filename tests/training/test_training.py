"""Training: disjoint splits, an honest choice, the same bits after a stop, no half-written files."""

import errno
import json
import os
import random
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Subset, TensorDataset

import vapt_fast.training.checkpoint as checkpoint
import vapt_fast.training.files as files
from vapt_fast import PromptConfig
from vapt_fast.config import KINDS
from vapt_fast.training import (
    METHODS,
    Recipe,
    Splits,
    Trainer,
    UserError,
    build_model,
    data_config,
    digit_splits,
    eval_transform,
    evaluate,
    folder_splits,
    load_model,
    save_model,
    search,
)
from vapt_fast.training.checkpoint import load_checkpoint, save_checkpoint
from vapt_fast.training.evaluation import evaluate_by_class
from vapt_fast.training.loader import in_memory, make_loader
from vapt_fast.training.methods import method_name, param_groups, trained_state
from vapt_fast.training.run import RunOptions, run
from vapt_fast.training.splits import evaluation_data, image_files, stratified_order
from vapt_fast.training.transforms import AUGMENTATIONS, Augmentation, train_transform

BACKBONE = "vit_digits_patch4_32"
CLASSES = 3


@pytest.fixture(scope="module")
def config():
    return data_config(timm.create_model(BACKBONE).pretrained_cfg)


@pytest.fixture(scope="module")
def digits(config):
    return digit_splits(config, seed=0, num_train=20)


@pytest.fixture(scope="module")
def toy():
    """Three classes of noise around three colours: learnable in a few steps."""
    generator = torch.Generator().manual_seed(0)

    def images(count):
        labels = torch.arange(count) % CLASSES
        colours = torch.eye(3)[labels].view(count, 3, 1, 1)
        return TensorDataset(colours + 0.3 * torch.randn(count, 3, 32, 32, generator=generator), labels)

    return Splits(("red", "green", "blue"), images(12), images(9), images(9))


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of 10 small PNG files each, in one folder."""
    generator = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(level - 50, level + 50, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def make_model(method="vapt"):
    return build_model(method, BACKBONE, CLASSES, prompts=PromptConfig(num_prompts=2))


def recipes(*base_lrs, epochs=3, **options):
    return [Recipe(lr, epochs=epochs, warmup_epochs=1, batch_size=5, **options) for lr in base_lrs]


def rows(dataset):
    """The images of a data set as comparable values."""
    return {image.numpy().tobytes() for image, _ in in_memory(dataset)}


# ---- splits


def test_digit_splits_are_disjoint_stratified_and_reproducible(config, digits):
    parts = [digits.train, digits.validation, digits.test]
    assert [len(part) for part in parts] == [20, 196, 400]
    assert sum(len(rows(part)) for part in parts) == len(set.union(*map(rows, parts)))
    assert torch.bincount(digits.train.tensors[1]).tolist() == [4] * 5
    again = digit_splits(config, seed=0, num_train=20)
    assert all(torch.equal(a.tensors[0], b.tensors[0]) for a, b in zip(parts, splits_of(again), strict=True))


def splits_of(splits):
    return splits.train, splits.validation, splits.test


def test_seed_changes_what_is_learned_from_but_not_the_test(config, digits):
    other = digit_splits(config, seed=1, num_train=20)
    assert torch.equal(other.test.tensors[0], digits.test.tensors[0])
    assert not torch.equal(other.train.tensors[0], digits.train.tensors[0])
    assert not rows(other.test) & (rows(other.train) | rows(other.validation))


def test_fewer_digits_are_the_beginning_of_more(config, digits):
    more = digit_splits(config, seed=0, num_train=100)
    assert torch.equal(more.train.tensors[0][:20], digits.train.tensors[0])
    assert len(digit_splits(config, seed=0).train) == 300


@pytest.mark.parametrize("num_train", [0, 4, 301])
def test_impossible_numbers_of_training_images(config, num_train):
    with pytest.raises(UserError, match=f"between 5, one a class, and 300.*got {num_train}"):
        digit_splits(config, seed=0, num_train=num_train)


def test_stratified_order_keeps_proportions_in_every_beginning():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    order = stratified_order(labels, seed=5)
    assert sorted(order) == list(range(100))
    for count in (10, 20, 50, 90):
        seen = np.bincount([labels[index] for index in order[:count]], minlength=3)
        assert np.abs(seen - count * np.array([0.6, 0.3, 0.1])).max() <= 1
    assert order != stratified_order(labels, seed=6)


def test_one_folder_is_split_in_three(image_folder, config):
    splits = folder_splits(image_folder, config, seed=0)
    assert splits.class_names == ("dark", "light")
    assert [len(part) for part in splits_of(splits)] == [12, 4, 4]
    assert len(set.union(*map(rows, splits_of(splits)))) == 20
    assert {splits.test.dataset.targets[index] for index in splits.test.indices} == {0, 1}
    again = folder_splits(image_folder, config, seed=0)
    assert again.train.indices == splits.train.indices
    assert folder_splits(image_folder, config, seed=1).train.indices != splits.train.indices


def test_without_a_share_there_is_no_test(image_folder, config):
    splits = folder_splits(image_folder, config, seed=0, test_share=0.0)
    assert (len(splits.train), len(splits.validation), splits.test) == (16, 4, None)
    with pytest.raises(UserError, match="none is left for validation"):
        folder_splits(image_folder, config, seed=0, validation_share=0.0)


def test_a_folder_that_is_split_already(image_folder, config):
    root = image_folder.parent / "split"
    for part in ("train", "val", "test"):
        for name in ("dark", "light"):
            (root / part / name).mkdir(parents=True)
    for index, file in enumerate(sorted(image_folder.rglob("*.png"))):
        part = ("train", "train", "train", "val", "test")[index % 5]
        file.rename(root / part / file.parent.name / file.name)
    splits = folder_splits(root, config, seed=0, num_train=4)
    assert [len(part) for part in splits_of(splits)] == [4, 4, 4]
    (root / "test").rename(root / "elsewhere")
    assert folder_splits(root, config, seed=0).test is None
    (root / "elsewhere" / "light").rename(root / "elsewhere" / "bright")
    (root / "elsewhere").rename(root / "test")
    with pytest.raises(UserError, match=r"test has the classes \['bright', 'dark'\].*\['dark', 'light'\]"):
        folder_splits(root, config, seed=0)


def test_folders_that_are_none(tmp_path, config):
    with pytest.raises(UserError, match="data must be 'digits' or a folder"):
        folder_splits(tmp_path / "missing", config, seed=0)
    with pytest.raises(UserError, match="must have one folder of images a class"):
        folder_splits(tmp_path, config, seed=0)


def test_a_damaged_training_image_is_named(image_folder, config):
    (image_folder / "dark" / "0.png").write_bytes(b"no image")
    splits = folder_splits(image_folder, config, seed=0)
    with pytest.raises(UserError, match=r"dark.0\.png is not an image"):
        [in_memory(part) for part in splits_of(splits)]


def test_transforms(config):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    fixed = eval_transform(config)
    assert torch.equal(fixed(image), fixed(image))
    assert fixed(image).shape == (3, 32, 32)
    torch.manual_seed(0)
    random_crop = train_transform(config | {"crop_pct": 0.8}, "crop-flip")
    assert random_crop(image).shape == (3, 32, 32)
    assert not torch.equal(random_crop(image), random_crop(image))
    with pytest.raises(UserError, match="augmentation must be one of"):
        train_transform(config, "mixup")


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentations_are_random_and_nothing_else_is(kind, crop_mode, config):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    transform = train_transform(config | {"crop_pct": 0.8, "crop_mode": crop_mode}, kind)
    torch.manual_seed(0)
    outputs = [transform(image) for _ in range(10)]
    assert {output.shape for output in outputs} == {(3, 32, 32)}
    different = len({output.numpy().tobytes() for output in outputs})
    assert different == {"none": 1, "flip": 2}.get(kind, different)
    assert (different > 2) == (kind not in ("none", "flip"))
    assert Augmentation(kind).random == (kind != "none")


@pytest.mark.parametrize("options", [{"color_jitter": 0.5}, {"random_erasing": 0.9}])
@pytest.mark.parametrize("kind", ["none", "crop-flip", "random-resized-crop"])
def test_colours_and_erasing_go_with_crops(kind, options, config):
    image = Image.fromarray(np.full((50, 60, 3), 99, np.uint8))  # on which a crop and a flip change nothing
    plain, changed = Augmentation(kind), Augmentation(kind, **options)
    assert len({train_transform(config, plain)(image).numpy().tobytes() for _ in range(5)}) == 1
    assert len({train_transform(config, changed)(image).numpy().tobytes() for _ in range(5)}) > 1
    assert changed.random


def test_the_smallest_crop(config):
    left_is_dark = np.zeros((64, 64, 3), np.uint8)
    left_is_dark[:, 32:] = 255
    image = Image.fromarray(left_is_dark)
    random.seed(0)  # timm's crops
    large = train_transform(config, Augmentation("random-resized-crop", crop_scale=0.9))
    small = train_transform(config, Augmentation("random-resized-crop", crop_scale=0.01))
    assert all(large(image).std() > 0.5 for _ in range(20))  # both halves are in every crop
    assert any(small(image).std() < 0.1 for _ in range(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mixup"}, "augmentation must be one of"),
        ({"kind": "flip", "crop_scale": 0.5}, "crop_scale needs an augmentation of"),
        ({"kind": "rand-augment", "crop_scale": 0.0}, r"crop_scale must be in \(0, 1\], got 0.0"),
        ({"kind": "rand-augment", "color_jitter": 0.4}, "color_jitter can't be combined with 'rand-augment'"),
        ({"color_jitter": -1.0}, r"color_jitter must be in \[0, 1\], got -1.0"),
        ({"random_erasing": 2.0}, r"random_erasing must be in \[0, 1\], got 2.0"),
        ({"random_erasing": "often"}, "random_erasing must be float, got 'often'"),
    ],
)
def test_bad_augmentations(options, message):
    with pytest.raises(UserError, match=message):
        Augmentation(**options)


def test_digits_can_be_augmented(config, digits):
    augmented = digit_splits(config, seed=0, num_train=20, augmentation="random-resized-crop")
    assert len(augmented.train) == 20
    assert not torch.equal(augmented.train[0][0], augmented.train[0][0])
    assert [label for _, label in augmented.train] == digits.train.tensors[1].tolist()
    assert torch.equal(augmented.test.tensors[0], digits.test.tensors[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_can_not_be_read_is_named_in_one_line(workers, image_folder, config):
    splits = folder_splits(image_folder, config, seed=0)
    (image_folder / "dark" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError) as raised:
        [list(make_loader(part, 4, workers=workers)) for part in splits_of(splits)]
    assert str(raised.value) == f"{image_folder / 'dark' / '3.png'} is not an image that Pillow can read"


def test_the_files_of_splits(image_folder, config):
    splits = folder_splits(image_folder, config, seed=0)
    files = image_files(*splits_of(splits), None)
    assert sorted(files) == sorted(map(str, image_folder.rglob("*.png")))
    assert files[0] == splits.train.dataset.samples[splits.train.indices[0]][0]
    assert image_files(TensorDataset(torch.zeros(2)), Subset(TensorDataset(torch.zeros(2)), [0])) == []


def test_loader_gives_every_image_once(toy):
    for dataset in (toy.train, Subset(toy.train, range(12))):
        batches = list(make_loader(dataset, 5, shuffle_seed=1))
        assert [len(labels) for _, labels in batches] == [5, 5, 2]
        images = torch.cat([images for images, _ in batches])
        assert {image.numpy().tobytes() for image in images} == rows(toy.train)
        again = torch.cat([images for images, _ in make_loader(dataset, 5, shuffle_seed=1)])
        assert torch.equal(images, again)


# ---- recipe


def test_learning_rate_warms_up_then_falls_to_zero():
    recipe = Recipe(0.5, epochs=10, warmup_epochs=2, batch_size=64)
    lrs = [recipe.learning_rate(step, steps_per_epoch=4) for step in range(40)]
    assert lrs[7] == max(lrs) == pytest.approx(0.5 * 64 / 256)
    assert lrs[0] == pytest.approx(lrs[7] / 8)
    assert all(a < b for a, b in pairwise(lrs[:8]))
    assert all(a >= b for a, b in pairwise(lrs[8:]))
    assert 0 < lrs[-1] < 0.01 * lrs[7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_lr": 0.0}, "base_lr must be a positive number, got 0.0"),
        ({"base_lr": float("nan")}, "base_lr must be a positive number"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\)"),
        ({"clip_grad": 0.0}, "clip_grad must be a positive number"),
        ({"amp": "int8"}, "amp must be one of"),
        ({"seed": -1}, "seed must be in"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"epochs": "5"}, "epochs must be int, got '5'"),
        ({"batch_size": 2.5}, "batch_size must be int, got 2.5"),
        ({"clip_grad": "no"}, r"clip_grad must be float \| None, got 'no'"),
        ({"base_lr": True}, "base_lr must be float, got True"),
    ],
)
def test_bad_recipes(options, message):
    with pytest.raises(UserError, match=message):
        Recipe(**{"base_lr": 1.0, **options})


# ---- training


@pytest.mark.parametrize("method", METHODS)
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
    assert (method == "full") == any(name.startswith("blocks.") for name in changed)


@pytest.mark.parametrize("method", ["vapt", "full"])
def test_everything_decays_but_the_bias_of_the_head(method):
    model = make_model(method)
    decayed, exempt = param_groups(model, 0.3)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert [p.shape for p in exempt["params"]] == [(CLASSES,)]
    assert len(decayed["params"]) + 1 == sum(p.requires_grad for p in model.parameters())


def test_a_method_may_be_called_by_its_kind_of_prompts():
    for kind, cls in KINDS.items():
        assert method_name(kind) == method_name(cls.method) == cls.method
        assert make_model(kind).config.kind == kind
    with pytest.raises(UserError, match=r"'adaptive' for 'vapt'.*got 'adaptiv'"):
        make_model("adaptiv")


@pytest.mark.parametrize("num_classes", ["3", 2.0, 0, True, None])
def test_numbers_of_classes_that_are_none(num_classes):
    with pytest.raises(UserError, match=f"num_classes must be a positive int, got {num_classes!r}"):
        build_model("full", BACKBONE, num_classes)


def test_adamw(toy):
    """The steps of torch's own AdamW at the recipe's learning rate, momentum and weight decay."""
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

    def trainer():
        torch.manual_seed(0)
        return Trainer(make_model(method), recipe, toy.train)

    whole, first, second = trainer(), trainer(), trainer()
    while not whole.finished:
        whole.run_epoch()
    first.run_epoch()
    first.run_epoch()
    state = first.state_dict()
    random.random(), np.random.rand(), torch.rand(3)  # whatever happens in between must not matter
    second.load_state_dict(state)
    while not second.finished:
        second.run_epoch()
    for name, tensor in trained_state(whole.model).items():
        assert torch.equal(tensor, trained_state(second.model)[name]), name


def test_a_state_of_another_recipe_is_refused(toy):
    trainer = Trainer(make_model(), recipes(1.0)[0], toy.train)
    other = Trainer(make_model(), recipes(2.0)[0], toy.train)
    with pytest.raises(ValueError, match="the state is of the recipe"):
        other.load_state_dict(trainer.state_dict())


@pytest.mark.parametrize("options", [{"amp": "bfloat16"}, {"clip_grad": 0.1}, {"label_smoothing": 0.1}])
def test_training_options(options, toy):
    trainer = Trainer(make_model(), recipes(1.0, **options)[0], toy.train)
    losses = [trainer.run_epoch().train_loss for _ in range(3)]
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]


def test_evaluate_counts_right(toy):
    model = make_model().eval()
    with torch.no_grad():
        logits = model(toy.test.tensors[0])
    score = evaluate(model, toy.test, batch_size=4)
    assert score.accuracy == pytest.approx((logits.argmax(1) == toy.test.tensors[1]).float().mean().item())
    loss = torch.nn.functional.cross_entropy(logits, toy.test.tensors[1]).item()
    assert score.loss == pytest.approx(loss, rel=1e-5)


class Named(torch.nn.Module):
    """Says the class that an image's first pixel is the number of."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images):
        return 5.0 * torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), self.num_classes)


def test_evaluation_by_class():
    said = torch.tensor([0, 0, 1, 1, 1, 3, 3])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 3])
    images = said.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    seen = []
    result = evaluate_by_class(
        Named(4),
        TensorDataset(images, labels),
        ["a", "b", "c", "d"],
        batch_size=3,
        progress=lambda *done: seen.append(done),
    )
    assert result.confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert result.num_images == 7
    assert result.accuracy == pytest.approx(5 / 7)
    assert result.class_counts == [3, 3, 0, 1]
    assert result.class_accuracy == [pytest.approx(2 / 3), pytest.approx(2 / 3), None, 1.0]
    assert result.mean_class_accuracy == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert result.largest_confusions(5) == [("a", "b", 1), ("b", "d", 1)]
    assert result.largest_confusions(1) == [("a", "b", 1)]
    loss = torch.nn.functional.cross_entropy(Named(4)(images), labels)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert json.loads(json.dumps(result.as_dict()))["classes"][2] == {
        "class": "c",
        "images": 0,
        "accuracy": None,
    }
    assert seen == [(3, 7), (6, 7), (7, 7)]
    with pytest.raises(UserError, match="tells 4 classes apart, but has 3 class names"):
        evaluate_by_class(Named(4), TensorDataset(images, labels), ["a", "b", "c"])


def test_evaluation_matches_classes_by_name(image_folder, config):
    names = ["light", "unseen", "dark"]  # another order than the folders'
    dataset = evaluation_data(image_folder, config, names)
    assert [label for _, label in dataset] == [2] * 10 + [0] * 10
    with pytest.raises(UserError, match=r"images has classes that the model doesn't know: \['dark'\]"):
        evaluation_data(image_folder, config, ["light"])
    with pytest.raises(UserError, match="no folder val/: leave the split out"):
        evaluation_data(image_folder, config, names, "validation")


def test_evaluation_of_a_split(image_folder, config):
    root = image_folder.parent / "split"
    (root / "valid").mkdir(parents=True)
    image_folder.rename(root / "train")
    (root / "train" / "dark").rename(root / "valid" / "dark")
    (root / "train" / "empty").mkdir()
    names = ["dark", "light", "empty"]
    assert {label for _, label in evaluation_data(root, config, names, "train")} == {1}
    assert {label for _, label in evaluation_data(root, config, names, "validation")} == {0}
    with pytest.raises(UserError, match=r"no images of the split 'test', it has \['train', 'validation'\]"):
        evaluation_data(root, config, names)


def test_evaluation_of_the_digits(config):
    names = [str(digit) for digit in reversed(range(10))]
    images, labels = evaluation_data("digits", config, names).tensors
    splits = digit_splits(config, seed=0)
    assert torch.equal(images, splits.test.tensors[0])
    assert torch.equal(labels, 9 - 5 - splits.test.tensors[1])


# ---- search


class Guarded(TensorDataset):
    """Images that must not be looked at before ``open`` is set."""

    open = False

    def __getitem__(self, index):
        assert self.open, "looked at too early"
        return super().__getitem__(index)


def test_the_recipe_is_chosen_in_validation_without_a_look_at_the_test(toy, monkeypatch):
    """With the labels of the validation images turned, the candidate that learns least is the best."""
    test = Guarded(*toy.test.tensors)
    images, labels = toy.validation.tensors
    splits = Splits(toy.class_names, toy.train, TensorDataset(images, (labels + 1) % CLASSES), test)
    evaluated = []

    def spy(model, dataset, **options):
        evaluated.append(dataset)
        test.open = dataset is test
        return evaluate(model, dataset, **options)

    monkeypatch.setattr(sys.modules[search.__module__], "evaluate", spy)
    found = search(make_model, splits, recipes(4.0, 1e-6, epochs=6))
    assert found.recipe.base_lr == 1e-6
    assert [c["base_lr"] for c in found.candidates] == [4.0, 1e-6]
    learned, untouched = found.candidates
    assert untouched["validation_accuracy"] >= learned["validation_accuracy"] == 0
    assert untouched["validation_loss"] < learned["validation_loss"]
    assert [dataset is test for dataset in evaluated] == [False] * 12 + [True]


def test_training_sees_only_training_images(toy, monkeypatch):
    seen = set()
    step = Trainer._step

    def spy(self, images, labels, lr):
        seen.update(image.numpy().tobytes() for image in images)
        return step(self, images, labels, lr)

    monkeypatch.setattr(Trainer, "_step", spy)
    search(make_model, toy, recipes(1.0, 0.1, epochs=1))
    assert seen == rows(toy.train)


def test_diverged_candidates_lose(toy):
    found = search(make_model, toy, recipes(1e30, 1.0))
    assert found.recipe.base_lr == 1.0
    assert [c["diverged"] for c in found.candidates] == [True, False]
    with pytest.raises(UserError, match="diverged with every learning rate"):
        search(make_model, toy, recipes(1e30))


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
@pytest.mark.parametrize("where", ["between epochs", "inside an epoch"])
def test_stopped_search_resumes_to_the_same_bits(stop_at, where, toy, tmp_path, monkeypatch):
    candidates = recipes(1.0, 0.2, epochs=3)
    whole = search(make_model, toy, candidates, folder=tmp_path / "whole")

    calls = 0
    step = Trainer._step

    def stop_in_epoch(self, images, labels, lr):
        nonlocal calls
        calls += 1
        if calls == 3 * stop_at + 2:  # 3 steps an epoch
            raise Stop
        return step(self, images, labels, lr)

    def stop_after_epoch(*_):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stop

    folder = tmp_path / "stopped"
    between = where == "between epochs"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step if between else stop_in_epoch)
        with pytest.raises(Stop):
            search(make_model, toy, candidates, folder=folder, progress=stop_after_epoch if between else None)
    resumed = search(make_model, toy, candidates, folder=folder, resume=True)

    assert resumed.candidates == whole.candidates
    assert resumed.test == whole.test
    for name, tensor in trained_state(whole.model).items():
        assert torch.equal(tensor, trained_state(resumed.model)[name]), name
    assert metrics(folder) == metrics(tmp_path / "whole")


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_metrics_are_json_lines(toy, tmp_path):
    search(make_model, toy, recipes(1.0, 1e30), folder=tmp_path, validate_every=2)
    lines = metrics(tmp_path)
    assert [(line["candidate"], line["epoch"]) for line in lines][:3] == [(0, 1), (0, 2), (0, 3)]
    assert [line["validation_accuracy"] is None for line in lines][:3] == [True, False, False]
    assert lines[-1]["train_loss"] is None  # not a finite number
    assert {"lr", "train_accuracy", "validation_loss", "base_lr", "weight_decay"} <= set(lines[0])


def test_resume_with_other_options_or_nothing_to_resume(toy, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        search(make_model, toy, recipes(1.0), folder=tmp_path, resume=True)
    search(make_model, toy, recipes(1.0, epochs=1), folder=tmp_path)
    with pytest.raises(UserError, match="other options"):
        search(make_model, toy, recipes(2.0, epochs=1), folder=tmp_path, resume=True)


# ---- files


def test_checkpoints_hold_no_code(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"a": torch.ones(2), "b": [1, 2.5, "text", None, True]}
    save_checkpoint(path, state)
    assert load_checkpoint(path)["b"] == state["b"]
    torch.save({"code": os.system}, path)
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        load_checkpoint(path)


def test_damaged_checkpoints_are_refused(tmp_path):
    """Cut anywhere, or with any bit flipped, also in the middle of a tensor."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"a": torch.ones(200), "epoch": 3})
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        at = rng.randrange(len(content))
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        for damaged in (content[:at], bytes(flipped)):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"damaged|was written by vapt_fast"):
                load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path)["epoch"] == 3


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "__version__", "0.0.9")
        save_checkpoint(tmp_path / "checkpoint.pt", {"epoch": 3})
    with pytest.raises(UserError, match=r"was written by vapt_fast 0\.0\.9, and this is"):
        load_checkpoint(tmp_path / "checkpoint.pt")


class FullDisk:
    """A file that takes some bytes, then finds the disk full."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, content):
        self._file.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.fixture
def full_disk(monkeypatch):
    def opened(path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)  # noqa: SIM115, the caller closes it
        return FullDisk(file) if "x" in mode else file

    monkeypatch.setattr(files, "open", opened, raising=False)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def interrupted(_):
        raise error

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(type(error)):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_checkpoint_usable(toy, tmp_path, full_disk, monkeypatch):
    candidates = recipes(1.0, epochs=3)
    whole = search(make_model, toy, candidates)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", open, raising=False)
        with pytest.raises(Stop):
            search(make_model, toy, candidates, folder=tmp_path, progress=raise_stop)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match="No space left"):
        search(make_model, toy, candidates, folder=tmp_path, resume=True)
    assert sorted(os.listdir(tmp_path)) == before
    monkeypatch.setattr(files, "open", open, raising=False)
    resumed = search(make_model, toy, candidates, folder=tmp_path, resume=True)
    for name, tensor in trained_state(whole.model).items():
        assert torch.equal(tensor, trained_state(resumed.model)[name]), name


def raise_stop(*_):
    raise Stop


@pytest.mark.parametrize("method", ["vapt", "linear", "full"])
def test_saved_models_come_back(method, toy, tmp_path):
    model = make_model(method)
    Trainer(model, recipes(0.1)[0], toy.train).run_epoch()
    save_model(model, tmp_path, {"class_names": ["a", "b", "c"]})
    loaded, metadata = load_model(tmp_path)
    assert metadata["class_names"] == ["a", "b", "c"]
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(toy.test.tensors[0]), model.eval()(toy.test.tensors[0]))


def test_damaged_or_missing_models(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "missing")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(UserError, match="damaged or no model"):
        load_model(tmp_path)


# ---- run


def options(**changes):
    settings = {
        "prompts": {"num_prompts": 2},
        "base_lrs": [1.0],
        "train_images": 5,
        "recipe": {"epochs": 2, "warmup_epochs": 1, "batch_size": 5},
    }
    return RunOptions(**{**settings, **changes})


@pytest.mark.parametrize("method", ["vapt", "full"])
def test_a_run_and_its_model(method, tmp_path, config):
    chosen = options(method=method, base_lrs=[0.05])
    result = run(chosen, tmp_path)
    assert RunOptions.read(tmp_path) == chosen
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["num_images"] == {"train": 5, "validation": 196, "test": 400}
    assert not (tmp_path / "checkpoint.pt").exists()
    model, metadata = load_model(tmp_path)
    assert metadata["class_names"] == ["5", "6", "7", "8", "9"]
    assert tuple(metadata["data_config"]["mean"]) == (0.5, 0.5, 0.5)
    test = digit_splits(config, seed=0, num_train=5).test
    assert evaluate(model, test, batch_size=5).accuracy == result["test_accuracy"]


def test_a_stopped_run_saves_the_same_adapter(tmp_path):
    run(options(), tmp_path / "whole")
    with pytest.raises(Stop):
        run(options(), tmp_path / "stopped", progress=raise_stop)
    run(RunOptions.read(tmp_path / "stopped"), tmp_path / "stopped", resume=True)
    whole, resumed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_that_fails_leaves_the_earlier_adapter(tmp_path):
    run(options(), tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(Stop):
        run(options(base_lrs=[0.5]), tmp_path, progress=raise_stop)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    load_model(tmp_path)


def stopped_run(image_folder, folder, **changes):
    """A run on a folder of images that was stopped after one epoch."""
    with pytest.raises(Stop):
        run(options(data=str(image_folder), train_images=None, **changes), folder, progress=raise_stop)


def rename_class(images):
    (images / "dark").rename(images / "zebra")  # the rows of the head would change places


def remove_class(images):
    for part in ("dark", "other"):
        (images / part).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(images / part / "0.png")
    shutil.rmtree(images / "light")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_class, r"classes were \['dark', 'light'\] and are \['light', 'zebra'\]"),
        (remove_class, r"classes were \['dark', 'light'\] and are \['dark', 'other'\]"),
        (lambda images: (images / "dark" / "3.png").unlink(), "missing images: dark/3.png"),
        (
            lambda images: (images / "dark" / "3.png").rename(images / "light" / "x.png"),
            "new images: light/x",
        ),
    ],
)
def test_a_run_goes_on_with_the_same_images_only(image_folder, tmp_path, change, message):
    stopped_run(image_folder, tmp_path / "out")
    change(image_folder)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=message):
        run(RunOptions.read(tmp_path / "out"), tmp_path / "out", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_run_goes_on_with_the_same_weights_only(image_folder, tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model(BACKBONE).state_dict(), weights)
    stopped_run(image_folder, tmp_path / "out", weights=str(weights))
    save_file(timm.create_model(BACKBONE).state_dict(), weights)
    with pytest.raises(UserError, match="the weights to start from are others"):
        run(RunOptions.read(tmp_path / "out"), tmp_path / "out", resume=True)


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"files": 3}'])
def test_a_run_whose_inputs_are_lost(image_folder, tmp_path, content):
    stopped_run(image_folder, tmp_path / "out")
    path = tmp_path / "out" / "inputs.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"inputs.json (does not exist|is damaged)"):
        run(RunOptions.read(tmp_path / "out"), tmp_path / "out", resume=True)


def test_options_of_another_version(tmp_path):
    options().write(tmp_path)
    written = json.loads((tmp_path / "run.json").read_text()) | {"library_version": "7.1", "rank": 3}
    (tmp_path / "run.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"unknown options \['rank'\]: it was written by vapt_fast 7.1"):
        RunOptions.read(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        RunOptions.read(tmp_path)


@pytest.mark.parametrize("method", ["vapt", "full"])
def test_a_finished_run_is_trained_on(tmp_path, method):
    """The recipe that won goes on along the longer cosine, also if that is stopped at any time."""
    chosen = options(method=method, base_lrs=[0.1, 1e-6])
    first = run(chosen, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text()
    trained = trained_state(load_model(tmp_path)[0])
    with pytest.raises(UserError, match=r"was trained for 2 epochs\. To train on.*got 2"):
        RunOptions.read(tmp_path).extended(2, tmp_path)
    longer = RunOptions.read(tmp_path).extended(5, tmp_path)
    with pytest.raises(Stop):
        run(longer, tmp_path, resume=True, progress=raise_stop)
    assert not (tmp_path / "result.json").exists()
    assert all(torch.equal(v, trained[n]) for n, v in trained_state(load_model(tmp_path)[0]).items())
    result = run(RunOptions.read(tmp_path), tmp_path, resume=True)
    assert result["recipe"] == {**first["recipe"], "epochs": 5}
    assert result["extended_from_epochs"] == 2
    assert (tmp_path / "metrics.jsonl").read_text().startswith(lines)
    new = metrics(tmp_path)[4:]
    assert [line["epoch"] for line in new] == [3, 4, 5]
    recipe = Recipe(**result["recipe"])
    assert [line["lr"] for line in new] == [recipe.learning_rate(epoch - 1, 1) for epoch in (3, 4, 5)]

    model = build_model(method, BACKBONE, 5, prompts=PromptConfig(num_prompts=2))
    trainer = Trainer(model, recipe, digit_splits(data_config(model.pretrained_cfg), 0, 5).train)
    trainer.start_from(trained, 2)
    while not trainer.finished:
        trainer.run_epoch()
    for name, tensor in trained_state(load_model(tmp_path)[0]).items():
        assert torch.equal(tensor, trained_state(model)[name]), name


@pytest.mark.parametrize(
    ("method", "source"), [("vapt", "random"), ("vapt", "file"), ("full", "file"), ("linear", "random")]
)
def test_what_was_trained_on_other_weights_needs_nothing_to_be_loaded(tmp_path, method, source, toy):
    changes = {"pretrained": False}
    if source == "file":
        torch.manual_seed(3)
        torch.save({"state_dict": timm.create_model(BACKBONE).state_dict()}, tmp_path / "w.pth")
        changes = {"weights": str(tmp_path / "w.pth")}
    result = run(options(method=method, base_lrs=[0.1], **changes), tmp_path / "out")
    (tmp_path / "w.pth").unlink(missing_ok=True)
    assert bool(list((tmp_path / "out").glob("backbone-*"))) == (method != "full")
    model, metadata = load_model(tmp_path / "out")
    test = digit_splits(metadata["data_config"], seed=0, num_train=5).test
    assert evaluate(model, test, batch_size=5).accuracy == result["test_accuracy"]


def test_an_adapter_of_the_users_own_is_loaded(tmp_path):
    model = make_model()
    model.save_adapter(tmp_path, metadata={"note": 1})
    loaded, metadata = load_model(tmp_path)
    assert (metadata["class_names"], metadata["note"]) == (["0", "1", "2"], 1)
    assert metadata["data_config"]["input_size"] == [3, 32, 32]
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model(BACKBONE, pretrained=True).state_dict(), weights)
    again, _ = load_model(tmp_path, weights=weights)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in loaded.state_dict().items())
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path, weights=tmp_path / "none")
    with pytest.raises(UserError, match="can't be made"):
        load_model(tmp_path, backbone="local-dir:/nowhere")


def test_numbers_of_numpy_in_a_run(toy, tmp_path):
    lrs = np.array([0.1, 1.0])
    chosen = options(base_lrs=list(lrs), train_images=np.int64(5), validation_share=np.float32(0.25))
    chosen.write(tmp_path)
    assert RunOptions.read(tmp_path) == chosen
    with pytest.raises(Stop):
        search(make_model, toy, recipes(*lrs), folder=tmp_path / "a", progress=raise_stop)
    search(make_model, toy, recipes(*lrs), folder=tmp_path / "a", resume=True)


def test_images_in_a_folder(image_folder, tmp_path):
    common = {"data": str(image_folder), "train_images": None}
    plain = run(options(**common), tmp_path / "plain")
    assert plain["num_images"] == {"train": 12, "validation": 4, "test": 4}
    cached = run(options(**common, cache=True), tmp_path / "cached")
    assert cached["candidates"] == plain["candidates"]
    augmented = run(options(**common, augment="crop-flip", crop_pct=0.8), tmp_path / "augmented")
    assert augmented["candidates"] != plain["candidates"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "method must be one of"),
        ({"backbone": "vit_digit"}, "backbone must be the name of a timm model, got 'vit_digit'; similar:"),
        ({"backbone": "resnet18", "pretrained": False}, "vapt with backbone 'resnet18'"),
        ({"prompts": {"num_prompts": -1}}, "num_prompts must be at least 0, got -1"),
        ({"prompts": {"conv_kernel": 9}}, "conv_kernel=9 .* does not fit the 8x8 patch grid"),
        ({"backend": "fortran"}, "fortran"),
        ({"backbone": "vit_bse_patch16_224"}, "similar: vit_base_patch16_224, "),
        ({"backbone": "vit_tiny_patch16_224.augreg_in21"}, "similar: vit_tiny_patch16_224.augreg_in21k, "),
        ({"image_size": 30}, "image_size must be a multiple of the patch size.*4x4 pixels, got 30"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": "64"}, r"image_size must be int \| None, got '64'"),
        ({"image_size": 64, "backbone": "resnet18"}, "'resnet18' can't be made with image_size=64"),
        ({"color_jitter": 2.0}, r"color_jitter must be in \[0, 1\]"),
        ({"train_images": "5"}, "train_images must be int"),
        ({"base_lrs": [1.0, "high"]}, r"base_lrs must be list\[float\] \| None, got \[1.0, 'high'\]"),
        ({"recipe": {"momentun": 0.9}}, "recipe: .*momentun"),
        ({"recipe": {"epochs": "2"}}, "epochs must be int, got '2'"),
        ({"recipe": {"epochs": 0}}, "epochs must be at least 1, got 0"),
        ({"cache": True, "augment": "crop-flip"}, "cache"),
        ({"validation_share": 0.7, "test_share": 0.5}, "together below 1, got 0.7 and 0.5"),
        ({"weights": "nowhere.pth"}, "weights 'nowhere.pth': no such file"),
        ({"crop_pct": 1.5}, r"crop_pct must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options_write_nothing(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(options(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistyped_backend_in_the_environment_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("VAPT_FAST_BACKEND", "tritn")
    with pytest.raises(UserError, match=r"VAPT_FAST_BACKEND must be one of .*, got 'tritn'"):
        run(options(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_all_damaged_images_are_found_before_training(workers, image_folder, tmp_path):
    for name in ("dark/0.png", "light/5.png", "light/6.png"):
        (image_folder / name).write_bytes(b"no image")
    with pytest.raises(UserError) as raised:
        run(options(data=str(image_folder), train_images=None), tmp_path / "out", workers=workers)
    first, *lines = str(raised.value).splitlines()
    assert first == "3 of 20 images can't be read:"
    assert sorted(line.split()[1] for line in lines) == [
        str(image_folder / name) for name in ("dark/0.png", "light/5.png", "light/6.png")
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["vapt", "full"])
def test_images_of_another_size(method, tmp_path):
    result = run(options(method=method, base_lrs=[0.05], image_size=40), tmp_path)
    model, metadata = load_model(tmp_path)
    assert metadata["data_config"]["input_size"] == [3, 40, 40]
    dataset = evaluation_data("digits", metadata["data_config"], metadata["class_names"])
    assert dataset[0][0].shape == (3, 40, 40)
    assert evaluate(model, dataset).accuracy == result["test_accuracy"]


def test_what_adamw_tries_by_itself():
    for method, optimizer in ((method, optimizer) for method in METHODS for optimizer in ("sgd", "adamw")):
        found = options(method=method, base_lrs=None, recipe={"optimizer": optimizer}).recipes()
        assert {recipe.base_lr for recipe in found} == set(METHODS[method].base_lrs[optimizer])
        assert {recipe.weight_decay for recipe in found} == {0.01 if optimizer == "adamw" else 1e-4}
