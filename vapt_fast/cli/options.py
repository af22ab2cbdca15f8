"""The options of the commands, each declared once: its type, its flag and its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# ---- of several commands

Adapter = Annotated[Path, typer.Argument(help="Folder that vapt-fast train or model.save_adapter() wrote.")]
AdapterBackbone = Annotated[
    str | None,
    typer.Option(help="timm's name of the backbone, as local-dir:/folder (default: the adapter's)."),
]
AdapterWeights = Annotated[
    Path | None, typer.Option(help="File with the backbone's weights, if the adapter's folder has none.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a step.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]

BACKENDS = "auto, reference, torch, triton or cuda; see vapt-fast info."
Backend = Annotated[str | None, typer.Option(help=BACKENDS)]

# ---- of train


def option(help: str, panel: str, *names: str) -> Any:
    """Return a typer.Option that ``--help`` lists in ``panel``."""
    return typer.Option(*names, help=help, rich_help_panel=panel)


_DATA, MODEL, PROMPTS, _TRAINING = "Data", "Model", "Prompts", "Training"

Output = Annotated[Path, typer.Option(help="Folder for the trained model, metrics and checkpoint.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Resume the stopped run in --output, with its options. With a larger --epochs, train the model "
        "of a finished run on: the learning rate follows the cosine of the new length, so it rises again.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in --output.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads on the CPU (default: 1 for the digits backbone, else all cores)."),
]

Data = Annotated[
    str,
    option("'digits', or a folder with train/, val/ and test/ or with one folder of images a class.", _DATA),
]
TrainImages = Annotated[
    int | None, option("How many images to train on, spread over the classes (default: all).", _DATA)
]
ValidationShare = Annotated[
    float, option("Share split off to choose the learning rate with, if there is no val/.", _DATA)
]
TestShare = Annotated[float, option("Share split off for the test, if there is no train/.", _DATA)]
Augment = Annotated[
    Literal["none", "flip", "crop-flip", "random-resized-crop", "rand-augment", "auto-augment"],
    option(
        "Random changes of training images: a horizontal flip; a crop at a random place; a crop of random "
        "size and shape; the last, then torchvision's RandAugment or AutoAugment. All but none flip half of "
        "them.",
        _DATA,
    ),
]
CropScale = Annotated[
    float | None, option("Smallest share of the area that a crop of random size has (default: 0.08).", _DATA)
]
ColorJitter = Annotated[
    float, option("Largest relative change of brightness, contrast and saturation, 0 to 1.", _DATA)
]
RandomErasing = Annotated[
    float, option("Probability that a rectangle of a training image becomes noise.", _DATA)
]
ImageSize = Annotated[
    int | None,
    option("Side of the images, pixels, a multiple of the patch size (default: the backbone's own).", _DATA),
]
CropMode = Annotated[
    Literal["center", "squash"] | None,
    option("Crop the image to a square or squash it (default: as the backbone was trained).", _DATA),
]
CropPct = Annotated[
    float | None, option("Side of the crop, as a share (default: as the backbone was trained).", _DATA)
]
Cache = Annotated[bool, option("Keep all images decoded in memory; not with augmentation.", _DATA, "--cache")]

Backbone = Annotated[str, option("timm's name of the backbone.", MODEL)]
Pretrained = Annotated[bool, option("Start from pre-trained weights.", MODEL)]
Weights = Annotated[
    Path | None,
    option(
        "File with the backbone's weights (safetensors or a PyTorch checkpoint), instead of pre-trained "
        "ones. The backbone is then kept in --output.",
        MODEL,
    ),
]
ModelBackend = Annotated[str | None, option(BACKENDS, MODEL)]

LearningRates = Annotated[
    list[float] | None,
    option(
        "A learning rate to try, at a batch size of 256: lr * batch size / 256 is used, with either "
        "optimizer. Give it several times; validation chooses (default: a few that suit the method and the "
        "optimizer).",
        _TRAINING,
    ),
]
WeightDecays = Annotated[
    list[float] | None,
    option(
        "A weight decay to try; may be given several times (default: 1e-4, or 0.01 with adamw).", _TRAINING
    ),
]
Optimizer = Annotated[
    Literal["sgd", "adamw"], option("SGD with momentum, as in the papers, or AdamW.", _TRAINING)
]
Epochs = Annotated[int, option("Passes over the training images.", _TRAINING)]
WarmupEpochs = Annotated[int, option("Epochs in which the learning rate rises.", _TRAINING)]
TrainBatchSize = Annotated[int, option("Images a step.", _TRAINING)]
Momentum = Annotated[float, option("Momentum of SGD; beta 1 of AdamW.", _TRAINING)]
LabelSmoothing = Annotated[float, option("Share of the target spread over all classes.", _TRAINING)]
ClipGrad = Annotated[float | None, option("Largest norm of the gradient (default: no limit).", _TRAINING)]
Amp = Annotated[
    Literal["bfloat16", "float16"] | None, option("Mixed precision (default: float32).", _TRAINING)
]
Seed = Annotated[int, option("Seed of the split, the initialisation and the training.", _TRAINING)]
