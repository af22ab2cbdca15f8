"""One run in one folder: options in, a trained model, its metrics and its result out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..backbones import find_family, patch_size
from ..config import PromptConfig
from ..data import full_data_config
from ..files import write_atomically
from ..names import create_backbone
from ..ops import backend as backends
from .errors import UserError
from .inputs import check_inputs, describe_inputs, write_inputs
from .loader import in_memory
from .methods import check_backbone, trained_state
from .options import RESULT_NAME, RunOptions
from .saved import load_model, save_model
from .search import CHECKPOINT_NAME, Found, Progress, Start, search
from .splits import Splits
from .task import find_task
from .trainer import autocast, seed_everything

__all__ = ["run"]


def run(
    options: RunOptions,
    folder: Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    workers: int = 0,
    on_check: Callable[[int, int], None] | None = None,
    on_start: Callable[[nn.Module, Splits], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, choose, test and save.

    Writes to ``folder``: the options at the start; every epoch a line of metrics and a checkpoint; at the end
    the model (see ``save_model``) and the result, after which the checkpoint is removed.

    Args:
        options: what to compute; with ``resume`` those that ``RunOptions.read`` gives.
        folder: where to write; a model that is there stays until the new one is whole.
        resume: go on from the checkpoint; a run that was stopped before the first one starts anew. With
            options of ``RunOptions.extended``, start from the finished run's model.
        device, workers: as for Trainer.
        on_check: told how many images were read, of how many: all are, once, before training starts.
        on_start: told the untrained model and the images before training starts.
        progress: told about every epoch.

    Returns:
        The result, as in ``result.json``: what was chosen, scores, candidates, numbers of images.

    Raises:
        UserError: options that can't be carried out.
        BackendUnavailableError: the backend can't run here.
        OSError: the disk is full, or the like.
    """
    check_backend(options.backend)
    recipes, prompts, config = options.recipes(), _prompts(options), _data_config(options)
    _check_image_size(options)
    task = find_task(options.task)
    splits = task.splits(options, config, recipes[0].seed)
    make_model = partial(task.make_model, options, len(splits.class_names), prompts)
    # One model is made early: what is wrong with the options shows before anything is written.
    seed_everything(recipes[0].seed)
    with _user_errors(options):
        first = make_model()
    inputs = describe_inputs(splits, config, first)
    if resume:
        check_inputs(folder, inputs)
    task.check_data(splits, workers, on_check)
    start = _start(options, folder)
    _try_first_image(first, splits, options, device)
    if options.cache:
        splits = _cached(splits)
    if on_start is not None:
        on_start(first, splits)
    del first
    if not resume or (start is not None and (folder / RESULT_NAME).exists()):
        _begin(options, folder, inputs)
    resume = resume and (folder / CHECKPOINT_NAME).exists()
    places: dict[str, Any] = {"device": device, "workers": workers, "folder": folder}
    places["evaluate"] = task.evaluate
    found = search(make_model, splits, recipes, **places, resume=resume, start=start, progress=progress)
    result = _result(options, splits, found)
    known = {"class_names": list(splits.class_names), "data_config": config}
    metadata = {**result, **task.metadata(options), **known}
    save_model(found.model, folder, metadata, include_backbone=options.needs_backbone_file)
    write_atomically(folder / RESULT_NAME, json.dumps(result, indent=2).encode())
    (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    return result


def check_backend(name: str | None, argument: str = "backend") -> None:
    """Check a backend's name, or the environment variable where it is None.

    Args:
        name: of a backend, or None.
        argument: where the name is from, for the message.

    Raises:
        UserError: not the name of a backend.
        BackendUnavailableError: it can't run here.
    """
    try:
        if name is not None:
            backends.check_backend(name, argument)
        backends.resolve(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def _begin(options: RunOptions, folder: Path, inputs: dict[str, Any]) -> None:
    """Write what a run can go on from, whatever happens from now on; remove what an earlier run left."""
    options.write(folder)
    for name in (CHECKPOINT_NAME, RESULT_NAME):
        (folder / name).unlink(missing_ok=True)
    write_inputs(folder, inputs)


def _result(options: RunOptions, splits: Splits, found: Found) -> dict[str, Any]:
    """Return what ``result.json`` holds."""
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    result = {
        "method": options.method,
        "backbone": options.backbone,
        "recipe": asdict(found.recipe),
        "validation_accuracy": found.validation.accuracy,
        "test_accuracy": None if found.test is None else found.test.accuracy,
        **_mean_ious(found),
        "candidates": found.candidates,
        "num_images": {name: 0 if part is None else len(part) for name, part in parts.items()},
    }
    if options.extends is not None:
        result["extended_from_epochs"] = options.extends["epochs"]
    return result


def _mean_ious(found: Found) -> dict[str, float | None]:
    """Return the mean IoUs of segmentation, nothing for other tasks."""
    scores = {"validation": found.validation, "test": found.test}
    known = {
        f"{split}_mean_iou": None if score is None else score.mean_iou for split, score in scores.items()
    }
    return {} if set(known.values()) == {None} else known


def _prompts(options: RunOptions) -> PromptConfig:
    try:
        return PromptConfig(**options.prompts)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _data_config(options: RunOptions) -> dict[str, Any]:
    check_backbone(options.backbone)
    cfg = timm.get_pretrained_cfg(options.backbone)
    pretrained_cfg = {} if cfg is None else cfg.to_dict()
    if options.image_size is not None:
        pretrained_cfg["input_size"] = (3, options.image_size, options.image_size)
    return full_data_config(pretrained_cfg, {"crop_mode": options.crop_mode, "crop_pct": options.crop_pct})


def _check_image_size(options: RunOptions) -> None:
    """Check that the backbone takes images of this size, without allocating it or loading weights."""
    size = options.image_size
    if size is None:
        return
    try:
        with torch.device("meta"):
            model = create_backbone(options.backbone, img_size=size)
    except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"backbone {options.backbone!r} can't be made with image_size={size}: {error}"
        ) from error
    if find_family(model) is not None:
        patch = patch_size(model)
        if any(size % side for side in patch):
            raise UserError(
                f"image_size must be a multiple of the patch size of {options.backbone!r}, "
                f"{patch[0]}x{patch[1]} pixels, got {size}"
            )


def _cached(splits: Splits) -> Splits:
    test = None if splits.test is None else in_memory(splits.test)
    return replace(splits, train=in_memory(splits.train), validation=in_memory(splits.validation), test=test)


@contextmanager
def _user_errors(options: RunOptions) -> Iterator[None]:
    """Turn what may go wrong when a model is made or called into a UserError that names the options."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if options.weights is not None and isinstance(error, FileNotFoundError):
            raise UserError(str(error)) from error
        raise UserError(f"the weights of {options.backbone!r} can't be loaded: {error}") from error
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{options.method} with backbone {options.backbone!r}: {reason}") from error


def _start(options: RunOptions, folder: Path) -> Start | None:
    """Return the finished run's model that a run extends, None for a run from the beginning."""
    if options.extends is None:
        return None
    model, _ = load_model(folder, options.backend)
    return Start(trained_state(model), **options.extends)


@torch.no_grad()
def _try_first_image(
    model: nn.Module, splits: Splits, options: RunOptions, device: torch.device | str
) -> None:
    """Run one image through the model, so that what can't run shows before anything is written."""
    image, _ = splits.train[0]
    with _user_errors(options), autocast(torch.device(device), options.recipe.get("amp")):
        model.to(device).eval()(image[None].to(device))
