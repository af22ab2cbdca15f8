"""Names of backbones: what a mistyped one may have meant."""

from __future__ import annotations

import difflib

import timm

from .backbones import timm_modules

__all__ = ["similar_names"]

_OWN = "vit_digits_*"  # vapt_fast.digits


def similar_names(name: str, count: int = 5) -> list[str]:
    """The names of supported backbones that are nearest to ``name``, the nearest first, for messages.

    Args:
        name: what was given, with a tag or without.
        count: the most names to give.

    Returns:
        Names with a tag where one was given and the backbone has pre-trained weights. Of a backbone whose
        name is right and whose tag is not, the tags it has.
    """
    architecture, _, tag = name.removeprefix("vapt_").partition(".")
    known = [*timm.list_models(module=timm_modules()), *timm.list_models(_OWN)]
    near = difflib.get_close_matches(architecture, known, n=count, cutoff=0.6)
    if not tag:
        return near
    if architecture in near:
        return _nearest_tags(architecture, tag, count)
    return [(_nearest_tags(match, tag, 1) or [match])[0] for match in near]


def _nearest_tags(architecture: str, tag: str, count: int) -> list[str]:
    tagged = timm.list_pretrained(architecture)
    return difflib.get_close_matches(f"{architecture}.{tag}", tagged, n=count, cutoff=0.0)
