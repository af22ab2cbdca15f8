"""Trained models on disk: adapters for frozen backbones, whole models for full fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
from timm.models import get_model_args
from torch import nn

from ..adapters import AdapterError
from ..vit import AdaptiveViT
from .errors import UserError
from .files import write_atomically

__all__ = ["FULL_MODEL_NAME", "load_model", "save_model"]

FULL_MODEL_NAME = "model.safetensors"
_HEADER_KEY = "vapt_fast_model"


def save_model(model: nn.Module, folder: str | Path, metadata: dict[str, Any]) -> None:
    """Write a model as ``load_model`` reads it.

    Args:
        model: an AdaptiveViT, of which only prompts and head are written, or a timm model, written whole.
        folder: where to; an earlier model in it stays whole until this one takes its place.
        metadata: what JSON can express.

    Raises:
        OSError: the file system's own refusals.
    """
    if isinstance(model, AdaptiveViT):
        model.save_adapter(folder, metadata=metadata)
        return
    cfg = model.pretrained_cfg
    tag = cfg.get("tag")
    description = {
        "backbone": f"{cfg['architecture']}.{tag}" if tag else cfg["architecture"],
        "num_classes": model.num_classes,
        "img_size": get_model_args(model).get("img_size"),
        "metadata": metadata,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={_HEADER_KEY: json.dumps(description)})
    write_atomically(Path(folder) / FULL_MODEL_NAME, content)


def load_model(folder: str | Path, backend: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a folder, in eval mode, and its metadata.

    Args:
        folder: what ``save_model`` or ``AdaptiveViT.save_adapter`` wrote.
        backend: as for AdaptiveViT.

    Raises:
        UserError: no model there, or a damaged one.
    """
    folder = Path(folder)
    whole = folder / FULL_MODEL_NAME
    if whole.exists():
        return _load_full(whole)
    try:
        model = AdaptiveViT.from_adapter(folder, backend=backend)
    except AdapterError as error:
        raise UserError(str(error)) from error
    return model.eval(), model.adapter_metadata


def _load_full(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[_HEADER_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        args = {key: description.get(key) for key in ("num_classes", "img_size")}
        model = timm.create_model(description["backbone"], **args)  # which leaves out what is None
        model.load_state_dict(tensors)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or no model of this library: {error}") from error
    return model.eval(), description["metadata"]
