"""The way from a checkpoint of timm's train.py to an adapter."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.layers import to_2tuple
from timm.models import clean_state_dict
from torch import Tensor

from ..model import DEFAULT_ADAPTER, AdaptiveViT
from ..source import LOCAL_ARGS
from .errors import UserError, printable

__all__ = ["read_class_names", "read_timm_checkpoint", "timm_model"]

_HEADS = (f"adapters.{DEFAULT_ADAPTER}.head.weight", "head.weight")


def read_timm_checkpoint(
    path: str | Path, *, use_ema: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """Read a timm checkpoint. Nothing in the file can run code.

    Args:
        path: what timm's CheckpointSaver wrote, or a state dict, also as a .safetensors file.
        use_ema: take the averaged weights.

    Returns:
        The tensors by name, train.py's arguments, and whether there are averaged weights.

    Raises:
        UserError: no such file, no checkpoint, or one without averaged weights.
    """
    shown = printable(path)
    try:
        if Path(path).suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{shown} does not exist") from error
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, OSError) as error:
        raise UserError(f"{shown} is damaged or no checkpoint of tensors, numbers and texts") from error
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{shown} is damaged or no safetensors file: {error}; timm's avg_checkpoints.py and "
            "clean_checkpoint.py write one with --safetensors only, and else what should end in .pth"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{shown} must hold a dict, as timm's checkpoints do, got {type(content).__name__}")
    key, averaged = "state_dict_ema" if use_ema else "state_dict", "state_dict_ema" in content
    if use_ema and not averaged:
        raise UserError(f"{shown} has no averaged weights (state_dict_ema): leave out --use-ema")
    found: Any = content.get(key, content)
    state = clean_state_dict(found)
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{shown} has no state dict; expected tensors by name, under {key!r} or on their own")
    args = content.get("args")
    return state, vars(args) if isinstance(args, argparse.Namespace) else {}, averaged


def timm_model(
    state: dict[str, Tensor],
    args: dict[str, Any],
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[AdaptiveViT, dict[str, Any]]:
    """Make the model of a timm checkpoint in eval mode, and tell how its images are prepared.

    Args:
        state, args: of ``read_timm_checkpoint``.
        model: a ``vapt_*`` name; None for that in ``args``.
        num_classes: None for that in ``args``, else the size of the head.
        image_size: in pixels; None for that in ``args``, else the backbone's.
        options: of the prompts and the backbone; they come before those in ``args``.

    Returns:
        The model, and ``data_config`` as ``eval_transform`` takes it.

    Raises:
        UserError: no name of a model with prompts, or tensors that don't fit it; the message says which.
    """
    name = args.get("model") if model is None else model
    if not isinstance(name, str):
        raise UserError("the checkpoint doesn't tell its model: give --model vapt_NAME")
    if not name.startswith("vapt_") or not timm.is_model(name.partition(".")[0]):
        raise UserError(f"model must be one of timm's names with vapt_ before it, got {name!r}")
    chosen = {**_timm_arguments(args), **(options or {})}
    if num_classes is not None:
        chosen["num_classes"] = num_classes
    if image_size is not None:
        chosen["img_size"] = image_size
    if "num_classes" not in chosen:
        heads = [state[head] for head in _HEADS if head in state]
        if not heads:
            raise UserError("the checkpoint doesn't tell how many classes it has: give --num-classes")
        chosen["num_classes"] = len(heads[0])
    try:
        built = cast(AdaptiveViT, timm.create_model(name, **chosen))
        built.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint doesn't fit {name!r} with {chosen}: {reason[:500]}") from error
    known = dict(args)
    if "img_size" in chosen:
        known["input_size"] = (chosen.get("in_chans", 3), *to_2tuple(chosen["img_size"]))
    return built.eval(), resolve_data_config(known, pretrained_cfg=built.pretrained_cfg)


def _timm_arguments(args: dict[str, Any]) -> dict[str, Any]:
    """Return train.py's arguments for ``timm.create_model`` that decide what the model is; no paths."""
    size = args.get("input_size")
    found = {
        "num_classes": args.get("num_classes"),
        "global_pool": args.get("gp"),
        "in_chans": args.get("in_chans") if size is None else size[0],
        "img_size": args.get("img_size") if size is None else tuple(size[-2:]),
        **(args.get("model_kwargs") or {}),
    }
    return {key: value for key, value in found.items() if value is not None and key not in LOCAL_ARGS}


def read_class_names(path: str | Path, num_classes: int) -> Sequence[str]:
    """Read names from a text file with one a line, or those of the folders in a folder, in timm's order.

    Raises:
        UserError: no such file or folder, or another number of names.
    """
    path = Path(path)
    if path.is_dir():
        names = list(find_images_and_targets(str(path))[1])
    elif path.is_file():
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        raise UserError(f"{printable(path)} does not exist; expected a text file or a folder of folders")
    if len(names) != num_classes:
        raise UserError(
            f"{printable(path)} must have the names of {num_classes} classes, those of the model; it has "
            f"{len(names)}"
        )
    return names
