"""Trained models on disk: adapters for frozen backbones, whole models for full fine-tuning."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from ..adapters import WEIGHTS_NAME, read_config
from ..adapters.file import HEADER_KEY, remove
from ..data import full_data_config
from ..files import write_atomically
from ..model import AdaptiveViT
from ..names import create_backbone
from ..source import backbone_source, rebuild_args
from .errors import UserError
from .lora import has_lora, merged_lora

__all__ = ["FULL_MODEL_NAME", "load_model", "save_model"]

FULL_MODEL_NAME = "model.safetensors"
_HEADER_KEY = "vapt_fast_model"
SEGMENTATION = "segmentation"
"""The key in an adapter's metadata that says that it is of a Segmenter."""


def save_model(
    model: nn.Module, folder: str | Path, metadata: dict[str, Any], *, include_backbone: bool = False
) -> None:
    """Write a model as ``load_model`` reads it.

    Args:
        model: an AdaptiveViT, of which only prompts and head are written, or a timm model, written whole,
            with LoRA merged into its weights.
        folder: where to; an earlier model in it stays whole until this one takes its place.
        metadata: what JSON can express; of it, ``class_names`` and ``data_config`` are kept where
            ``AdaptiveViT.save_adapter`` keeps them.
        include_backbone: write the frozen backbone too; a model that is written whole holds it anyway.

    Raises:
        OSError: the file system's own refusals.
    """
    if isinstance(model, AdaptiveViT):
        known = {name: metadata.get(name) for name in ("class_names", "data_config")}
        own = {name: value for name, value in metadata.items() if name not in known}
        model.save_adapter(folder, metadata=own, include_backbone=include_backbone, **known)
        if _has_key(Path(folder) / FULL_MODEL_NAME, _HEADER_KEY):
            (Path(folder) / FULL_MODEL_NAME).unlink()
        return
    if has_lora(model):
        model = merged_lora(model)
    source = backbone_source(model)
    elsewhere = ":" in source["name"]  # what is there may be gone, and is not needed
    description = {
        "backbone": source["architecture" if elsewhere else "name"],
        "args": rebuild_args(model, num_classes=model.num_classes),
        "metadata": metadata,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={_HEADER_KEY: json.dumps(description)})
    write_atomically(Path(folder) / FULL_MODEL_NAME, content)
    if _has_key(Path(folder) / WEIGHTS_NAME, HEADER_KEY):
        remove(Path(folder))


def load_model(
    folder: str | Path,
    backend: str | None = None,
    *,
    backbone: str | None = None,
    weights: str | Path | None = None,
    backbone_precision: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load the model in a folder, in eval mode, and its metadata.

    Args:
        folder: what ``save_model`` or ``AdaptiveViT.save_adapter`` wrote.
        backend: as for AdaptiveViT.
        backbone, weights: timm's name of an adapter's backbone and a file with its weights, as for
            ``AdaptiveViT.from_adapter``. None for what the adapter says.
        backbone_precision: as for AdaptiveViT, whatever the adapter was trained with.

    Returns:
        The model, and the metadata: ``class_names`` (the classes' numbers, as str, for an adapter that was
        saved without names), ``data_config`` (all of timm's keywords), and what the user stored.

    Raises:
        UserError: no model there, two of them, a damaged one, or one whose backbone can't be made.
    """
    folder = Path(folder)
    whole, adapter = folder / FULL_MODEL_NAME, folder / WEIGHTS_NAME
    if adapter.exists() and _has_key(whole, _HEADER_KEY):
        raise UserError(f"{folder} has two models, {whole.name} and {adapter.name}: move one of them away")
    if whole.exists() and not adapter.exists():
        if any(option is not None for option in (backbone, weights, backbone_precision)):
            raise UserError(
                f"{whole} is a whole model: it needs no backbone and no weights, and has no "
                "backbone_precision, leave them out"
            )
        return _load_full(whole)
    try:
        model = _class_of(folder).from_adapter(
            folder,
            backbone=backbone,
            weights=weights,
            backend=backend,
            backbone_precision=backbone_precision,
        )
    except ValueError as error:  # an AdapterError is one
        raise UserError(str(error)) from error
    names = model.class_names or [str(index) for index in range(model.num_classes)]
    config = full_data_config(model.pretrained_cfg, model.data_config)
    return model, {**model.adapter_metadata, "class_names": list(names), "data_config": config}


def _has_key(path: Path, key: str) -> bool:
    """Return whether a file is of safetensors, with that key in its header."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return key in (file.metadata() or {})
    except (FileNotFoundError, safetensors.SafetensorError):
        return False


def _class_of(folder: Path) -> type[AdaptiveViT]:
    """Return the class of the model that an adapter belongs to."""
    if SEGMENTATION in read_config(folder)["metadata"]:
        # It stands above this layer, and is needed by its own adapters only.
        return import_module("vapt_fast.tasks.segmentation").Segmenter
    return AdaptiveViT


def _load_full(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[_HEADER_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        model = create_backbone(description["backbone"], **description["args"])
        model.load_state_dict(tensors)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or no model of this library: {error}") from error
    return model.eval(), description["metadata"]
