"""Making the frozen backbone: by its name in timm, or from a timm model that the user has."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models import model_entrypoint
from torch import nn

from .arguments import integer, size_pair
from .backbones import TimmViT, adopt, check_supported, copy_heads, take_heads, timm_modules
from .config import explain_unexpected
from .names import create_backbone, is_backbone, similar_names
from .source import PREFIX
from .timm_api import TimmModel

__all__ = ["make_backbone", "make_heads", "reset_head"]


def make_backbone(
    backbone: str | nn.Module, pretrained: bool, options: dict[str, Any]
) -> tuple[TimmViT, dict[str, nn.Module] | None]:
    """Make the backbone as an AdaptiveViT holds it: frozen, with its head.

    Args:
        backbone: a name that timm.create_model takes, or a timm model, which stays as it is.
        pretrained: load pre-trained weights; only with a name.
        options: keywords for timm.create_model; with a timm model, only num_classes and global_pool.

    Returns:
        The backbone, and copies of the classifiers that it came with, by name; None if timm has drawn them at
        random.

    Raises:
        TypeError, ValueError, NotImplementedError: as AdaptiveViT.
    """
    if isinstance(backbone, str):
        model = adopt(_create(backbone, pretrained, options), shared=False)
        trained: object = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
        loaded = bool(options.get("checkpoint_path")) or (pretrained and model.num_classes == trained)
        return model, copy_heads(model) if loaded else None
    if isinstance(backbone, TimmModel):
        raise TypeError("backbone must be a timm model without prompts, got an AdaptiveViT")
    check_supported(backbone)
    if pretrained:
        raise ValueError("pretrained=True needs the name of a backbone; a timm model keeps its own weights")
    unknown = sorted(options.keys() - {"num_classes", "global_pool"})
    if unknown:
        raise TypeError(
            f"options {unknown} need the name of a backbone; a timm model is taken as it is, with "
            "num_classes, global_pool and the options of PromptConfig only"
        )
    model = adopt(backbone, shared=True)
    heads = copy_heads(model)
    if options:
        reset_head(model, options.get("num_classes", model.num_classes), options.get("global_pool"))
    return model, heads


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if name.startswith(PREFIX):
        raise ValueError(
            f"backbone must be the name of a timm model without prompts, got {name!r}; "
            f"use {name.removeprefix(PREFIX)!r} here, or timm.create_model({name!r})"
        )
    if options.get("features_only"):
        raise ValueError(
            f"features_only=True is for timm.create_model({PREFIX + name!r}, features_only=True); of an "
            "AdaptiveViT, use forward_intermediates()"
        )
    if is_backbone(name):
        _check_class(name.partition(".")[0])
    elif ":" not in name:
        raise ValueError(f"backbone {name!r} is no timm model; similar names: {similar_names(name)}")
    if options.get("num_classes") is not None:
        options = options | {"num_classes": integer("num_classes", options["num_classes"], minimum=0)}
    if options.get("img_size") is not None:
        options = options | {"img_size": size_pair("img_size", options["img_size"])}
    try:
        model = create_backbone(name, pretrained=pretrained, **options)
    except TypeError as error:
        explained = explain_unexpected(error, options, name)
        if explained is None:
            raise
        raise explained from error
    if isinstance(model, TimmModel):
        raise ValueError(
            f"backbone {name!r} is a model with prompts already; make it by "
            f"timm.create_model({name!r}, {pretrained=})"
        )
    check_supported(model)
    return model


def _check_class(architecture: str) -> None:
    """Raise NotImplementedError for models of timm's that are no ViT, before their weights are downloaded."""
    package, _, module = model_entrypoint(architecture).__module__.rpartition(".")
    if package == "timm.models" and module not in timm_modules():
        with torch.device("meta"):
            check_supported(create_backbone(architecture))


def make_heads(model: TimmViT, num_classes: int) -> dict[str, nn.Module]:
    """Return new classifiers by name, as timm makes them for ``model``, which others may use meanwhile."""
    twin = copy.copy(model)
    vars(twin)["_modules"] = dict(model._modules)
    reset_head(twin, num_classes, None)
    return take_heads(twin)


def reset_head(model: TimmViT, num_classes: object, global_pool: str | None) -> int:
    """Give ``model`` another head and, if given, another pooling; return the number of classes as an int.

    Raises:
        TypeError, ValueError: not a number of classes, or a pooling that the model can't do.
    """
    number = integer("num_classes", num_classes, minimum=0)
    before = model.num_classes
    try:
        model.reset_classifier(number, global_pool)
    except AssertionError as error:
        model.num_classes = before  # which timm has changed by then
        raise ValueError(
            f"global_pool={global_pool!r} does not suit {type(model).__name__}: {error}"
        ) from error
    return number
