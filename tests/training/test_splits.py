"""Splits are disjoint, stratified and reproducible, and images are prepared as was asked for."""

import errno
import os
import random

import numpy as np
import pytest
import torch
from copies import Copies
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from training_cases import noise, rows

from vapt_fast.training import UserError, digit_splits, folder_splits
from vapt_fast.training.images import images_in
from vapt_fast.training.loader import make_loader
from vapt_fast.training.splits import evaluation_data, image_files, stratified_order
from vapt_fast.training.transforms import AUGMENTATIONS, Augmentation, train_transform


def parts_of(splits):
    return splits.train, splits.validation, splits.test


@pytest.fixture(scope="module")
def digits(config):
    return digit_splits(config, seed=0, num_train=20)


def test_digit_splits_are_disjoint_stratified_and_reproducible(config, digits):
    parts = parts_of(digits)
    assert [len(part) for part in parts] == [20, 196, 400]
    assert sum(len(rows(part)) for part in parts) == len(set.union(*map(rows, parts)))
    assert torch.bincount(digits.train.tensors[1]).tolist() == [4] * 5
    again = digit_splits(config, seed=0, num_train=20)
    assert all(torch.equal(a.tensors[0], b.tensors[0]) for a, b in zip(parts, parts_of(again), strict=True))
    more = digit_splits(config, seed=0, num_train=100)
    assert torch.equal(more.train.tensors[0][:20], digits.train.tensors[0])
    assert len(digit_splits(config, seed=0).train) == 300


def test_seed_changes_what_is_learned_from_but_not_the_test(config, digits):
    other = digit_splits(config, seed=1, num_train=20)
    assert torch.equal(other.test.tensors[0], digits.test.tensors[0])
    assert not torch.equal(other.train.tensors[0], digits.train.tensors[0])
    assert not rows(other.test) & (rows(other.train) | rows(other.validation))


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
    assert [len(part) for part in parts_of(splits)] == [12, 4, 4]
    assert len(set.union(*map(rows, parts_of(splits)))) == 20
    assert {splits.test.dataset.targets[index] for index in splits.test.indices} == {0, 1}
    assert folder_splits(image_folder, config, seed=0).train.indices == splits.train.indices
    assert folder_splits(image_folder, config, seed=1).train.indices != splits.train.indices
    files = image_files(*parts_of(splits), None)
    assert sorted(files) == sorted(map(str, image_folder.rglob("*.png")))
    assert [str(image_folder / file) for part in splits.files.values() for file in part] == files
    assert files[0] == splits.train.dataset.samples[splits.train.indices[0]][0]
    assert image_files(TensorDataset(torch.zeros(2)), Subset(TensorDataset(torch.zeros(2)), [0])) == []


@pytest.mark.parametrize(
    "hidden", ["dark/._0.png", "dark/.ipynb_checkpoints/0-checkpoint.png", ".ipynb_checkpoints/0.png"]
)
def test_what_is_hidden_is_no_image_and_no_class(hidden, image_folder, config):
    visible = sorted(image_folder.rglob("*.png"))
    (image_folder / hidden).parent.mkdir(exist_ok=True)
    noise(0, 255, 0).save(image_folder / hidden)
    splits = folder_splits(image_folder, config, seed=0)
    assert splits.class_names == ("dark", "light")
    assert sorted(image_files(*parts_of(splits))) == [str(path) for path in visible]
    assert images_in(image_folder) == visible


@pytest.mark.parametrize(
    "read",
    [
        lambda folder, config, _: folder_splits(folder, config, seed=0),
        evaluation_data,
        lambda folder, *_: images_in(folder),
    ],
)
def test_a_folder_that_can_not_be_read_is_not_passed_over(read, image_folder, config, monkeypatch):
    (image_folder / "dark" / "more").mkdir()
    scandir = os.scandir

    def without_permission(path):
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_permission)
    with pytest.raises(UserError, match="more can't be read: Permission denied"):
        read(image_folder, config, ["dark", "light"])


def test_without_a_share_there_is_no_test(image_folder, config):
    splits = folder_splits(image_folder, config, seed=0, test_share=0.0)
    assert (len(splits.train), len(splits.validation), splits.test) == (16, 4, None)
    with pytest.raises(UserError, match="none is left for validation"):
        folder_splits(image_folder, config, seed=0, validation_share=0.0)


def test_too_little_to_train_on(image_folder, config):
    with pytest.raises(UserError, match=r"1 images are left to train on .* fewer than the 2 classes"):
        folder_splits(image_folder, config, seed=0, validation_share=0.5, test_share=0.45)
    (image_folder / "light").rename(image_folder.parent / "light")
    with pytest.raises(UserError, match=r"folders of two classes at least, got \['dark'\]"):
        folder_splits(image_folder, config, seed=0)


def test_a_folder_that_is_split_already(image_folder, config):
    root = image_folder.parent / "split"
    for index, file in enumerate(sorted(image_folder.rglob("*.png"))):
        part = ("train", "train", "train", "val", "test")[index % 5]
        (root / part / file.parent.name).mkdir(parents=True, exist_ok=True)
        file.rename(root / part / file.parent.name / file.name)
    splits = folder_splits(root, config, seed=0, num_train=4)
    assert [len(part) for part in parts_of(splits)] == [4, 4, 4]
    (root / "test").rename(root / "elsewhere")
    assert folder_splits(root, config, seed=0).test is None
    (root / "elsewhere" / "light").rename(root / "elsewhere" / "bright")
    (root / "elsewhere").rename(root / "test")
    with pytest.raises(UserError, match=r"test has the classes \['bright', 'dark'\].*\['dark', 'light'\]"):
        folder_splits(root, config, seed=0)


@pytest.mark.parametrize("name", ["missing", ""])
def test_folders_without_images(name, tmp_path, config):
    message = {"missing": "data must be 'digits' or a folder", "": "must have one folder of images a class"}
    with pytest.raises(UserError, match=message[name]):
        folder_splits(tmp_path / name, config, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_can_not_be_read_is_named_in_one_line(workers, image_folder, config):
    splits = folder_splits(image_folder, config, seed=0)
    (image_folder / "dark" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError) as raised:
        [list(make_loader(part, 4, workers=workers)) for part in parts_of(splits)]
    assert str(raised.value) == f"{image_folder / 'dark' / '3.png'} is not an image that Pillow can read"


def test_loader_gives_every_image_once(toy):
    for dataset in (toy.train, Subset(toy.train, range(12))):
        batches, again = (list(make_loader(dataset, 5, shuffle_seed=1)) for _ in range(2))
        assert [len(labels) for _, labels in batches] == [5, 5, 2]
        images, same = (torch.cat([images for images, _ in of]) for of in (batches, again))
        assert {image.numpy().tobytes() for image in images} == rows(toy.train)
        assert torch.equal(images, same)


def test_batches_do_not_wait_for_the_device(toy):
    for dataset in (toy.train, Subset(toy.train, range(12))):
        with Copies("meta") as copies:
            batches = list(make_loader(dataset, 5, device="meta"))
        assert all(part.is_meta for batch in batches for part in batch)
        assert (copies.all, copies.waiting) == (6, 0)


# ---- augmentation


def outputs_of(augmentation, config, image, count):
    transform = train_transform(config, augmentation)
    outputs = [transform(image) for _ in range(count)]
    assert {output.shape for output in outputs} == {(3, 32, 32)}
    return outputs


def variety(outputs):
    return len({output.numpy().tobytes() for output in outputs})


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentations_are_random_and_nothing_else_is(kind, crop_mode, config):
    torch.manual_seed(0)
    augmentation, config = Augmentation(kind), config | {"crop_pct": 0.8, "crop_mode": crop_mode}
    different = variety(outputs_of(augmentation, config, noise(), 10))
    assert different == {"none": 1, "flip": 2}.get(kind, different)
    assert (different > 2) == (kind not in ("none", "flip"))
    assert augmentation.random == (kind != "none")


@pytest.mark.parametrize("options", [{"color_jitter": 0.5}, {"random_erasing": 0.9}])
@pytest.mark.parametrize("kind", ["none", "crop-flip", "random-resized-crop"])
def test_colours_and_erasing_go_with_crops(kind, options, config):
    image = Image.new("RGB", (60, 50), (99, 99, 99))  # on which a crop and a flip change nothing
    changed = Augmentation(kind, **options)
    assert variety(outputs_of(Augmentation(kind), config, image, 5)) == 1
    assert variety(outputs_of(changed, config, image, 5)) > 1
    assert changed.random


def test_the_smallest_crop(config):
    left_is_dark = np.zeros((64, 64, 3), np.uint8)
    left_is_dark[:, 32:] = 255
    random.seed(0)  # timm's crops
    large, small = (
        [output.std() for output in outputs_of(augmentation, config, Image.fromarray(left_is_dark), 20)]
        for augmentation in (Augmentation("random-resized-crop", crop_scale=scale) for scale in (0.9, 0.01))
    )
    assert min(large) > 0.5  # both halves are in every crop
    assert min(small) < 0.1


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


def test_what_is_drawn_for_an_image_does_not_depend_on_who_reads_it(config):
    """Several workers and several processes get the images of one, and take nothing from its dropout."""
    splits = digit_splits(config, 0, 20, Augmentation("auto-augment", random_erasing=0.5))
    torch.manual_seed(0)
    expected = rows_in_order(make_loader(splits.train, 6, shuffle_seed=3))
    drawn = torch.rand(1)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(0)))
    assert rows_in_order(make_loader(splits.train, 6, shuffle_seed=3, workers=2)) == expected
    parts = [make_loader(splits.train, 6, shuffle_seed=3, part=(i, 2)) for i in range(2)]
    assert {row for part in parts for row in rows_in_order(part)} == set(expected)
    assert not {*expected} & {*rows_in_order(make_loader(splits.train, 6, shuffle_seed=4))}


def rows_in_order(loader):
    return [image.numpy().tobytes() for images, _ in loader for image in images]


def test_digits_can_be_augmented(config, digits):
    augmented = digit_splits(config, seed=0, num_train=20, augmentation=Augmentation("random-resized-crop"))
    assert len(augmented.train) == 20
    assert not torch.equal(augmented.train[0][0], augmented.train[0][0])
    assert [label for _, label in augmented.train] == digits.train.tensors[1].tolist()
    assert torch.equal(augmented.test.tensors[0], digits.test.tensors[0])


# ---- images to evaluate on


def test_evaluation_matches_classes_by_name(image_folder, config):
    names = ["light", "unseen", "dark"]  # another order than the folders'
    dataset = evaluation_data(image_folder, config, names)
    assert [label for _, label in dataset] == [2] * 10 + [0] * 10
    with pytest.raises(UserError, match=r"images has classes that the model doesn't know: \['dark'\]"):
        evaluation_data(image_folder, config, ["light"])
    with pytest.raises(UserError, match=r"several classes of the model are called \['dark'\]"):
        evaluation_data(image_folder, config, ["light", "dark", "dark"])
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


def test_evaluation_of_the_digits(config, digits):
    names = [str(digit) for digit in reversed(range(10))]
    images, labels = evaluation_data("digits", config, names).tensors
    assert torch.equal(images, digits.test.tensors[0])
    assert torch.equal(labels, 9 - 5 - digits.test.tensors[1])
