"""RunOptions: everything that decides what a run computes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from .._version import __version__
from ..backbones.precision import PRECISIONS
from ..config import described, option
from ..data import NORMALIZATIONS
from ..files import write_atomically
from ..names import DEMO_BACKBONE
from ..source import is_local
from .errors import UserError, check_types
from .methods import METHODS, LoraOptions, method_name
from .recipe import Recipe
from .search import METRICS_NAME
from .suites import is_suite_data
from .transforms import AUGMENTATIONS, Augmentation

__all__ = ["DECODER_NAMES", "OPTIONS_NAME", "RESULT_NAME", "TASKS", "RunOptions"]

OPTIONS_NAME = "run.json"
TASKS = ("classification", "segmentation")
DECODER_NAMES = ("linear", "pup", "dpt")
RESULT_NAME = "result.json"


_data, _model = (partial(option, panel=panel) for panel in ("Data", "Model"))


@described
@dataclass(frozen=True)
class RunOptions:
    """The options that decide what a run computes, kept in its folder so that a stopped run can go on."""

    task: str = _data(
        "classification", "name the class of each image, or of each pixel (segmentation)", choices=TASKS
    )
    data: str = _data(
        "digits",
        "'digits', a folder with train/, val/ and test/ or with one folder of images a class, or a "
        "benchmark's data set in root: 'vtab:cifar' and the like of VTAB-1K, 'fgvc:cub' and the like of "
        "FGVC; for segmentation, train/, val/ and test/ have images/ and masks/",
    )
    root: str | None = _data(
        None, "folder with a benchmark's data sets, each a folder with its lists of images", type=Path | None
    )
    other_sizes: bool = _data(
        False,
        "take lists of other sizes than the benchmark's, and note that in the result",
        flags=("--other-sizes",),
    )
    train_images: int | None = _data(
        None, "how many images to train on, spread over the classes (default: all)"
    )
    train_share: float | None = _data(
        None, "share of a benchmark's training images to train on, spread over the classes (default: all)"
    )
    train_on_validation: bool = _data(
        False,
        "train on a benchmark's validation images too, by a learning rate and a weight decay that are chosen "
        "already",
        flags=("--train-on-validation",),
    )
    test: bool = _data(True, "look at the test images at the end")
    validation_share: float = _data(
        0.2, "share split off to choose the learning rate with, if there is no val/"
    )
    test_share: float = _data(0.2, "share split off for the test, if there is no train/")
    augment: str = _data(
        "none",
        "random changes of training images: a horizontal flip; a crop at a random place; a crop of random "
        "size and shape; the last, then torchvision's RandAugment or AutoAugment. All but none flip half of "
        "them",
        choices=AUGMENTATIONS,
    )
    crop_scale: float | None = _data(
        None, "smallest share of the area that a crop of random size has (default: 0.08)"
    )
    color_jitter: float = _data(0.0, "largest relative change of brightness, contrast and saturation, 0 to 1")
    random_erasing: float = _data(0.0, "probability that a rectangle of a training image becomes noise")
    image_size: int | None = _data(
        None, "side of the images, pixels, a multiple of the patch size (default: the backbone's own)"
    )
    crop_mode: str | None = _data(
        None,
        "crop the image to a square or squash it (default: as the backbone was trained)",
        choices=("center", "squash"),
    )
    crop_pct: float | None = _data(
        None, "side of the crop, as a share (default: as the backbone was trained)"
    )
    reduce_zero_label: bool = _data(
        False,
        "0 in masks is no class, and all other numbers are one less, as in ADE20K",
        flags=("--reduce-zero-label",),
    )
    normalize: str = _data(
        "model",
        "mean and standard deviation of images: those that the backbone was trained with; ImageNet's; or "
        "none, which leaves brightness between 0 and 1",
        choices=tuple(NORMALIZATIONS),
    )
    cache: bool = _data(
        False, "keep the images for training and validation decoded in memory; not with augmentation"
    )
    backbone: str = _model(DEMO_BACKBONE, "name in timm, hf-hub:owner/name or local-dir:/folder")
    pretrained: bool = _model(True, "start from pre-trained weights")
    weights: str | None = _model(
        None,
        "file with the backbone's weights (safetensors or a PyTorch checkpoint), instead of pre-trained "
        "ones. The backbone is then kept with what is learned",
        type=Path | None,
    )
    method: str = _model("vapt", "what to train")
    decoder: str = _model(
        "linear",
        "of segmentation, trained with the prompts: one linear map, SETR's progressive upsampling, or DPT's",
        choices=DECODER_NAMES,
    )
    backend: str | None = _model(None, "one of auto, reference, torch, triton and cuda; see vapt-fast info")
    backbone_precision: str | None = _model(
        None,
        "products of the frozen backbone in 8 bits, and in its backward pass too (default: as all else)",
        choices=PRECISIONS,
    )
    shard: bool = _model(
        False,
        "spread the frozen weights of the backbone's blocks over the processes that train together (FSDP2), "
        "if a device is too small for all of them",
        flags=("--shard",),
    )
    lora_rank: int = _model(LoraOptions.rank, "rank of LoRA's matrices")
    lora_alpha: float = _model(LoraOptions.alpha, "LoRA's products are scaled by alpha / rank")
    lora_targets: list[str] = field(
        default_factory=lambda: list(LoraOptions.targets),
        metadata={"help": "the ends of the names of the modules that LoRA adapts"},
    )
    base_lrs: list[float] | None = option(
        None,
        "a learning rate to try, at a batch size of 256: lr * batch size / 256 is used, with either "
        "optimizer. Give it several times; validation chooses (default: a few that suit the method and the "
        "optimizer)",
        panel="Training",
        name="lr",
    )
    weight_decays: list[float] | None = option(
        None,
        "a weight decay to try; may be given several times (default: 1e-4, or 0.01 with adamw)",
        panel="Training",
        name="weight_decay",
    )
    recipe: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "the other numbers of Recipe, by name"}
    )
    prompts: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "options of PromptConfig; the method decides on the kind"},
    )
    extends: dict[str, int] | None = option(
        None,
        "of a run that goes on with the model of a finished one, its epochs and metrics_size",
        panel=None,
    )

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "method", method_name(self.method))
        for name, value, choices in (("task", self.task, TASKS), ("decoder", self.decoder, DECODER_NAMES)):
            if value not in choices:
                raise UserError(f"{name} must be one of {choices}, got {value!r}")
        if self.augmentation.random and self.cache:
            raise UserError(
                "cache keeps every image as it is first read: turn it off (--no-cache), or leave out "
                "augment, color_jitter and random_erasing"
            )
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")
        if min(self.validation_share, self.test_share) < 0 or self.validation_share + self.test_share >= 1:
            raise UserError(
                "validation_share and test_share must be at least 0 and together below 1, got "
                f"{self.validation_share} and {self.test_share}"
            )
        if self.normalize not in NORMALIZATIONS:
            raise UserError(f"normalize must be one of {tuple(NORMALIZATIONS)}, got {self.normalize!r}")
        if self.train_share is not None and not 0 < self.train_share <= 1:
            raise UserError(f"train_share must be in (0, 1], got {self.train_share}")
        if self.train_share is not None and self.train_images is not None:
            raise UserError("train_share and train_images say the same in two ways: give one of them")
        if is_suite_data(self.data) and self.task != "classification":
            raise UserError(f"data {self.data!r} is for classification, got task {self.task!r}")
        if not is_suite_data(self.data):
            for name in ("root", "other_sizes", "train_share", "train_on_validation"):
                if getattr(self, name) not in (None, False):
                    raise UserError(
                        f"{name} is for data sets of a benchmark, as 'vtab:cifar', got data {self.data!r}"
                    )
        if self.shard and self.method == "full":
            raise UserError("shard spreads frozen weights, and method 'full' trains all of them")
        self.lora  # noqa: B018, checks its options
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct must be in (0, 1], got {self.crop_pct}")

    @classmethod
    def read(cls, folder: Path) -> RunOptions:
        """Return the options of the run in ``folder``.

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
        """Whether the frozen backbone is kept with the adapter: elsewhere timm can't make it by its name."""
        frozen = METHODS[self.method].prompts is not None
        return frozen and (self.weights is not None or not self.pretrained or is_local(self.backbone))

    def extended(self, epochs: int, folder: Path) -> RunOptions:
        """Return the options to train the model of the finished run in ``folder`` on, up to ``epochs``.

        The recipe that won is the only one. Its learning rate goes along the cosine of the new length from
        where the old length ended, so it rises again; the optimizer starts without momentum.

        Raises:
            UserError: the run was as long already, its result is damaged, or LoRA is in its weights.
        """
        if METHODS[self.method].lora:
            raise UserError(f"a run of {self.method!r} can't be trained on: its matrices are in the weights")
        path = folder / RESULT_NAME
        try:
            chosen = json.loads(path.read_text(encoding="utf-8"))["recipe"]
            trained, base_lr, weight_decay = (chosen[key] for key in ("epochs", "base_lr", "weight_decay"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if epochs <= trained:
            raise UserError(
                f"the run in {folder} is finished: it was trained for {trained} epochs. To train on, give "
                f"--epochs with a larger number, got {epochs}"
            )
        return replace(
            self,
            base_lrs=[base_lr],
            weight_decays=[weight_decay],
            recipe={**self.recipe, "epochs": epochs},
            extends={"epochs": trained, "metrics_size": (folder / METRICS_NAME).stat().st_size},
        )

    def recipes(self) -> list[Recipe]:
        """Return one recipe for every candidate."""
        try:
            optimizer = Recipe(base_lr=1.0, **self.recipe).optimizer
        except TypeError as error:  # an unknown name
            raise UserError(f"recipe: {error}") from error
        base_lrs = METHODS[self.method].base_lrs[optimizer] if self.base_lrs is None else self.base_lrs
        default_decay = 0.01 if optimizer == "adamw" else 1e-4
        weight_decays = [default_decay] if self.weight_decays is None else self.weight_decays
        recipes = [
            Recipe(base_lr=base_lr, weight_decay=weight_decay, **self.recipe)
            for base_lr, weight_decay in product(base_lrs, weight_decays)
        ]
        if self.train_on_validation and len(recipes) > 1:
            raise UserError(
                f"train_on_validation leaves no images to choose one of {len(recipes)} recipes with: give "
                "one learning rate and one weight decay"
            )
        return recipes

    @property
    def augmentation(self) -> Augmentation:
        """The random changes of training images."""
        return Augmentation(self.augment, self.crop_scale, self.color_jitter, self.random_erasing)

    @property
    def model(self) -> dict[str, Any]:
        """The keywords for ``build_model`` beside method, backbone, classes and prompts."""
        names = ("pretrained", "backend", "backbone_precision", "weights", "lora")
        return {name: getattr(self, name) for name in names} | self.timm_options

    @property
    def lora(self) -> LoraOptions:
        """The options of LoRA."""
        return LoraOptions(self.lora_rank, self.lora_alpha, tuple(self.lora_targets))

    @property
    def timm_options(self) -> dict[str, Any]:
        """The keywords for timm beside the backbone's name."""
        return {} if self.image_size is None else {"img_size": self.image_size}
