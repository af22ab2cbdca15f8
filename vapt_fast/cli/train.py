"""``vapt-fast train``."""

from __future__ import annotations

import inspect
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..config import KINDS, PromptConfig
from .console import check_backend, count, failures, out, say, status

if TYPE_CHECKING:
    from ..training.recipe import Recipe
    from ..training.run import RunOptions
    from ..training.trainer import Epoch, Score

__all__ = ["train"]

# What a resumed run may change: it decides where and how fast a run computes, not what.
_FREE = {"output", "resume", "overwrite", "device", "threads", "workers"}

_RECIPE = (
    "epochs",
    "warmup_epochs",
    "batch_size",
    "optimizer",
    "momentum",
    "label_smoothing",
    "clip_grad",
    "amp",
    "seed",
)

_PROMPT_OPTIONS = [option for option in fields(PromptConfig) if not option.name.startswith("kind")]

_KINDS = ", ".join(f"{kind} for {cls.method}" for kind, cls in KINDS.items() if kind != cls.method)

_METHODS = ", ".join([*(cls.method for cls in KINDS.values()), "linear", "full"])

_MOMENT = 1.0  # seconds


def _option(help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


_DATA, _MODEL, _PROMPTS, _TRAINING = "Data", "Model", "Prompts", "Training"


def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the trained model, metrics and checkpoint.")],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the stopped run in --output, with its options. With a larger --epochs, train "
            "the model of a finished run on: the learning rate goes on along the cosine of the new length, "
            "so it rises again.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is in --output.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads on the CPU (default: 1 for the digits backbone, else all cores)."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    data: Annotated[
        str,
        _option(
            "'digits', or a folder with train/, val/ and test/ or with one folder of images a class.", _DATA
        ),
    ] = "digits",
    train_images: Annotated[
        int | None, _option("How many images to train on, spread over the classes (default: all).", _DATA)
    ] = None,
    validation_share: Annotated[
        float, _option("Share split off to choose the learning rate with, if there is no val/.", _DATA)
    ] = 0.2,
    test_share: Annotated[
        float, _option("Share split off for the test, if there is no train/.", _DATA)
    ] = 0.2,
    augment: Annotated[
        Literal["none", "flip", "crop-flip", "random-resized-crop", "rand-augment", "auto-augment"],
        _option(
            "Random changes of training images: mirrored; cropped at a random place; cropped with random "
            "size and shape; this and timm's RandAugment or AutoAugment. All but none mirror half of them.",
            _DATA,
        ),
    ] = "none",
    crop_scale: Annotated[
        float | None,
        _option("Smallest share of the area that a crop of random size has (default: 0.08).", _DATA),
    ] = None,
    color_jitter: Annotated[
        float, _option("Largest relative change of brightness, contrast and saturation, 0 to 1.", _DATA)
    ] = 0.0,
    random_erasing: Annotated[
        float, _option("Probability that a rectangle of a training image becomes noise.", _DATA)
    ] = 0.0,
    image_size: Annotated[
        int | None,
        _option(
            "Side of the images, pixels, a multiple of the patch size (default: the backbone's own).", _DATA
        ),
    ] = None,
    crop_mode: Annotated[
        Literal["center", "squash"] | None,
        _option("Cut the image to a square or squash it (default: as the backbone was trained).", _DATA),
    ] = None,
    crop_pct: Annotated[
        float | None, _option("Side of the crop, as a share (default: as the backbone was trained).", _DATA)
    ] = None,
    cache: Annotated[
        bool, _option("Keep all images decoded in memory; not with augmentation.", _DATA, "--cache")
    ] = False,
    backbone: Annotated[str, _option("timm's name of the backbone.", _MODEL)] = "vit_digits_patch4_32",
    pretrained: Annotated[bool, _option("Start from pre-trained weights.", _MODEL)] = True,
    weights: Annotated[
        Path | None,
        _option(
            "File with the backbone's weights (safetensors or a PyTorch checkpoint), instead of pre-trained "
            "ones. The backbone is then kept in --output.",
            _MODEL,
        ),
    ] = None,
    method: Annotated[
        str,
        _option(
            f"What to train: {_METHODS}. The kinds of PromptConfig are other names: {_KINDS}.",
            _MODEL,
        ),
    ] = "vapt",
    backend: Annotated[
        str | None, _option("auto, reference, torch, triton or cuda; see vapt-fast info.", _MODEL)
    ] = None,
    lr: Annotated[
        list[float] | None,
        _option(
            "A learning rate to try, at a batch size of 256: lr * batch size / 256 is used, with either "
            "optimizer. Give it several times; validation chooses (default: a few that suit the method and "
            "the optimizer).",
            _TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[
        list[float] | None,
        _option(
            "A weight decay to try; may be given several times (default: 1e-4, or 0.01 with adamw).",
            _TRAINING,
        ),
    ] = None,
    optimizer: Annotated[
        Literal["sgd", "adamw"], _option("SGD with momentum, as in the papers, or AdamW.", _TRAINING)
    ] = "sgd",
    epochs: Annotated[int, _option("Passes over the training images.", _TRAINING)] = 100,
    warmup_epochs: Annotated[int, _option("Epochs in which the learning rate rises.", _TRAINING)] = 10,
    batch_size: Annotated[int, _option("Images a step.", _TRAINING)] = 64,
    momentum: Annotated[float, _option("Momentum of SGD; beta 1 of AdamW.", _TRAINING)] = 0.9,
    label_smoothing: Annotated[
        float, _option("Share of the target spread over all classes.", _TRAINING)
    ] = 0.0,
    clip_grad: Annotated[
        float | None, _option("Largest norm of the gradient (default: no limit).", _TRAINING)
    ] = None,
    amp: Annotated[
        Literal["bfloat16", "float16"] | None, _option("Mixed precision (default: float32).", _TRAINING)
    ] = None,
    seed: Annotated[int, _option("Of the split, the initialisation and the training.", _TRAINING)] = 0,
    **prompts: Any,
) -> None:
    """Adapt a backbone to labelled images; the learning rate is chosen on validation images.

    Without options but --output: VAPT on real images of the digits 5 to 9, with the small backbone that comes
    with this package and has only seen 0 to 4.
    """
    from ..training.run import RunOptions, run

    again = f"Go on with: vapt-fast train --resume --output {shlex.quote(str(output))}"
    with failures(again):
        check_backend(backend)
        given = dict(context.params)
        options = _resumed(context, output) if resume else RunOptions(**_run_options(given))
        if not resume:
            _check_free(output, overwrite)
        _set_threads(threads, options.backbone)
        progress = _Progress(options.recipes())
        with progress.bars:
            result = run(
                options,
                output,
                resume=resume,
                device=pick_device(device),
                workers=workers,
                on_check=progress.check,
                on_start=lambda model, splits: _describe(model, splits, options),
                progress=progress,
            )
    _report(result, output)


def _prompt_parameter(option: Field) -> inspect.Parameter:
    """The parameter of the command for an option of PromptConfig."""
    kind = {"bool": bool, "float": float, "int": int}.get(str(option.type), str)
    help, choices, flags = (option.metadata[key] for key in ("help", "choices", "flags"))
    help = f"{help[0].upper()}{help[1:]}."
    names = [f"--{option.name.replace('_', '-')}", *flags] if flags else []
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=option.default if kind is not str else str(option.default),
        annotation=Annotated[Literal[choices] if choices else kind, _option(help, _PROMPTS, *names)],
    )


def _prompt_value(option: Field, given: Any) -> Any:
    """The value of an option of PromptConfig from that of the command: numbers may be text."""
    from ..training.errors import UserError

    if not isinstance(given, str) or option.metadata["choices"]:
        return given
    if given == "none" and "None" in str(option.type):
        return None
    several = "Sequence" in str(option.type)
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 or (several and numbers):
        return numbers if len(numbers) > 1 else numbers[0]
    flag = "--" + option.name.replace("_", "-")
    other = "one for each block, as 10,10,0" if several else "'none'"
    raise UserError(f"{flag} must be an integer or {other}, got {given!r}")


def _with_prompt_options(command: Callable) -> inspect.Signature:
    """The signature of ``command`` with the options of PromptConfig in the place of its ``**prompts``."""
    signature = inspect.signature(command, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    return signature.replace(parameters=[*own, *map(_prompt_parameter, _PROMPT_OPTIONS)])


train.__signature__ = _with_prompt_options(train)  # type: ignore[attr-defined]


def _set_threads(threads: int | None, backbone: str) -> None:
    import torch

    if threads is None and backbone == "vit_digits_patch4_32":
        threads = 1  # so small a model has no work for more, and they wait for each other on a busy machine
    if threads is not None:
        torch.set_num_threads(threads)


def pick_device(name: str) -> str:
    """The device of that name, "auto" being a GPU if there is one.

    Raises:
        UserError: no such device here.
    """
    import torch

    from ..training.errors import UserError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch's ways to have no such device
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name!r} is not usable here; expected auto, cpu, cuda, ...: {reason}"
        ) from error
    return name


def _run_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of RunOptions from those of the command."""
    from ..training.methods import method_name
    from ..training.run import RunOptions

    prompts = {option.name: _prompt_value(option, given[option.name]) for option in _PROMPT_OPTIONS}
    own = {option.name for option in fields(RunOptions)} - {"prompts"}
    options = {name: value for name, value in given.items() if name in own}
    options["data"] = given["data"] if given["data"] == "digits" else str(Path(given["data"]).resolve())
    options["weights"] = None if given["weights"] is None else str(given["weights"].resolve())
    options["prompts"] = prompts
    options["method"] = method_name(given["method"])
    options["base_lrs"] = list(given["lr"]) if given["lr"] else None
    options["weight_decays"] = list(given["weight_decay"]) if given["weight_decay"] else None
    options["recipe"] = {name: given[name] for name in _RECIPE}
    return options


def _resumed(context: typer.Context, output: Path) -> Any:
    """The options of the run in ``output``; options on the command line must agree with them."""
    from ..training.errors import UserError
    from ..training.run import RESULT_NAME, RunOptions

    options = RunOptions.read(output)
    if (output / RESULT_NAME).exists():
        if context.get_parameter_source("epochs").name != "COMMANDLINE":
            raise UserError(
                f"the run in {output} is finished: there is nothing to resume. To train on, give --epochs too"
            )
        options = options.extended(context.params["epochs"], output)
    now, then = _flat(_run_options(dict(context.params))), _flat(asdict(options))
    renamed = {"lr": "base_lrs", "weight_decay": "weight_decays"}
    for name in context.params:
        if name in _FREE or context.get_parameter_source(name).name != "COMMANDLINE":
            continue
        key = renamed.get(name, name)
        if now[key] != then[key]:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} was {then[key]} when the run in {output} started, got {now[key]}; leave it out"
            )
    return options


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, **options["prompts"], **options["recipe"]}


def _check_free(output: Path, overwrite: bool) -> None:
    from ..training.errors import UserError
    from ..training.run import OPTIONS_NAME

    if (output / OPTIONS_NAME).exists() and not overwrite:
        raise UserError(
            f"--output {output} has a run already: give --resume to go on with it, --overwrite to replace "
            "it, or another folder"
        )


def _describe(model: Any, splits: Any, options: RunOptions) -> None:
    from ..adapters import trainable_summary

    test = "none" if splits.test is None else f"{len(splits.test):,}"
    say(
        f"{count(len(splits.class_names), 'class', 'classes')}; {count(len(splits.train), 'image')} to train "
        f"on, {len(splits.validation):,} to choose the learning rate with, {test} to test on",
        status,
    )
    say(trainable_summary(model), status)
    if options.needs_backbone_file:
        size = sum(tensor.nbytes for tensor in model.backbone.state_dict().values()) / 1e6
        say(
            f"the frozen backbone ({size:,.0f} MB) will be kept with what is learned, because no name of "
            "timm's gives its weights",
            status,
        )


class _Progress:
    """Bars for reading the images and for the epochs of all candidates."""

    def __init__(self, recipes: list[Recipe]) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, console=status)
        self._recipes = recipes
        self._tasks: dict[int, Any] = {}
        self._check: Any = None
        self._started = math.inf

    def check(self, done: int, total: int) -> None:
        """Show how many images were read, if that takes more than a moment."""
        self._started = min(self._started, time.monotonic())
        if self._check is None and time.monotonic() > self._started + _MOMENT:
            self._check = self.bars.add_task("reading all images once", total=total)
        if self._check is not None:
            self.bars.update(self._check, completed=done, visible=done < total)

    def __call__(self, candidate: int, epoch: Epoch, score: Score | None) -> None:
        if candidate not in self._tasks:
            self._tasks[candidate] = self.bars.add_task("", total=self._recipes[candidate].epochs)
        validation = "" if score is None else f", validation {score.accuracy:.1%}"
        self.bars.update(
            self._tasks[candidate],
            completed=epoch.epoch,
            description=f"{candidate + 1} of {len(self._recipes)}: loss {epoch.train_loss:.3f}{validation}",
        )


def _report(result: dict[str, Any], output: Path) -> None:
    table = Table("learning rate", "weight decay", "validation", title="Candidates")
    for candidate in result["candidates"]:
        diverged = candidate["diverged"]
        table.add_row(
            f"{candidate['base_lr']:g}",
            f"{candidate['weight_decay']:g}",
            "diverged" if diverged else f"{candidate['validation_accuracy']:.1%}",
        )
    out.print(table)
    chosen = result["recipe"]
    say(f"chosen: learning rate {chosen['base_lr']:g}, weight decay {chosen['weight_decay']:g}")
    if result["test_accuracy"] is not None:
        tested = count(result["num_images"]["test"], "image")
        say(f"test accuracy: {result['test_accuracy']:.1%} of {tested}")
    say(f"wrote {output}")
