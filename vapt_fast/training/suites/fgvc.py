"""FGVC: five data sets of fine-grained classes, with the splits of VPT (Jia et al. 2022, arXiv 2203.12119).

Of each data set, a folder with ``train.json``, ``val.json`` and ``test.json``: one object, from the paths of
the images to their classes, which are numbers or names.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError, printable
from ..listed import ImageList, read_list_file
from .suite import DataSet, Suite

__all__ = ["FGVC"]

_FILES = ("train.json", "val.json", "test.json")
_LAYOUT = f"{', '.join(_FILES)} in the folder of the data set, each one object from paths to classes"


def _read(folder: Path, data_set: DataSet) -> tuple[tuple[str, ...], tuple[ImageList, ImageList, ImageList]]:
    """Read the lists of a data set; a class has the same index in all of them."""
    objects = [_read_object(folder / name) for name in _FILES]
    # The order of the indices: numbers by size, names by their letters.
    classes: list[int | str] = sorted(set(objects[0][0].values()))
    if len(classes) != data_set.num_classes:
        raise UserError(
            f"{printable(folder / _FILES[0])} has {len(classes)} classes, expected {data_set.num_classes}"
        )
    for name, (labels, _) in zip(_FILES[1:], objects[1:], strict=True):
        other = set(labels.values()) ^ set(classes)
        if other:
            some = sorted(map(str, other))[:5]
            raise UserError(
                f"{printable(folder / name)} and {_FILES[0]} have different classes: {some} are in one of "
                "them only"
            )
    index = {name: position for position, name in enumerate(classes)}
    images = folder / data_set.image_folder
    train, validation, test = (
        ImageList(
            folder / name,
            digest,
            [str(images / path) for path in labels],
            [index[label] for label in labels.values()],
        )
        for name, (labels, digest) in zip(_FILES, objects, strict=True)
    )
    return tuple(map(str, classes)), (train, validation, test)


def _read_object(file: Path) -> tuple[dict[str, int | str], str]:
    text, digest = read_list_file(file, _LAYOUT)
    try:
        labels = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise UserError(f"{printable(file)} is damaged: {error}") from error
    kinds = {type(label) for label in labels.values()} if isinstance(labels, dict) else set()
    if kinds not in ({int}, {str}):
        raise UserError(
            f"{printable(file)} must be one object from paths to classes, which are all whole numbers or all "
            "names"
        )
    return labels, digest


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a path is in it twice")
    return found


FGVC = Suite(
    name="fgvc",
    title="FGVC",
    data_sets={
        "cub": DataSet("fine-grained", 200, (5_394, 600, 5_794), "images"),
        "nabirds": DataSet("fine-grained", 555, (21_536, 2_393, 24_633), "images"),
        "oxfordflower": DataSet("fine-grained", 102, (1_020, 1_020, 6_149)),
        "stanforddogs": DataSet("fine-grained", 120, (10_800, 1_200, 8_580), "Images"),
        "stanfordcars": DataSet("fine-grained", 196, (7_329, 815, 8_041)),
    },
    # The short side to 256 pixels, then a square of 224; 448 of 512.
    preparation={"crop_mode": "center", "crop_pct": 0.875},
    read=_read,
)
