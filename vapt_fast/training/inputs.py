"""The inputs of a run besides its options: a resumed run must find the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from ..adapters import backbone_fingerprint, fingerprint
from ..files import write_atomically
from ..model import AdaptiveViT
from . import parallel
from .errors import UserError
from .splits import Splits

__all__ = ["INPUTS_NAME", "check_inputs", "describe_inputs", "write_inputs"]

INPUTS_NAME = "inputs.json"

_SHOWN = 3  # of the files that differ, how many a message names


def describe_inputs(splits: Splits, config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return what decides a run besides its options, as JSON has it.

    Args:
        splits: the images.
        config: how they are prepared.
        model: an untrained model, made with the run's seed.
    """
    weights = (
        backbone_fingerprint(model) if isinstance(model, AdaptiveViT) else fingerprint(model.state_dict())
    )
    inputs = {
        "library_version": __version__,
        "class_names": splits.class_names,
        "data_config": config,
        "weights": weights,
        "files": splits.files,
        "source": splits.source,
        "processes": parallel.world_size(),
    }
    return json.loads(json.dumps(inputs))


def write_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Keep ``inputs`` in ``folder``."""
    write_atomically(folder / INPUTS_NAME, json.dumps(inputs, indent=1).encode())


def check_inputs(folder: Path, now: dict[str, Any]) -> None:
    """Check that the run in ``folder`` was started with the same inputs.

    Raises:
        UserError: they differ, and how; or the file in ``folder`` is missing or damaged.
    """
    path = folder / INPUTS_NAME
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        problems = list(_differences(then, now))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: there is no run to resume in {folder}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if problems:
        raise UserError(
            f"the run in {folder} can't go on, for what it was started with has changed: "
            f"{'; '.join(problems)}. Restore that, or start again with --overwrite"
        )


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if then["library_version"] != now["library_version"]:
        yield f"the version of vapt_fast was {then['library_version']} and is {now['library_version']}"
    if then["class_names"] != now["class_names"]:
        yield f"the classes were {then['class_names']} and are {now['class_names']}"
    before, after = (set().union(*of["files"].values()) for of in (then, now))
    for word, names in (("missing", before - after), ("new", after - before)):
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN])
            more = "" if len(names) <= _SHOWN else f" and {len(names) - _SHOWN} more"
            yield f"{word} images: {shown}{more}"
    if before == after and then["files"] != now["files"]:
        yield "the images are split in another way"
    if then["processes"] != now["processes"]:
        yield f"it was trained by {then['processes']} processes and is by {now['processes']}"
    if then["source"] != now["source"]:
        yield f"the lists of images were {then['source']} and are {now['source']}"
    if then["data_config"] != now["data_config"]:
        yield f"images were prepared by {then['data_config']} and are by {now['data_config']}"
    if then["weights"] != now["weights"]:
        yield "the weights to start from are others"
