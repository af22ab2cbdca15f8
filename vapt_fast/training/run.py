"""One run in one folder: options in, a trained model, its metrics and its result out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .._version import __version__
from ..arguments import plain
from ..backbones import find_family, patch_size
from ..config import PromptConfig
from ..ops.backend import BackendUnavailableError, check_backend, resolve
from .errors import UserError, check_types
from .files import write_atomically
from .images import check_images
from .inputs import check_inputs, describe_inputs, write_inputs
from .loader import in_memory
from .methods import METHODS, build_model, check_backbone, method_name, trained_state
from .recipe import Recipe
from .saved import load_model, save_model
from .search import CHECKPOINT_NAME, METRICS_NAME, Progress, Start, search
from .splits import Splits, digit_splits, folder_splits, image_files
from .trainer import autocast, seed_everything
from .transforms import Augmentation, data_config

__all__ = ["OPTIONS_NAME", "RESULT_NAME", "RunOptions", "run"]

OPTIONS_NAME = "run.json"
RESULT_NAME = "result.json"


@dataclass(frozen=True)
class RunOptions:
    """Everything that decides what a run computes. Kept in its folder, so that a stopped run can go on.

    Attributes:
        data: "digits" or a folder of images; see ``folder_splits``.
        backbone: timm's name.
        method: key of METHODS, or a kind of prompts.
        prompts: options of PromptConfig; the method decides on the kind.
        base_lrs: candidates, at a batch size of 256; None for the method's own.
        weight_decays: candidates; tried with every learning rate. None for 1e-4, or 0.01 with AdamW.
        recipe: the other numbers of Recipe, by name.
        train_images: how many images to train on; None for all.
        validation_share, test_share: of a folder that is not split already.
        augment, crop_scale, color_jitter, random_erasing: of the training images; see Augmentation.
        image_size: side of the images, in pixels, a multiple of the patch size; None for the backbone's.
        crop_mode, crop_pct: of timm's preparation of images; None for the backbone's.
        cache: keep all images of a folder in memory; not with augmentation.
        pretrained: start from pre-trained weights.
        weights: a file with the backbone's weights, in the place of pre-trained ones.
        backend: as for AdaptiveViT.
        extends: of a run that goes on with the model of a finished one: its ``epochs`` and ``metrics_size``.
    """

    data: str = "digits"
    backbone: str = "vit_digits_patch4_32"
    method: str = "vapt"
    prompts: dict[str, Any] = field(default_factory=dict)
    base_lrs: list[float] | None = None
    weight_decays: list[float] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    train_images: int | None = None
    validation_share: float = 0.2
    test_share: float = 0.2
    augment: str = "none"
    crop_scale: float | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    image_size: int | None = None
    crop_mode: str | None = None
    crop_pct: float | None = None
    cache: bool = False
    pretrained: bool = True
    weights: str | None = None
    backend: str | None = None
    extends: dict[str, int] | None = None

    def __post_init__(self) -> None:
        for option in fields(self):  # the dataclass is frozen
            object.__setattr__(self, option.name, plain(getattr(self, option.name)))
        check_types(self)
        object.__setattr__(self, "method", method_name(self.method))
        if self.augmentation.random and self.cache:
            raise UserError(f"cache keeps every image as it is first read: not with {self.augmentation}")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")
        if min(self.validation_share, self.test_share) < 0 or self.validation_share + self.test_share >= 1:
            raise UserError(
                "validation_share and test_share must be at least 0 and together below 1, got "
                f"{self.validation_share} and {self.test_share}"
            )
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct must be in (0, 1], got {self.crop_pct}")

    @classmethod
    def read(cls, folder: Path) -> RunOptions:
        """The options of the run in ``folder``.

        Raises:
            UserError: there is no run, or one that another version of this library started.
        """
        path = folder / OPTIONS_NAME
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
            version = options.pop("library_version", None)
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist: there is no run to resume in {folder}") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        unknown = sorted(set(options) - {option.name for option in fields(cls)})
        if unknown:
            raise UserError(
                f"{path} has the unknown options {unknown}: it was written by vapt_fast {version}, and this "
                f"is {__version__}"
            )
        return cls(**options)

    def write(self, folder: Path) -> None:
        """Keep the options in ``folder``."""
        options = {"library_version": __version__, **asdict(self)}
        write_atomically(folder / OPTIONS_NAME, json.dumps(options, indent=2).encode())

    @property
    def needs_backbone_file(self) -> bool:
        """Whether no name of timm's gives the frozen backbone, so that it has to be kept with the adapter."""
        frozen = METHODS[self.method].prompts is not None
        return frozen and (self.weights is not None or not self.pretrained)

    def extended(self, epochs: int, folder: Path) -> RunOptions:
        """The options to train the model of the finished run in ``folder`` on, up to ``epochs``.

        The recipe that won is the only one. Its learning rate goes along the cosine of the new length from
        where the old length ended, so it rises again; the optimizer starts without momentum.

        Raises:
            UserError: the run was as long already, or its result is damaged.
        """
        path = folder / RESULT_NAME
        try:
            chosen = json.loads(path.read_text(encoding="utf-8"))["recipe"]
            trained = chosen["epochs"]
            rates = {"base_lrs": [chosen["base_lr"]], "weight_decays": [chosen["weight_decay"]]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if epochs <= trained:
            raise UserError(
                f"the run in {folder} is finished: it was trained for {trained} epochs. To train on, give "
                f"--epochs with a larger number, got {epochs}"
            )
        size = (folder / METRICS_NAME).stat().st_size
        extends = {"epochs": trained, "metrics_size": size}
        return replace(self, **rates, recipe={**self.recipe, "epochs": epochs}, extends=extends)

    def recipes(self) -> list[Recipe]:
        """One recipe for every candidate."""
        base_lrs, weight_decays = self.base_lrs, self.weight_decays
        try:
            optimizer = Recipe(base_lr=1.0, **self.recipe).optimizer
        except TypeError as error:  # an unknown name
            raise UserError(f"recipe: {error}") from error
        if base_lrs is None:
            base_lrs = METHODS[self.method].base_lrs[optimizer]
        if weight_decays is None:
            weight_decays = [0.01 if optimizer == "adamw" else 1e-4]
        return [
            Recipe(base_lr=base_lr, weight_decay=weight_decay, **self.recipe)
            for base_lr, weight_decay in product(base_lrs, weight_decays)
        ]

    @property
    def augmentation(self) -> Augmentation:
        """What is changed at random in training images."""
        return Augmentation(self.augment, self.crop_scale, self.color_jitter, self.random_erasing)

    @property
    def timm_options(self) -> dict[str, Any]:
        """What timm is told about the backbone beside its name."""
        return {} if self.image_size is None else {"img_size": self.image_size}


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
        device: where to compute.
        workers: processes that read images.
        on_check: told how many images were read, of how many: all are, once, before training starts.
        on_start: told the untrained model and the images before training starts.
        progress: told about every epoch.

    Returns:
        The result, as in ``result.json``: what was chosen, scores, candidates, numbers of images.

    Raises:
        UserError: options that can't be carried out.
        OSError: the disk is full, or the like.
    """
    _check_backend(options)
    recipes = options.recipes()
    prompts = _prompts(options)

    def make_model(num_classes: int) -> nn.Module:
        return build_model(
            options.method,
            options.backbone,
            num_classes,
            prompts=prompts,
            pretrained=options.pretrained,
            backend=options.backend,
            weights=options.weights,
            **options.timm_options,
        )

    config = _data_config(options)
    _check_image_size(options)
    splits = _splits(options, config, recipes[0].seed)
    num_classes = len(splits.class_names)
    seed_everything(recipes[0].seed)
    first = _first_model(make_model, options, num_classes)
    inputs = describe_inputs(splits, config, first)
    if resume:
        check_inputs(folder, inputs)
    check_images(image_files(splits.train, splits.validation, splits.test), workers, on_check)
    start = _start(options, folder)
    _try_first_image(first, splits, options, device)
    if options.cache:
        splits = _cached(splits)
    if on_start is not None:
        on_start(first, splits)
    del first
    extending = start is not None and (folder / RESULT_NAME).exists()
    if not resume or extending:
        options.write(folder)  # first: whatever happens now, the run can go on
        for name in (CHECKPOINT_NAME, RESULT_NAME):  # of an earlier run
            (folder / name).unlink(missing_ok=True)
        write_inputs(folder, inputs)
    found = search(
        lambda: make_model(num_classes),
        splits,
        recipes,
        device=device,
        workers=workers,
        folder=folder,
        resume=resume and (folder / CHECKPOINT_NAME).exists(),
        start=start,
        progress=progress,
    )
    result = {
        "method": options.method,
        "backbone": options.backbone,
        "recipe": asdict(found.recipe),
        "validation_accuracy": found.validation.accuracy,
        "test_accuracy": None if found.test is None else found.test.accuracy,
        "candidates": found.candidates,
        "num_images": {
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": 0 if splits.test is None else len(splits.test),
        },
    }
    if options.extends is not None:
        result["extended_from_epochs"] = options.extends["epochs"]
    save_model(
        found.model,
        folder,
        {**result, "class_names": list(splits.class_names), "data_config": config},
        include_backbone=options.needs_backbone_file,
    )
    write_atomically(folder / RESULT_NAME, json.dumps(result, indent=2).encode())
    (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    return result


def _prompts(options: RunOptions) -> PromptConfig:
    try:
        return PromptConfig(**options.prompts)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _data_config(options: RunOptions) -> dict[str, Any]:
    check_backbone(options.backbone)
    cfg = timm.get_pretrained_cfg(options.backbone)
    pretrained_cfg = {} if cfg is None else cfg.to_dict()
    size = None if options.image_size is None else (3, options.image_size, options.image_size)
    return data_config(
        pretrained_cfg, input_size=size, crop_mode=options.crop_mode, crop_pct=options.crop_pct
    )


def _check_backend(options: RunOptions) -> None:
    try:
        if options.backend is not None:
            check_backend(options.backend)
        resolve(options.backend)
    except (ValueError, BackendUnavailableError) as error:
        raise UserError(str(error)) from error


def _check_image_size(options: RunOptions) -> None:
    """Raise unless the backbone takes images of this size; without allocating it or loading weights."""
    size = options.image_size
    if size is None:
        return
    try:
        with torch.device("meta"):
            model = timm.create_model(options.backbone, img_size=size)
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


def _splits(options: RunOptions, config: dict[str, Any], seed: int) -> Splits:
    if options.data == "digits":
        return digit_splits(config, seed, options.train_images, options.augmentation)
    return folder_splits(
        options.data,
        config,
        seed,
        num_train=options.train_images,
        validation_share=options.validation_share,
        test_share=options.test_share,
        augmentation=options.augmentation,
    )


def _cached(splits: Splits) -> Splits:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return replace(splits, **{name: in_memory(part) for name, part in parts.items() if part is not None})


def _first_model(make_model: Callable[[int], nn.Module], options: RunOptions, num_classes: int) -> nn.Module:
    """A model, made early so that what is wrong with the options shows before anything is written."""
    try:
        return make_model(num_classes)
    except FileNotFoundError as error:
        if options.weights is not None:
            raise UserError(str(error)) from error
        raise UserError(f"the weights of {options.backbone!r} can't be loaded: {error}") from error
    except OSError as error:
        raise UserError(f"the weights of {options.backbone!r} can't be loaded: {error}") from error
    except UserError:
        raise
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{options.method} with backbone {options.backbone!r}: {reason}") from error


def _start(options: RunOptions, folder: Path) -> Start | None:
    """The finished run's model that a run extends, None for a run from the beginning."""
    if options.extends is None:
        return None
    model, _ = load_model(folder, options.backend)
    return Start(trained_state(model), **options.extends)


@torch.no_grad()
def _try_first_image(
    model: nn.Module, splits: Splits, options: RunOptions, device: torch.device | str
) -> None:
    """One image through the model, so that what can't run shows before anything is written."""
    image, _ = splits.train[0]
    try:
        with autocast(torch.device(device), options.recipe.get("amp")):
            model.to(device).eval()(image[None].to(device))
    except UserError:
        raise
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{options.method} with backbone {options.backbone!r}: {reason}") from error
