"""VTAB-1K: 19 tasks with 1,000 training images each (Zhai et al. 2019, arXiv 1910.04867).

The layout is the one that NOAH's script writes and most later work reads: of each task, a folder with the
images and a list for each split, ``train800.txt``, ``val200.txt`` and ``test.txt``, with an image a line, its
path within the folder, a space and its label.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError, printable
from ..listed import ImageList, read_list_file
from .suite import DataSet, Suite

__all__ = ["VTAB"]

_FILES = ("train800.txt", "val200.txt", "test.txt")
_BOTH = "train800val200.txt"
_LAYOUT = f"{', '.join(_FILES)} in the folder of the task, with a path, a space and a label a line"


def _task(group: str, num_classes: int, test: int) -> DataSet:
    return DataSet(group, num_classes, (800, 200, test))


def _read(folder: Path, task: DataSet) -> tuple[tuple[str, ...], tuple[ImageList, ImageList, ImageList]]:
    """Read the lists of a task.

    The images to train on in the end are those of the first two lists. If there is a list of both, its labels
    have to be theirs.
    """
    train, validation, test = (_read_list(folder, name, task.num_classes) for name in _FILES)
    if (folder / _BOTH).exists():
        both = _read_list(folder, _BOTH, task.num_classes)
        if sorted(both.labels) != sorted(train.labels + validation.labels):
            raise UserError(
                f"{printable(both.file)} has other labels than {_FILES[0]} and {_FILES[1]} together: these "
                "lists are of different versions of the data"
            )
    return tuple(str(label) for label in range(task.num_classes)), (train, validation, test)


def _read_list(folder: Path, name: str, num_classes: int) -> ImageList:
    text, digest = read_list_file(folder / name, _LAYOUT)
    paths, labels = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal() or int(label) >= num_classes:
            raise UserError(
                f"line {number} of {printable(folder / name)} must be a path, a space and a label from 0 to "
                f"{num_classes - 1}, got {line.strip()!r}"
            )
        paths.append(str(folder / path))
        labels.append(int(label))
    return ImageList(folder / name, digest, paths, labels)


VTAB = Suite(
    name="vtab",
    title="VTAB-1K",
    data_sets={
        "cifar": _task("natural", 100, 10_000),
        "caltech101": _task("natural", 102, 6_084),
        "dtd": _task("natural", 47, 1_880),
        "oxford_flowers102": _task("natural", 102, 6_149),
        "oxford_iiit_pet": _task("natural", 37, 3_669),
        "svhn": _task("natural", 10, 26_032),
        "sun397": _task("natural", 397, 21_750),
        "patch_camelyon": _task("specialized", 2, 32_768),
        "eurosat": _task("specialized", 10, 5_400),
        "resisc45": _task("specialized", 45, 6_300),
        "diabetic_retinopathy": _task("specialized", 5, 42_670),
        "clevr_count": _task("structured", 8, 15_000),
        "clevr_dist": _task("structured", 6, 15_000),
        "dmlab": _task("structured", 6, 22_735),
        "kitti": _task("structured", 4, 711),
        "dsprites_loc": _task("structured", 16, 73_728),
        "dsprites_ori": _task("structured", 16, 73_728),
        "smallnorb_azi": _task("structured", 18, 12_150),
        "smallnorb_ele": _task("structured", 9, 12_150),
    },
    # The whole image, squashed to the square that the model takes.
    preparation={"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic"},
    read=_read,
)
