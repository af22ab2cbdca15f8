"""One run in one folder: options in, a trained model, its metrics and its result out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..backbones import find_family, patch_size
from ..config import PromptConfig
from ..data import NORMALIZATIONS, full_data_config
from ..files import write_atomically
from ..names import create_backbone
from ..ops import backend as backends
from . import parallel
from .errors import UserError
from .inputs import check_inputs, describe_inputs, write_inputs
from .loader import in_memory
from .methods import check_backbone, trained_state
from .options import RESULT_NAME, RunOptions
from .saved import load_model, save_model
from .search import CHECKPOINT_NAME, Found, Progress, Start, search
from .splits import Splits
from .suites import find_data_set, is_suite_data
from .task import find_task
from .trainer import autocast, load_trained_state, seed_everything

__all__ = ["check_backend", "check_options", "run"]


def run(
    options: RunOptions,
    folder: Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    workers: int = 0,
    validate_every: int = 1,
    check: bool = True,
    save: bool = True,
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
        device, workers, validate_every, progress: as for ``search``.
        check, on_check: read all images once before training starts; told how many were read, of how many.
        save: write the trained model.
        on_start: told the untrained model and the images before training starts.

    Returns:
        The result, as in ``result.json``: what was chosen, scores, candidates, numbers of images and
        parameters, seconds and memory.

    Raises:
        UserError: options that can't be carried out.
        DivergedError: training diverged with every candidate.
        BackendUnavailableError: the backend can't run here.
        OSError: the disk is full, or the like.
    """
    check_backend(options.backend)
    recipes, prompts, config = options.recipes(), _prompts(options), _data_config(options)
    _check_image_size(options)
    _check_processes(options)
    task = find_task(options.task)
    splits = _splits(options, task.splits(options, config, recipes[0].seed))
    make_model = partial(task.make_model, options, len(splits.class_names), prompts)
    # One model is made early: what is wrong with the options shows before anything is written.
    seed_everything(recipes[0].seed)
    with _user_errors(options):
        first = make_model()
    inputs = describe_inputs(splits, config, first)
    if resume:
        check_inputs(folder, inputs)
    if check:
        task.check_data(splits, workers, on_check)
    start = _start(options, folder)
    _try_first_image(first, splits, options, device)
    if options.cache:
        splits = _cached(splits)
    if on_start is not None:
        on_start(first, splits)
    del first
    begins = not resume or (start is not None and (folder / RESULT_NAME).exists())
    resume = not begins and (folder / CHECKPOINT_NAME).exists()
    parallel.wait()  # until all processes have read what is in the folder
    if begins and parallel.rank() == 0:
        _begin(options, folder, inputs)
    _reset_peak_memory(device)
    places: dict[str, Any] = {"device": device, "workers": workers, "folder": folder, "start": start}
    going: dict[str, Any] = {"validate_every": validate_every, "resume": resume, "progress": progress}
    place = partial(parallel.place, device=device, shard=options.shard)
    found = search(lambda: place(make_model()), splits, recipes, **places, **going, evaluate=task.evaluate)
    result = _result(options, splits, found, inputs, device)
    if parallel.rank() == 0:
        if save:
            metadata = {**result, **task.metadata(options), "class_names": list(splits.class_names)}
            _save(found, make_model, folder, metadata, options)
        write_atomically(folder / RESULT_NAME, json.dumps(result, indent=2).encode())
        (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    return result


def check_options(options: RunOptions) -> None:
    """Check what shows without images, weights and devices: whether such a model can be made.

    Raises:
        UserError: it can't.
    """
    prompts = _prompts(options)
    _data_config(options)
    _check_image_size(options)
    without_weights = replace(options, pretrained=False, weights=None)
    with _user_errors(options), torch.device("meta"):
        find_task(options.task).make_model(without_weights, 2, prompts)


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


def _save(
    found: Found,
    make_model: Callable[[], nn.Module],
    folder: Path,
    metadata: dict[str, Any],
    options: RunOptions,
) -> None:
    model = found.model
    if options.shard:  # it is made again, whole, on the CPU
        seed_everything(found.recipe.seed)
        model = make_model().eval()
        load_trained_state(model, trained_state(found.model))
    save_model(model, folder, metadata, include_backbone=options.needs_backbone_file)


def _begin(options: RunOptions, folder: Path, inputs: dict[str, Any]) -> None:
    """Write what a run can go on from, whatever happens from now on; remove what an earlier run left."""
    options.write(folder)
    for name in (CHECKPOINT_NAME, RESULT_NAME):
        (folder / name).unlink(missing_ok=True)
    write_inputs(folder, inputs)


def _result(
    options: RunOptions,
    splits: Splits,
    found: Found,
    inputs: dict[str, Any],
    device: torch.device | str,
) -> dict[str, Any]:
    """Return what ``result.json`` holds."""
    head = cast(Any, found.model).get_classifier()
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    result = {
        "method": options.method,
        "backbone": options.backbone,
        "recipe": asdict(found.recipe),
        "data": splits.source or {"name": options.data},
        "normalize": options.normalize,
        **{name: inputs[name] for name in ("library_version", "data_config", "weights", "processes")},
        "validation_accuracy": None if found.validation is None else found.validation.accuracy,
        "test_accuracy": None if found.test is None else found.test.accuracy,
        **_mean_ious(found),
        "candidates": found.candidates,
        "num_images": {name: 0 if part is None else len(part) for name, part in parts.items()},
        "num_parameters": _count(found.model.parameters()),
        "num_trained": _count(p for p in found.model.parameters() if p.requires_grad),
        "num_trained_in_head": _count(p for p in head.parameters() if p.requires_grad),
        "train_seconds": found.seconds,
        "peak_memory": _peak_memory(device),
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


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _prompts(options: RunOptions) -> PromptConfig:
    try:
        return PromptConfig(**options.prompts)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _data_config(options: RunOptions) -> dict[str, Any]:
    pretrained_cfg = check_backbone(options.backbone)
    if options.image_size is not None:
        pretrained_cfg["input_size"] = (3, options.image_size, options.image_size)
    suite = find_data_set(options.data)[0].preparation if is_suite_data(options.data) else {}
    asked = {"crop_mode": options.crop_mode, "crop_pct": options.crop_pct}
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        return full_data_config(pretrained_cfg, {**suite, **NORMALIZATIONS[options.normalize], **given})
    except ValueError as error:  # three colours for a backbone of another number
        raise UserError(f"normalize={options.normalize!r} with {options.backbone!r}: {error}") from error


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


def _check_processes(options: RunOptions) -> None:
    if options.shard and parallel.world_size() == 1:
        raise UserError(
            "shard spreads weights over several processes, and this is the only one: start the command by "
            "torchrun --nproc-per-node N -m vapt_fast, or give a sweep --processes-per-run N"
        )
    if parallel.world_size() > 1 and options.task != "classification":
        # A batch's loss is a mean over its labelled pixels, of which each part has another number.
        raise UserError(f"task {options.task!r} is trained by one process, got {parallel.world_size()}")


def _splits(options: RunOptions, splits: Splits) -> Splits:
    """Return the splits without the test images, if the options leave them out."""
    if options.test:
        return splits
    return replace(splits, test=None, files={name: of for name, of in splits.files.items() if name != "test"})


def _cached(splits: Splits) -> Splits:
    """Keep what is read in every epoch in memory; the test images are read once."""
    validation = None if splits.validation is None else in_memory(splits.validation)
    return replace(splits, train=in_memory(splits.train), validation=validation)


def _reset_peak_memory(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device | str) -> int | None:
    """Return the most bytes that tensors had on a GPU at once, in training and testing; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else None


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
        parallel.place(model, device, options.shard).eval()(image[None].to(device))
