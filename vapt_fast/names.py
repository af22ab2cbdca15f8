"""Names of backbones: what a mistyped one may have meant."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

import timm
from torch import nn

from .backbones import timm_modules

__all__ = ["DEMO_BACKBONE", "create_backbone", "is_backbone", "similar_names"]

DEMO_BACKBONE = "vit_digits_patch4_32"
"""The name of the small backbone that comes with this package, in vapt_fast.demo."""


def is_backbone(name: str) -> bool:
    """Return whether timm knows a model by ``name``, with a tag or without.

    The demo's backbone enters timm's registry here, when it is asked for, and not by ``import vapt_fast``.
    """
    architecture = name.partition(".")[0]
    if architecture == DEMO_BACKBONE:
        import_module("vapt_fast.demo")
    return timm.is_model(architecture)


def create_backbone(name: str, **options: Any) -> nn.Module:
    """Return ``timm.create_model(name, **options)``, where ``name`` may also be the demo's backbone."""
    is_backbone(name)
    return timm.create_model(name, **options)


def similar_names(name: str, count: int = 5) -> list[str]:
    """Return the names of supported backbones nearest to ``name``, the nearest first, for messages.

    Args:
        name: what was given, with a tag or without.
        count: the most names to give.

    Returns:
        Names with a tag where one was given and the backbone has pre-trained weights. Of a backbone whose
        name is right and whose tag is not, the tags it has.
    """
    architecture, _, tag = name.removeprefix("vapt_").partition(".")
    known = [*timm.list_models(module=timm_modules()), DEMO_BACKBONE]
    near = difflib.get_close_matches(architecture, known, n=count, cutoff=0.6)
    if not tag:
        return near
    if architecture in near:
        return _nearest_tags(architecture, tag, count)
    return [(_nearest_tags(match, tag, 1) or [match])[0] for match in near]


def _nearest_tags(architecture: str, tag: str, count: int) -> list[str]:
    tagged = timm.list_pretrained(architecture)
    return difflib.get_close_matches(f"{architecture}.{tag}", tagged, n=count, cutoff=0.0)
