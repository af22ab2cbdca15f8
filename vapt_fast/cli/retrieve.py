"""``vapt-fast retrieve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..data import full_data_config
from ..names import create_backbone, is_backbone
from ..tasks.retrieval.features import embed
from ..training import UserError, load_model
from ..training.run import check_backend
from . import options
from .console import failures, finish, pick_device, print_best
from .predict import image_files, readable_batches

__all__ = ["retrieve"]


def retrieve(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder that vapt-fast train wrote, or timm's name of a model, which is taken as it is."
        ),
    ],
    queries: Annotated[
        list[Path], typer.Argument(help="Image files to find the like of, or folders of them.")
    ],
    gallery: Annotated[Path, typer.Option(help="Folder of the images to search.")],
    as_json: options.AsJson = False,
    top: Annotated[int, typer.Option(min=1, help="How many images to find for each.")] = 5,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    backbone: options.AdapterBackbone = None,
    weights: options.AdapterWeights = None,
    backend: options.Backend = None,
    backbone_precision: options.BackbonePrecision = None,
) -> None:
    """Find the pictures of a folder that are nearest to others, by the features of a model.

    A query that is itself in the folder isn't found. Files that are no images are reported and left out; the
    exit code is then 2.
    """
    with failures():
        check_backend(backend, "--backend")
        if not gallery.is_dir():
            raise UserError(f"--gallery must be a folder of images, got {gallery}")
        files = [image_files(queries), image_files([gallery])]
        device = pick_device(device)
        given = {"backbone": backbone, "weights": weights, "backbone_precision": backbone_precision}
        loaded, config = _load(model, backend, given)
        errors: list[str] = []
        names, features = zip(
            *(_embedded(loaded.to(device), paths, config, batch_size, device, errors) for paths in files),
            strict=True,
        )
        found = _nearest(names, features, top)
    finish(found, as_json, _print_table, errors)


def _load(model: str, backend: str | None, given: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model and how images are prepared for it."""
    if Path(model).exists() or not is_backbone(model):
        loaded, metadata = load_model(model, backend, **given)
        return loaded, metadata["data_config"]
    needless = [name for name, value in {"backend": backend, **given}.items() if value is not None]
    if needless:
        raise UserError(f"{needless[0]} is for adapters, and {model!r} is a model of timm's: leave it out")
    try:
        loaded = create_backbone(model, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the weights of {model!r} can't be loaded: {error}") from error
    return loaded, full_data_config(loaded.pretrained_cfg)  # type: ignore[arg-type]


def _embedded(
    model: nn.Module,
    paths: list[Path],
    config: dict[str, Any],
    batch_size: int,
    device: str,
    errors: list[str],
) -> tuple[list[str], Tensor]:
    """Return the names of the files that are images, and the features of each."""
    names: list[str] = []
    features: list[Tensor] = []
    for batch_names, images in readable_batches(paths, config, batch_size, errors):
        names += batch_names
        features.append(embed(model, [images], device=device)[0])
    if not features:
        raise UserError(f"none of the {len(paths)} files is an image, the first: {errors[0]}")
    return names, torch.cat(features)


def _nearest(
    names: tuple[list[str], list[str]], features: tuple[Tensor, Tensor], top: int
) -> list[dict[str, Any]]:
    """Return for each query the ``top`` files of the gallery with their cosine similarities."""
    (queries, gallery), (of_queries, of_gallery) = names, features
    paths = [Path(name).resolve() for name in gallery]
    found = []
    for name, query in zip(queries, of_queries, strict=True):
        similarity = of_gallery @ query
        order = similarity.argsort(descending=True, stable=True).tolist()
        own = Path(name).resolve()
        chosen = [index for index in order if paths[index] != own][:top]
        nearest = [{"file": gallery[index], "similarity": similarity[index].item()} for index in chosen]
        found.append({"file": name, "nearest": nearest})
    return found


def _print_table(found: list[dict[str, Any]]) -> None:
    rows = (
        (one["file"], [(other["file"], f"{other['similarity']:.3f}") for other in one["nearest"]])
        for one in found
    )
    print_best("nearest", "similarity", rows)
