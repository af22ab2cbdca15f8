"""VTAB-1K and FGVC in the layouts that people have: what is read, what is refused, what is recorded."""

import hashlib
import json
import shutil

import pytest
import torch
from command import error_of, succeed
from PIL import Image
from suite_folders import fgvc_folder, vtab_folder
from training_cases import BACKBONE, rows

from vapt_fast.training import RunOptions, UserError, evaluate, load_model, run
from vapt_fast.training.suites import SUITES, open_data_set, suite_splits

QUICK = {"backbone": BACKBONE, "base_lrs": [1.0], "recipe": {"epochs": 1, "batch_size": 6}}


def options(root, data="vtab:svhn", **changes):
    root = None if root is None else str(root)
    return RunOptions(**{"data": data, "root": root, "other_sizes": True, **QUICK, **changes})


@pytest.fixture
def root(tmp_path):
    vtab_folder(tmp_path, "svhn")
    return tmp_path


def test_the_suites_are_complete():
    """Numbers of data sets and sums over the published tables."""
    vtab, fgvc = SUITES["vtab"].data_sets, SUITES["fgvc"].data_sets
    groups = [[task.group for task in vtab.values()].count(group) for group in SUITES["vtab"].groups]
    assert groups == [7, 4, 8]
    assert {sum(task.sizes[:2]) for task in vtab.values()} == {1000}
    assert sum(task.num_classes for task in vtab.values()) == 940
    assert fgvc["cub"].sizes == (5_394, 600, 5_794)
    assert sum(sum(data_set.sizes) for data_set in fgvc.values()) == 11_788 + 48_562 + 8_189 + 20_580 + 16_185


def test_a_task_of_vtab_is_read(root, config):
    opened = open_data_set("vtab:svhn", root, other_sizes=True)
    splits = suite_splits(opened, config, seed=0)
    assert splits.class_names == tuple("0123456789")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [12, 6, 6]
    assert [label for _, label in splits.train] == [0, 1, 2] * 4
    assert splits.train[0][0].shape == (3, 32, 32)
    digest = hashlib.sha256((root / "svhn" / "val200.txt").read_bytes()).hexdigest()
    assert splits.source["sha256"]["val200.txt"] == digest
    assert splits.source["deviations"][0] == "train800.txt has 12 images instead of 800"
    with pytest.raises(UserError, match=r"is not VTAB-1K's svhn: train800.txt has 12 .* instead of 800"):
        open_data_set("vtab:svhn", root)
    assert open_data_set("vtab:svhn", root / "svhn", other_sizes=True).record == opened.record


def test_the_benchmark_itself_has_no_deviations(tmp_path):
    folder = vtab_folder(tmp_path, "kitti", (3, 3, 3), both=False)
    for name, size in (("train800", 800), ("val200", 200), ("test", 711)):
        for index in range(size):
            (folder / "images" / name / f"{index:06d}.jpg").touch()
        lines = (f"images/{name}/{index:06d}.jpg {index % 4}\n" for index in range(size))
        (folder / f"{name}.txt").write_text("".join(lines))
    assert open_data_set("vtab:kitti", tmp_path).record["deviations"] == []


def test_training_on_both_lists_and_on_a_share(root, config):
    opened = open_data_set("vtab:svhn", root, other_sizes=True)
    parts = suite_splits(opened, config, seed=0)
    both = suite_splits(opened, config, seed=0, train_on_validation=True)
    assert rows(both.train) == rows(parts.train) | rows(parts.validation)
    assert (len(both.train), both.validation) == (18, None)
    third = suite_splits(opened, config, seed=0, train_share=1 / 3)
    assert sorted({label for _, label in third.train}) == [0, 1, 2]
    assert len(third.train) == 4
    assert rows(third.validation) == rows(parts.validation)
    assert third.train.paths != suite_splits(opened, config, seed=1, train_share=1 / 3).train.paths
    assert len(suite_splits(opened, config, seed=0, train_share=0.01).train) == 1
    assert len(suite_splits(opened, config, seed=0, num_train=5).train) == 5
    with pytest.raises(UserError, match="has 12 images to train on, got train_images=13"):
        suite_splits(opened, config, seed=0, num_train=13)


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "test.txt").unlink(), "test.txt does not exist; expected train800.txt"),
        (
            lambda folder: (folder / "test.txt").write_text("\n"),
            "test.txt is empty, expected images for test",
        ),
        (edit("train800.txt", "000001.jpg 1", "000001.jpg 10"), "line 2 of .*label from 0 to 9, got '.* 10'"),
        (edit("train800.txt", "000001.jpg 1", "000001.jpg -1"), "line 2 of .*train800.txt"),
        (edit("val200.txt", "000001.jpg 1", "000001.jpg,1"), "line 2 of .*val200.txt"),
        (edit("test.txt", "000003", "000002"), "000002.jpg is listed in .*test.txt twice"),
        (edit("test.txt", "test/000003", "train800/000003"), "in .*test.txt and in .*train800.txt"),
        (edit("train800val200.txt", ".jpg 1", ".jpg 2"), "train800val200.txt has other labels"),
        (edit("val200.txt", "000003", "000099"), r"1 of the 6 images in .*val200.txt do not exist: .*000099"),
        (lambda folder: shutil.rmtree(folder / "images" / "test"), "6 of the 6 images.*and 3 more"),
        (lambda folder: (folder / "test.txt").write_bytes(b"\xff\xfe"), "is no text"),
    ],
)
def test_damaged_lists(root, change, message):
    change(root / "svhn")
    with pytest.raises(UserError, match=message):
        open_data_set("vtab:svhn", root, other_sizes=True)


@pytest.mark.parametrize(("names", "first"), [("class {:03d}", "class 000"), ("", "1")])
def test_a_data_set_of_fgvc_is_read(tmp_path, config, names, first):
    """Classes are names or numbers; their indices are in order, of numbers by size."""
    folder = fgvc_folder(tmp_path, "oxfordflower", names)
    for split in ("train", "test"):  # another order in the file changes nothing
        pairs = list(json.loads((folder / f"{split}.json").read_text()).items())
        (folder / f"{split}.json").write_text(json.dumps(dict(pairs[::-1])))
    opened = open_data_set("fgvc:oxfordflower", tmp_path, other_sizes=True)
    assert opened.class_names[0] == first
    assert len(opened.class_names) == 102
    assert [images.labels for images in opened.lists] == [
        [*range(101, -1, -1)],
        [*range(102)],
        [*range(101, -1, -1)],
    ]
    assert suite_splits(opened, config, seed=0).train[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels.popitem(), r"different classes: \['class 101'\] are in one of them only"),
        (lambda labels: labels.update({"x.png": 5}), "classes, which are all whole numbers or all names"),
        (lambda labels: labels.update({"x.png": "class 101"}), "1 of the 103 images .*x.png"),
    ],
)
def test_splits_of_fgvc_that_do_not_agree(tmp_path, change, message):
    """A class that one file lacks would otherwise shift all later labels of that file."""
    folder = fgvc_folder(tmp_path, "oxfordflower")
    labels = json.loads((folder / "val.json").read_text())
    change(labels)
    (folder / "val.json").write_text(json.dumps(labels))
    with pytest.raises(UserError, match=message):
        open_data_set("fgvc:oxfordflower", tmp_path, other_sizes=True)


def test_other_faults_of_fgvc(tmp_path):
    folder = fgvc_folder(tmp_path, "oxfordflower")
    (folder / "val.json").write_text('{"a.png": 1, "a.png": 2}')
    with pytest.raises(UserError, match=r"val.json is damaged: a path is in it twice"):
        open_data_set("fgvc:oxfordflower", tmp_path)
    shutil.copy(folder / "train.json", folder / "val.json")
    with pytest.raises(UserError, match=r"is listed in .*val.json and in .*train.json"):
        open_data_set("fgvc:oxfordflower", tmp_path)
    folder.rename(tmp_path / "cub")
    (tmp_path / "cub" / "some").rename(tmp_path / "cub" / "images")
    with pytest.raises(UserError, match="has 102 classes, expected 200"):
        open_data_set("fgvc:cub", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "vtab:cifar10"}, "one of VTAB-1K's 19 data sets, got 'vtab:cifar10'; expected vtab:cifar"),
        ({"root": None}, r"needs root \(--root\)"),
        ({"root": "/nowhere"}, "root /nowhere does not exist"),
        ({"train_share": 0.0}, r"train_share must be in \(0, 1\]"),
        ({"train_share": 0.5, "train_images": 5}, "give one of them"),
        (
            {"data": "digits", "root": None, "other_sizes": False, "train_share": 0.1},
            "train_share is for data",
        ),
        ({"train_on_validation": True, "base_lrs": [1.0, 2.0]}, "no images to choose one of 2 recipes"),
        ({"normalize": "mean"}, "normalize must be one of"),
        ({"method": "lora", "lora_rank": 0}, "lora_rank and lora_alpha must be positive, got 0"),
    ],
)
def test_bad_options_write_nothing(root, changes, message):
    with pytest.raises(UserError, match=message):
        run(options(**{"root": root, **changes}), root / "out")
    assert not (root / "out").exists()


@pytest.mark.parametrize("normalize", ["model", "imagenet", "none"])
def test_normalisation_is_recorded_and_kept(root, normalize):
    result = run(options(root, normalize=normalize, test=False), root / "out")
    mean = {"model": 0.5, "imagenet": 0.485, "none": 0.0}[normalize]
    assert result["normalize"] == normalize
    assert result["data_config"]["mean"][0] == mean
    assert (result["data_config"]["crop_mode"], result["data_config"]["crop_pct"]) == ("squash", 1.0)
    assert result["data"]["sha256"].keys() == {"train800.txt", "val200.txt", "test.txt"}
    assert (result["test_accuracy"], result["num_images"]["test"]) == (None, 0)
    assert load_model(root / "out")[1]["data_config"] == result["data_config"]


def test_images_are_squashed_and_scaled_as_recorded(root, config):
    """Without normalisation a white image stays 1, and a whole image is seen, not its middle."""
    wide = torch.zeros(20, 60, 3, dtype=torch.uint8)
    wide[:, :10] = 255
    Image.fromarray(wide.numpy()).save(root / "svhn" / "images" / "train800" / "000000.jpg", quality=100)
    seen = {}
    run(
        options(root, normalize="none"),
        root / "out",
        on_start=lambda model, splits: seen.update(first=splits.train[0][0]),
    )
    assert seen["first"][:, :, 0].mean() > 0.9
    assert seen["first"][:, :, 16:].mean() < 0.1
    assert seen["first"].min() >= 0


def test_the_last_training_uses_all_images_and_no_choice(root):
    chosen = options(root, train_on_validation=True, weight_decays=[0.0])
    result = run(chosen, root / "out")
    assert result["num_images"] == {"train": 18, "validation": 0, "test": 6}
    assert result["validation_accuracy"] is None
    assert result["test_accuracy"] is not None
    model, metadata = load_model(root / "out")
    test = suite_splits(
        open_data_set("vtab:svhn", root, other_sizes=True), metadata["data_config"], seed=0
    ).test
    assert evaluate(model, test).accuracy == result["test_accuracy"]


def test_a_run_goes_on_with_the_same_lists_only(root):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        run(options(root, recipe={"epochs": 2, "batch_size": 6}), root / "out", progress=stop)
    edit("test.txt", ".jpg 1", ".jpg 2")(root / "svhn")
    with pytest.raises(UserError, match="the lists of images were"):
        run(RunOptions.read(root / "out"), root / "out", resume=True)


def test_the_command(root):
    quick = ["--backbone", BACKBONE, "--epochs", 1, "--lr", 1, "--root", root]
    output = succeed("train", "--data", "vtab:svhn", *quick, "--other-sizes", "--output", root / "out").output
    assert "note: this is not the benchmark's data: train800.txt has 12 images instead of 800" in output
    assert RunOptions.read(root / "out").root == str(root)
    error = error_of("train", "--data", "vtab:svnh", *quick, "--output", root / "other")
    assert "expected vtab:svhn" in error
    final = ["--train-on-validation", "--no-test", "--other-sizes", "--weight-decay", 0]
    output = succeed("train", "--data", "vtab:svhn", *quick, *final, "--output", root / "final").output
    assert "none to choose the learning rate with, none to test on" in output
