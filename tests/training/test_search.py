"""Search: an honest choice of the recipe, the same bits after a stop, no half-written files."""

import errno
import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from training_cases import CLASSES, Stop, assert_same_training, make_model, recipes, rows, stop

import vapt_fast.files as files
import vapt_fast.training.checkpoint as checkpoint
from vapt_fast.training import Splits, Trainer, UserError, evaluate, search
from vapt_fast.training.checkpoint import load_checkpoint, save_checkpoint
from vapt_fast.training.evaluation import evaluate_by_class


class Guarded(TensorDataset):
    """Images that must not be looked at before ``open`` is set."""

    open = False

    def __getitem__(self, index):
        assert self.open, "looked at too early"
        return super().__getitem__(index)


def test_the_recipe_is_chosen_in_validation_without_a_look_at_the_test(toy):
    """With the labels of the validation images turned, the candidate that learns least is the best."""
    test = Guarded(*toy.test.tensors)
    images, labels = toy.validation.tensors
    splits = Splits(toy.class_names, toy.train, TensorDataset(images, (labels + 1) % CLASSES), test)
    evaluated = []

    def spy(model, dataset, **options):
        evaluated.append(dataset)
        test.open = dataset is test
        return evaluate(model, dataset, **options)

    found = search(make_model, splits, recipes(4.0, 1e-6, epochs=6), evaluate=spy)
    assert found.recipe.base_lr == 1e-6
    assert [c["base_lr"] for c in found.candidates] == [4.0, 1e-6]
    learned, untouched = found.candidates
    assert untouched["validation_accuracy"] >= learned["validation_accuracy"] == 0
    assert untouched["validation_loss"] < learned["validation_loss"]
    assert [dataset is test for dataset in evaluated] == [False] * 12 + [True]


def test_training_sees_only_training_images(toy, monkeypatch):
    seen = set()
    step = Trainer._step

    def spy(self, images, *rest):
        seen.update(image.numpy().tobytes() for image in images)
        return step(self, images, *rest)

    monkeypatch.setattr(Trainer, "_step", spy)
    search(make_model, toy, recipes(1.0, 0.1, epochs=1))
    assert seen == rows(toy.train)


def test_diverged_candidates_lose(toy):
    found = search(make_model, toy, recipes(1e30, 1.0))
    assert found.recipe.base_lr == 1.0
    assert [c["diverged"] for c in found.candidates] == [True, False]
    with pytest.raises(UserError, match="diverged with every learning rate"):
        search(make_model, toy, recipes(1e30))


@pytest.mark.parametrize("classes", [(0, 1, 2), (0, 0, 0)], ids=["of three", "of the first"])
def test_a_candidate_that_diverges_in_its_last_step_loses(toy, classes):
    """The loss of its only step is that of the model before it; NaN as logits look like the first class."""
    images, labels = toy.validation.tensors
    splits = replace(toy, validation=TensorDataset(images, torch.tensor(classes)[labels]))
    candidates = [replace(recipe, batch_size=12) for recipe in recipes(1e30, 0.1, epochs=1)]
    found = search(make_model, splits, candidates)
    assert [c["diverged"] for c in found.candidates] == [True, False]
    assert found.recipe.base_lr == 0.1
    with pytest.raises(UserError, match="diverged with every learning rate"):
        search(make_model, splits, candidates[:1])
    untested = search(make_model, replace(splits, validation=None), candidates[:1])
    assert untested.test.accuracy == 0
    with pytest.raises(UserError, match="gives NaN for 9 of 9 images"):
        evaluate_by_class(untested.model, toy.test, toy.class_names)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
@pytest.mark.parametrize("where", ["between epochs", "inside an epoch"])
def test_stopped_search_resumes_to_the_same_bits(stop_at, where, toy, tmp_path, monkeypatch):
    candidates = recipes(*np.array([1.0, 0.2]), epochs=3)  # NumPy's numbers come back from the checkpoint
    whole = search(make_model, toy, candidates, folder=tmp_path / "whole")
    between, step = where == "between epochs", Trainer._step
    left = iter(range(stop_at if between else 3 * stop_at + 2))  # 3 steps an epoch
    next(left)

    def count_down(*arguments):
        if next(left, None) is None:
            raise Stop
        return None if between else step(*arguments)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        if not between:
            patch.setattr(Trainer, "_step", count_down)
        with pytest.raises(Stop):
            search(make_model, toy, candidates, folder=folder, progress=count_down if between else None)
    resumed = search(make_model, toy, candidates, folder=folder, resume=True)
    assert resumed.candidates == whole.candidates
    assert resumed.test == whole.test
    assert_same_training(whole.model, resumed.model)
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_metrics_are_json_lines(toy, tmp_path):
    search(make_model, toy, recipes(1.0, 1e30), folder=tmp_path, validate_every=2)
    lines = metrics(tmp_path)
    assert [(line["candidate"], line["epoch"]) for line in lines][:3] == [(0, 1), (0, 2), (0, 3)]
    assert [line["validation_accuracy"] is None for line in lines][:3] == [True, False, False]
    assert lines[-1]["train_loss"] is None  # not a finite number
    assert {"lr", "train_accuracy", "validation_loss", "base_lr", "weight_decay"} <= set(lines[0])


def test_resume_with_other_options_or_nothing_to_resume(toy, tmp_path):
    with pytest.raises(UserError, match="resume needs the folder"):
        search(make_model, toy, recipes(1.0), resume=True)
    with pytest.raises(UserError, match="nothing to resume"):
        search(make_model, toy, recipes(1.0), folder=tmp_path, resume=True)
    search(make_model, toy, recipes(1.0, epochs=1), folder=tmp_path)
    with pytest.raises(UserError, match="other options"):
        search(make_model, toy, recipes(2.0, epochs=1), folder=tmp_path, resume=True)


# ---- files


def test_damaged_checkpoints_are_refused(tmp_path):
    """Cut anywhere, or with any bit flipped, also in the middle of a tensor; or with code in them."""
    path, state = tmp_path / "checkpoint.pt", {"a": torch.ones(200), "b": [1, 2.5, "text", None, True]}
    save_checkpoint(path, state)
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        at = rng.randrange(len(content))
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        for damaged in (content[:at], bytes(flipped)):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"damaged|was written by vapt_fast"):
                load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path)["b"] == state["b"]
    torch.save({"code": os.system}, path)
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "__version__", "0.0.9")
        save_checkpoint(tmp_path / "checkpoint.pt", {"epoch": 3})
    with pytest.raises(UserError, match=r"was written by vapt_fast 0\.0\.9, and this is"):
        load_checkpoint(tmp_path / "checkpoint.pt")


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


class FullDisk:
    """A file that takes some bytes, then finds the disk full."""

    def __init__(self, path, mode):
        self._file = open(path, mode)  # noqa: SIM115, closed below

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, content):
        self._file.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)


def test_a_full_disk_leaves_the_checkpoint_usable(toy, tmp_path, monkeypatch):
    candidates = recipes(1.0, epochs=3)
    whole = search(make_model, toy, candidates)
    with pytest.raises(Stop):
        search(make_model, toy, candidates, folder=tmp_path, progress=stop)
    before = sorted(os.listdir(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", FullDisk, raising=False)
        with pytest.raises(OSError, match="No space left"):
            search(make_model, toy, candidates, folder=tmp_path, resume=True)
    assert sorted(os.listdir(tmp_path)) == before
    assert_same_training(whole.model, search(make_model, toy, candidates, folder=tmp_path, resume=True).model)
