"""What identifies a backbone: its geometry, its frozen weights, and how timm makes it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backbones import patch_size

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = ["backbone_fingerprint", "fingerprint", "geometry", "json_problem", "rebuild_args"]


def backbone_fingerprint(model: AdaptiveViT) -> str:
    """Return the sha256 of everything frozen in ``model``: names, shapes, values of parameters and buffers.

    The head, being trained, is left out. Values are rounded to bfloat16 first, so that a bfloat16 copy of a
    float32 backbone has the same fingerprint (a float16 copy has not: it rounds to other values).
    """
    return fingerprint(model.backbone.state_dict())


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, shapes and values, as ``backbone_fingerprint`` has them."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        value = value.detach().to("cpu", torch.bfloat16 if value.is_floating_point() else value.dtype)
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def geometry(model: AdaptiveViT) -> dict[str, Any]:
    """Return what two backbones must share for an adapter of one to fit the other, in JSON's types."""
    backbone = model.backbone
    return {
        "depth": len(backbone.blocks),
        "dim": backbone.embed_dim,
        "grid": list(model.grid),
        "patch_size": list(patch_size(backbone)),
        "num_prefix_tokens": backbone.num_prefix_tokens,
        "global_pool": backbone.global_pool,
    }


def rebuild_args(model: AdaptiveViT) -> tuple[dict[str, Any], list[str]]:
    """Return timm's arguments to make the backbone again, and the names of those JSON can't express."""
    args = model.backbone_args
    left_out = sorted(name for name, value in args.items() if json_problem(value) is not None)
    return {name: value for name, value in args.items() if name not in left_out}, left_out


def json_problem(value: object) -> str | None:
    """Return why JSON can't express ``value``, None if it can."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    return None
