"""Saving an adapter, as AdaptiveViT.save_adapter does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import plain
from ..data import full_data_config
from ..modules import is_wrapper
from ..names import create_backbone
from ..source import HEADS, HUB_PREFIX, hub_repository
from .checks import backbone_fingerprint, geometry
from .file import BASE_MODEL_KEY, AdapterError, class_name_problems, write
from .module import find

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = ["save"]


def save(
    model: AdaptiveViT,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    metadata: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    include_backbone: bool = False,
) -> None:
    """Write the prompts and the head of an adapter to ``folder``, which is made if it does not exist.

    An adapter that is there already stays whole until the new one takes its place, in one step.
    Save from one process only.

    Args:
        model: an AdaptiveViT; its tensors are written in their own dtypes.
        folder: where to.
        name: of the adapter; None for the active one.
        metadata: anything that JSON can express, kept with the adapter; None for its ``metadata``.
        class_names: a name for each class, in the order of the logits; None for its ``class_names``.
        data_config: how images were prepared, if not as the backbone's ``pretrained_cfg`` says: any of timm's
            ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``. None for its ``data_config``.
        include_backbone: write the frozen backbone too, so that ``build`` needs nothing else. For weights
            that can't be had by a name of timm's.

    Raises:
        AdapterError: metadata that JSON can't express, class names that are not one a class, a data config
            out of range, trainable parameters that are neither prompts nor head, or a backbone to include
            that timm can't make again; lists every problem.
        OSError: the file system's own refusals.
    """
    if os.fspath(folder).startswith(HUB_PREFIX):
        raise AdapterError("the adapter can't be saved", [f"{folder} is on the Hub: call model.push_adapter"])
    adapter = find(model.adapters, model.active_adapter if name is None else name)
    metadata = plain(adapter.metadata if metadata is None else metadata)
    names: Any = adapter.class_names if class_names is None else class_names
    names = names.tolist() if hasattr(names, "tolist") else names
    data_config = adapter.data_config if data_config is None else data_config
    problems = [
        *_metadata_problems(metadata),
        *class_name_problems(names, adapter.num_classes),
        *_data_problems(model, data_config),
        *_trainable_problems(model),
        *(_rebuild_problems(model) if include_backbone else []),
    ]
    if problems:
        raise AdapterError("the adapter can't be saved", problems)
    args, left_out = _timm_args(model, adapter.num_classes)
    config = {
        BASE_MODEL_KEY: hub_repository(model.backbone_source),
        "backbone": {
            **model.backbone_source,
            "args": args,
            "args_left_out": left_out,
            "num_classes": adapter.num_classes,
            **geometry(model),
            "precision": model.backbone_precision,
            "fingerprint": backbone_fingerprint(model),
        },
        "prompts": asdict(adapter.prompts.config),
        "heads": adapter.head_classes(),
        "class_names": None if names is None else list(map(str, names)),
        "data": full_data_config(model.pretrained_cfg, data_config),
        "metadata": metadata,
    }
    backbone = model.backbone.state_dict() if include_backbone else None
    write(Path(folder), config, adapter.state_dict(keep_vars=True), backbone)


def _metadata_problems(metadata: object) -> Iterator[str]:
    if not isinstance(metadata, dict):
        yield f"metadata must be a dict, got {type(metadata).__name__}"
    elif reason := _json_problem(metadata):
        yield f"metadata must be made of what JSON knows: {reason}"


def _data_problems(model: AdaptiveViT, data_config: Mapping[str, Any]) -> Iterator[str]:
    try:
        full_data_config(model.pretrained_cfg, data_config)
    except (TypeError, ValueError) as error:
        yield str(error)


def _trainable_problems(model: AdaptiveViT) -> Iterator[str]:
    saved = {id(parameter) for parameter in model.adapters.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in saved:
            yield (
                f"{name} is trainable, but adapters hold the prompts and the head only; freeze it, or keep "
                f"the whole model.state_dict()"
            )


def _rebuild_problems(model: AdaptiveViT) -> Iterator[str]:
    """Yield why ``build`` could not make the backbone again and load its file."""
    advice = "save without include_backbone, and pass backbone=... to from_adapter"
    architecture = model.backbone_source["architecture"]
    args, left_out = _timm_args(model, 0)
    if architecture is None:
        yield f"include_backbone needs a backbone that timm.create_model has made; {advice}"
    elif left_out:
        yield f"include_backbone: the backbone's arguments {left_out} can't be kept in a file; {advice}"
    else:
        with torch.device("meta"):
            made = create_backbone(architecture, **args).state_dict()
        own = model.backbone.state_dict()
        changed = [
            name
            for name, value in own.items()
            if name not in made or made[name].shape != value.shape or value.is_quantized or is_wrapper(value)
        ]
        changed += [name for name in made if name not in own and not name.startswith(HEADS)]
        if changed:
            yield (
                f"include_backbone: timm.create_model({architecture!r}, ...) makes a backbone with other "
                f"tensors than this one, which was changed: {changed}; {advice}"
            )


def _timm_args(model: AdaptiveViT, num_classes: int) -> tuple[dict[str, Any], list[str]]:
    """timm's arguments to make the backbone again, and the names of those JSON can't express."""
    args = model.backbone_args | {"num_classes": num_classes}
    left_out = sorted(name for name, value in args.items() if _json_problem(value) is not None)
    return {name: value for name, value in args.items() if name not in left_out}, left_out


def _json_problem(value: object) -> str | None:
    """Why JSON can't express ``value``, None if it can."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    return None
