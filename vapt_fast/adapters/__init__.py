"""Adapter files: what was learned, without the frozen backbone, in one folder.

``adapter_model.safetensors`` holds the prompts and the head and, in its header, the whole config: where it
comes from, what it fits, and a sha256 of every tensor. ``adapter_config.json`` is the same config for people
and other tools. So the first file alone is complete, and replacing it is the one moment at which a save
counts: interrupted before, the earlier adapter is still there, whatever became of the other files.

A folder may hold the frozen backbone too, in ``backbone-<16 digits>.safetensors``. The digits are the
beginning of the file's sha256, so that a new backbone never takes the place of one that an adapter needs.

This is format 1. Later versions of this library read it.

Tensors of ``adapter_model.safetensors``, by name, in the dtypes that they had in the model:

========================================== =============================================================
``prompts.blocks.{i}.table``               (P, C): the learned prompts of block i
``prompts.blocks.{i}.norm.weight, .bias``  (C): the LayerNorm of the adaptive block i
``prompts.blocks.{i}.kernel``              (1, 1, K, K), or (C, 1, K, K) if depthwise
``prompts.blocks.{i}.token_projection.*``  weight (P, H'W') and bias (P)
``prompts.blocks.{i}.projector.*``         down.weight (r, C), up.weight (C, r) and, if learned, scale (1)
``prompts.projector.*``                    the same, for all blocks
``head.*``, ``head_dist.*``                the classifiers' parameters and buffers, by timm's names
========================================== =============================================================

Those of the backbone's file are named as in its state dict, without ``head.`` and ``head_dist.``.

Keys of the config (others may be added):

- ``format_version`` (1), ``library`` ("vapt_fast"), ``library_version``; ``config_sha256`` of all other keys.
- ``backbone``: ``name`` (what timm.create_model takes: a name with its tag, "hf-hub:..." or "local-dir:...";
  null if timm did not make it), ``architecture`` (timm's, without tag), ``args`` (keywords for
  timm.create_model), ``args_left_out`` (those that JSON can't express), ``weights_path`` (a local file of
  weights that it got; null if none), ``pretrained`` (whether timm was to load weights; null if unknown),
  ``file_sha256`` (of the backbone's file in the folder; null if there is none), ``num_classes``; what it
  must share with a model: ``depth``, ``dim``, ``grid``, ``patch_size``, ``num_prefix_tokens``,
  ``global_pool``; and its ``fingerprint``.
- ``prompts``: the options of PromptConfig, all of them.
- ``class_names``: a name for each class, or null.
- ``data``: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``: how images are
  prepared, as timm says it.
- ``tensors``: by name, ``dtype`` (as safetensors calls it), ``shape`` and ``sha256``.
- ``metadata``: the user's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from .._version import __version__
from ..arguments import plain
from ..backbones import patch_size
from ..backends._dispatch import BackendUnavailableError
from ..config import PromptConfig
from ..data import check_data_config, full_data_config
from ..names import create_backbone
from ..source import LOCAL_ARGS, is_local, load_weights

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "AdapterError",
    "AdapterNotFoundError",
    "backbone_fingerprint",
    "build",
    "load",
    "read_config",
    "save",
    "trainable_summary",
]

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1

# The config's key in the metadata of the safetensors header. The only one: with more, their order would be
# random, and saving the same adapter twice would give different files.
HEADER_KEY = "adapter_config"

# Dropout acts in training only, so a model may take an adapter that was trained with other rates.
TRAINING_OPTIONS = {"projector_dropout", "prompt_dropout", "channel_dropout"}

# The backbone's file, named after its content.
BACKBONE_NAME = "backbone-{}.safetensors"
HEADS = ("head.", "head_dist.")
BACKBONE_PATTERN = re.compile(r"backbone-[0-9a-f]{16}\.safetensors")


class AdapterError(ValueError):
    """An adapter that can't be saved or loaded as asked.

    Attributes:
        problems: every reason, one line each.
    """

    def __init__(self, summary: str, problems: list[str]) -> None:
        super().__init__("\n  - ".join([f"{summary}:", *problems]))
        self.problems = tuple(problems)


class AdapterNotFoundError(AdapterError, FileNotFoundError):
    """A file of the adapter does not exist."""


@dataclass(frozen=True)
class _Adapter:
    """An adapter as read from its folder, in agreement with its own checksums."""

    folder: Path
    config: dict[str, Any]
    prompts: PromptConfig
    tensors: dict[str, Tensor]

    @property
    def has_backbone(self) -> bool:
        """Whether the folder is said to hold the backbone."""
        return self.config["backbone"].get("file_sha256") is not None


# ---- what users call, by way of AdaptiveViT


def save(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    metadata: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    include_backbone: bool = False,
) -> None:
    """Write the prompts and the head of ``model`` to ``folder``, which is made if it does not exist.

    An adapter that is there already stays whole until the new one takes its place, in one step.
    Save from one process only.

    Args:
        model: an AdaptiveViT; its tensors are written in their own dtypes.
        folder: where to.
        metadata: anything that JSON can express, kept with the adapter; None for ``model.adapter_metadata``.
        class_names: a name for each class, in the order of the logits; None for ``model.class_names``.
        data_config: how images were prepared, if not as the backbone's ``pretrained_cfg`` says: any of timm's
            ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``. None for ``model.data_config``.
        include_backbone: write the frozen backbone too, so that ``build`` needs nothing else. For weights
            that can't be had by a name of timm's.

    Raises:
        AdapterError: metadata that JSON can't express, class names that are not one a class, a data config
            out of range, trainable parameters that are neither prompts nor head, or a backbone to include
            that timm can't make again; lists every problem.
        OSError: the file system's own refusals.
    """
    metadata = plain(model.adapter_metadata if metadata is None else metadata)
    class_names = model.class_names if class_names is None else class_names
    class_names = class_names.tolist() if hasattr(class_names, "tolist") else class_names
    data_config = model.data_config if data_config is None else data_config
    problems = [
        *_metadata_problems(metadata),
        *_class_name_problems(class_names, model.num_classes),
        *_data_problems(model, data_config),
        *_trainable_problems(model),
        *(_rebuild_problems(model) if include_backbone else []),
    ]
    if problems:
        raise AdapterError("the adapter can't be saved", problems)
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {name: value.detach().cpu().clone() for name, value in model.adapter_state().items()}
    backbone = safetensors.torch.save(_backbone_state(model)) if include_backbone else None
    config = _describe(model, _tensor_table(safetensors.torch.save(tensors)), backbone) | {
        "class_names": None if class_names is None else list(map(str, class_names)),
        "data": full_data_config(model.pretrained_cfg, data_config),
        "metadata": metadata,
    }
    config = json.loads(json.dumps(config))  # as it will be read: tuples become lists
    config |= {"config_sha256": _config_sha256(config)}
    contents = {} if backbone is None else {_backbone_name(config): backbone}
    contents[CONFIG_NAME] = json.dumps(config, indent=2).encode()
    contents[WEIGHTS_NAME] = safetensors.torch.save(tensors, metadata={HEADER_KEY: json.dumps(config)})
    _write_files(Path(folder), contents)
    _remove_other_backbones(Path(folder), keep=contents)


def load(model: nn.Module, folder: str | os.PathLike, *, check_backbone: bool = True) -> None:
    """Copy the adapter in ``folder`` into ``model``, or change nothing at all.

    The model's tensors keep their dtype and device. ``model.adapter_metadata``, ``class_names`` and
    ``data_config`` become the adapter's.

    Args:
        model: an AdaptiveViT with the same prompt options (dropout rates aside), geometry and head size.
        folder: what ``save`` wrote.
        check_backbone: refuse a model whose frozen weights are not those the adapter was trained on, as told
            by ``backbone_fingerprint``.

    Raises:
        AdapterNotFoundError: a file is missing.
        AdapterError: damaged files, or an adapter for another model; lists every mismatch.
    """
    adapter = _read(Path(folder))
    problems = [
        *_backbone_problems(model, adapter, check_backbone),
        *_prompt_problems(model, adapter),
        *_head_problems(model, adapter),
        *_tensor_problems(model, adapter),
    ]
    _raise_misfit(adapter, problems)
    _copy(model, adapter)


def build(
    cls: Callable[..., nn.Module],
    folder: str | os.PathLike,
    *,
    backbone: nn.Module | str | None = None,
    weights: str | os.PathLike | None = None,
    check_backbone: bool = True,
    backend: str | None = None,
) -> nn.Module:
    """A new model made for the adapter in ``folder``, with the adapter loaded, in eval mode.

    No file of this machine is opened that the adapter names: what it tells may be a stranger's.

    Args:
        cls: AdaptiveViT, or a function with its arguments.
        folder: what ``save`` wrote.
        backbone: the timm model to adapt, which gets a head of the adapter's number of classes; or a name to
            make it by, pretrained, as "local-dir:/folder". None for the backbone in ``folder`` if there is
            one, else the name in the adapter's config. By a name, it gets the arguments in the config.
        weights: a file with the backbone's weights, see vapt_fast.source.load_weights; not with a timm model.
        check_backbone: as for ``load``.
        backend: as for AdaptiveViT.

    Raises:
        AdapterNotFoundError: a file is missing.
        AdapterError: damaged files, a backbone that timm can't make here, or one that does not fit; lists
            every mismatch.
        TypeError, ValueError, NotImplementedError: AdaptiveViT refuses ``backbone`` or ``backend``.
    """
    if weights is not None and isinstance(backbone, nn.Module):
        raise TypeError(
            "weights are for a backbone that is made by its name, but backbone is a model already"
        )
    adapter = _read(Path(folder))
    num_classes = _num_classes(adapter)
    if backbone is None or isinstance(backbone, str):
        model = _build_by_name(cls, adapter, backbone, weights, backend)
    else:
        model = cls(backbone, prompts=adapter.prompts, backend=backend)
    # Before the head is replaced: a backbone that does not fit is handed back as it was.
    _raise_misfit(adapter, _backbone_problems(model, adapter, check_backbone))
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    _raise_misfit(adapter, _tensor_problems(model, adapter))
    if backbone is None and adapter.has_backbone:
        _take_dtypes(model, adapter)
    _copy(model, adapter)
    return model.eval()


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config of the adapter in ``folder``, after the same checks of both files as ``load`` makes.

    Its keys are described at the top of this module.

    Raises:
        AdapterNotFoundError, AdapterError: as for ``load``.
    """
    return _read(Path(folder)).config


def backbone_fingerprint(model: nn.Module) -> str:
    """The sha256 of everything frozen in ``model``: names, shapes and values of parameters and buffers.

    The head, being trained, is left out. Values are rounded to bfloat16 first, so that a bfloat16 copy of a
    float32 backbone has the same fingerprint (a float16 copy has not: it rounds to other values).
    """
    return fingerprint(model.backbone.state_dict())


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """The sha256 of names, shapes and values, as ``backbone_fingerprint`` has them."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        value = value.detach().to("cpu", torch.bfloat16 if value.is_floating_point() else value.dtype)
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def trainable_summary(model: nn.Module) -> str:
    """How much of ``model`` is trained: "trainable: 123,456 of 86,000,000 parameters (0.14%)"."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"trainable: {trainable:,} of {total:,} parameters ({trainable / max(total, 1):.2%})"


# ---- describing a model


def _describe(model: nn.Module, tensor_table: dict[str, Any], backbone: bytes | None) -> dict[str, Any]:
    """The config's keys about the model."""
    args, left_out = _rebuild_args(model)
    return {
        "format_version": FORMAT_VERSION,
        "library": "vapt_fast",
        "library_version": __version__,
        "backbone": {
            **model.backbone_source,
            "args": args,
            "args_left_out": left_out,
            "file_sha256": None if backbone is None else hashlib.sha256(backbone).hexdigest(),
            "num_classes": model.num_classes,
            **_geometry(model),
            "fingerprint": backbone_fingerprint(model),
        },
        "prompts": asdict(model.config),
        "tensors": tensor_table,
    }


def _backbone_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.backbone.state_dict().items()}


def _geometry(model: nn.Module) -> dict[str, Any]:
    """What two backbones must share for an adapter of one to fit the other, in JSON's types."""
    backbone = model.backbone
    return {
        "depth": len(backbone.blocks),
        "dim": backbone.embed_dim,
        "grid": list(model.grid),
        "patch_size": list(patch_size(backbone)),
        "num_prefix_tokens": backbone.num_prefix_tokens,
        "global_pool": backbone.global_pool,
    }


def _rebuild_args(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """The arguments with which timm makes the backbone again, and the names of those JSON can't express."""
    args = model.backbone_args
    left_out = sorted(name for name, value in args.items() if _why_not_json(value) is not None)
    return {name: value for name, value in args.items() if name not in left_out}, left_out


def _why_not_json(value: object) -> str | None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    return None


def _tensor_table(weights: bytes) -> dict[str, dict[str, Any]]:
    """dtype (safetensors' name of it), shape and sha256 of each tensor in the bytes of a safetensors file."""
    return {
        name: {
            "dtype": tensor["dtype"],
            "shape": list(tensor["shape"]),
            "sha256": hashlib.sha256(tensor["data"]).hexdigest(),
        }
        for name, tensor in sorted(safetensors.deserialize(weights), key=lambda entry: entry[0])
    }


def _config_sha256(config: dict[str, Any]) -> str:
    content = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- files


def _write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files beside their places, then move them there in the given order, the one that counts last."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f".{uuid.uuid4().hex}.tmp"
    try:
        for name, content in contents.items():
            with open(folder / (name + suffix), "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            os.replace(folder / (name + suffix), folder / name)
    finally:
        for name in contents:
            (folder / (name + suffix)).unlink(missing_ok=True)


def _backbone_name(config: dict[str, Any]) -> str:
    return BACKBONE_NAME.format(config["backbone"]["file_sha256"][:16])


def _remove_other_backbones(folder: Path, keep: Mapping[str, bytes]) -> None:
    """Remove the backbones of adapters that are no longer there."""
    for path in folder.glob(BACKBONE_NAME.format("*")):
        if BACKBONE_PATTERN.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)


def _read(folder: Path) -> _Adapter:
    """Read and verify an adapter by itself, without regard to any model."""
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    copy, weights = _parse(_read_bytes(config_path), config_path), _read_bytes(weights_path)
    try:
        table = _tensor_table(weights)
    except safetensors.SafetensorError as error:
        raise _unreadable(weights_path, f"not a whole safetensors file: {error}") from error
    config = _header_config(weights, weights_path)
    _check_config(config, weights_path)
    _check_tensors(table, config["tensors"], weights_path)
    config["metadata"] = _check_copy(copy, config, config_path)
    try:
        prompts = PromptConfig.from_dict(config["prompts"])
    except (TypeError, ValueError) as error:
        raise _unreadable(weights_path, f"prompts{_told_version(config)}: {error}") from error
    tensors = safetensors.torch.load(weights)
    return _Adapter(folder, config, prompts, {_current_name(name): value for name, value in tensors.items()})


def _current_name(name: str) -> str:
    """The name of a tensor, also of one that was saved when heads were part of the backbone."""
    return name.removeprefix("backbone.")


def _told_version(config: dict[str, Any]) -> str:
    """For an error that another version of this library may be the reason of."""
    version = config.get("library_version")
    if version == __version__:
        return ""
    return f" (saved by vapt_fast {version}, and this is {__version__}: install that version)"


def _read_backbone(adapter: _Adapter) -> dict[str, Tensor]:
    """The tensors of the backbone in the adapter's folder, of which the config has the sha256."""
    path = adapter.folder / _backbone_name(adapter.config)
    content = _read_bytes(path)
    if hashlib.sha256(content).hexdigest() != adapter.config["backbone"]["file_sha256"]:
        raise _unreadable(path, "it was changed after it was saved: the sha256 differs")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise _unreadable(path, f"not a whole safetensors file: {error}") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        expected = f"an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as save_adapter writes it"
        raise AdapterNotFoundError(f"{path} does not exist", [expected]) from error


def _unreadable(path: Path, *problems: str) -> AdapterError:
    return AdapterError(f"{path} can't be read", list(problems))


def _parse(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise _unreadable(path, f"expected a JSON object, got {type(value).__name__}")
    return value


def _header_config(weights: bytes, path: Path) -> dict[str, Any]:
    """The config in the header of a file that safetensors has found whole."""
    length = int.from_bytes(weights[:8], "little")
    metadata = _parse(weights[8 : 8 + length], path).get("__metadata__")
    if not isinstance(metadata, dict) or HEADER_KEY not in metadata:
        raise _unreadable(path, f"its header has no {HEADER_KEY!r}: not a file that save_adapter wrote")
    return _parse(metadata[HEADER_KEY], path)


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Raise unless the config is of this format, unchanged since it was saved, and has all its sections."""
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise _unreadable(
            path,
            f"format_version is {version!r}, and vapt_fast {__version__} reads {FORMAT_VERSION}; the adapter "
            f"was saved by vapt_fast {config.get('library_version')}: install that version",
        )
    if config.get("config_sha256") != _config_sha256(config):
        raise _unreadable(path, "its config was changed after it was saved: the sha256 differs")
    sections = ("backbone", "prompts", "data", "tensors", "metadata")
    missing = [f"{name!r} is missing" for name in sections if not isinstance(config.get(name), dict)]
    if missing:
        raise _unreadable(path, *missing)
    backbone = config["backbone"]
    digest = backbone.get("file_sha256")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise _unreadable(path, f"backbone file_sha256 is {digest!r}, expected 64 digits or null")
    if type(backbone.get("num_classes")) is not int or backbone["num_classes"] < 0:
        raise _unreadable(path, f"backbone num_classes is {backbone.get('num_classes')!r}")
    problems = list(_class_name_problems(config.get("class_names"), backbone["num_classes"]))
    try:
        check_data_config({"crop_mode": "center", **config["data"]})
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"data: {error}")
    if problems:
        raise _unreadable(path, *problems)


def _check_tensors(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Raise unless the tensors are those of which the config has the sha256."""
    problems = [f"{name}: missing" for name in expected if name not in found]
    for name, value in found.items():
        if value != expected.get(name):
            problems.append(f"{name}: saved {expected.get(name, 'no such tensor')}, now {value}")
    if problems:
        raise _unreadable(path, *problems)


def _check_copy(copy: dict[str, Any], config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Compare adapter_config.json with the config in the header, which is the one that counts.

    One of another save is not an error: an interrupted save leaves that. One of the same save with other
    values is: whoever changed it expects an effect. The metadata may be edited and keys may be added.

    Returns:
        The metadata, from the file unless that belongs to another save.
    """
    if copy.get("config_sha256") != config["config_sha256"]:
        warnings.warn(
            f"{path} was not saved together with {WEIGHTS_NAME} (a save was interrupted, or one of the files "
            f"was exchanged); the config inside {WEIGHTS_NAME} is used",
            stacklevel=5,
        )
        return config["metadata"]
    metadata = copy.get("metadata")
    fixed = {key: value for key, value in config.items() if key != "metadata"}
    changed = list(_differences(fixed, copy))
    if not isinstance(metadata, dict):
        changed.append(f"metadata: expected an object, got {metadata!r}")
    if changed:
        raise AdapterError(f"{path} was changed after it was saved", changed)
    return metadata


def _differences(saved: dict[str, Any], found: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in saved.items():
        if key not in found:
            yield f"{prefix}{key}: saved {value!r}, now missing"
        elif isinstance(value, dict) and isinstance(found[key], dict):
            yield from _differences(value, found[key], f"{prefix}{key}.")
        elif found[key] != value:
            yield f"{prefix}{key}: saved {value!r}, now {found[key]!r}"


# ---- comparing an adapter with a model


def _metadata_problems(metadata: object) -> Iterator[str]:
    if not isinstance(metadata, dict):
        yield f"metadata must be a dict, got {type(metadata).__name__}"
    elif reason := _why_not_json(metadata):
        yield f"metadata must be made of what JSON knows: {reason}"


def _class_name_problems(class_names: object, num_classes: int) -> Iterator[str]:
    if class_names is None:
        return
    if isinstance(class_names, str) or not isinstance(class_names, Sequence):
        yield f"class_names must be a list of str, got {class_names!r}"
        return
    if len(class_names) != num_classes:
        yield f"class_names must be {num_classes}, one a class, got {len(class_names)}: {class_names!r}"
    wrong = [name for name in class_names if not isinstance(name, str)]
    if wrong:
        yield f"class_names must be str, got {wrong!r}"


def _data_problems(model: nn.Module, data_config: Any) -> Iterator[str]:
    try:
        full_data_config(model.pretrained_cfg, data_config)
    except (TypeError, ValueError) as error:
        yield str(error)


def _trainable_problems(model: nn.Module) -> Iterator[str]:
    saved = {id(parameter) for _, parameter in model.named_adapter_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in saved:
            yield (
                f"{name} is trainable, but adapters hold the prompts and the head only; freeze it, or keep "
                f"the whole model.state_dict()"
            )


def _rebuild_problems(model: nn.Module) -> Iterator[str]:
    """Why ``build`` could not make the backbone again and load its file."""
    advice = "save without include_backbone, and pass backbone=... to from_adapter"
    architecture = model.backbone_source["architecture"]
    args, left_out = _rebuild_args(model)
    if architecture is None:
        yield f"include_backbone needs a backbone that timm.create_model has made; {advice}"
    elif left_out:
        yield f"include_backbone: the backbone's arguments {left_out} can't be kept in a file; {advice}"
    else:
        with torch.device("meta"):
            made = timm.create_model(architecture, **args).state_dict()
        own = model.backbone.state_dict()
        changed = [
            name
            for name, value in own.items()
            if name not in made or made[name].shape != value.shape or value.is_quantized
        ]
        changed += [name for name in made if name not in own and not name.startswith(HEADS)]
        if changed:
            yield (
                f"include_backbone: timm.create_model({architecture!r}, ...) makes a backbone with other "
                f"tensors than this one, which was changed: {changed}; {advice}"
            )


def _backbone_problems(model: nn.Module, adapter: _Adapter, check_backbone: bool) -> list[str]:
    saved, own = adapter.config["backbone"], _geometry(model)
    differ = [key for key in own if saved.get(key) != own[key]]
    if differ == ["grid"]:
        return [_told_other_size(model, adapter)]
    problems = [
        f"backbone {key}: the adapter was made for {saved.get(key)!r}, the model has {own[key]!r}"
        for key in differ
    ]
    if not problems and check_backbone and saved.get("fingerprint") != backbone_fingerprint(model):
        random = (
            ""
            if saved.get("pretrained") is not False
            else " (it was made with pretrained=False: if its "
            "weights were drawn at random, save the adapter with include_backbone=True)"
        )
        problems.append(
            f"backbone weights: not those of {saved.get('name') or 'the backbone'} that the adapter was "
            f"trained on (their fingerprints differ){random}; use a model with those weights, or pass "
            f"check_backbone=False if the difference is meant, such as a float16 or quantised copy"
        )
    return problems


def _told_other_size(model: nn.Module, adapter: _Adapter) -> str:
    size, own = adapter.config["data"]["input_size"][1:], list(model.pretrained_cfg["input_size"][1:])
    return (
        f"backbone grid: the adapter was made for images of {size[0]}x{size[1]} pixels, the model takes "
        f"{own[0]}x{own[1]}; load it into a model of its size, then call "
        f"model.set_input_size(({own[0]}, {own[1]}))"
    )


def _prompt_problems(model: nn.Module, adapter: _Adapter) -> list[str]:
    saved, own = asdict(adapter.prompts), asdict(model.config)
    return [
        f"prompts {name}: the adapter has {saved[name]!r}, the model {own[name]!r}"
        for name in own
        if name not in TRAINING_OPTIONS and saved[name] != own[name]
    ]


def _head_problems(model: nn.Module, adapter: _Adapter) -> list[str]:
    saved = _num_classes(adapter)
    if saved == model.num_classes:
        return []
    return [
        f"num_classes: the adapter has {saved}, the model {model.num_classes}; call "
        f"model.reset_classifier({saved}) first"
    ]


def _tensor_problems(model: nn.Module, adapter: _Adapter) -> list[str]:
    own = model.adapter_state()
    problems = [f"{name}: the adapter has no such tensor" for name in own if name not in adapter.tensors]
    for name, value in adapter.tensors.items():
        if name not in own:
            problems.append(f"{name}: the model has no such tensor")
        elif value.shape != own[name].shape:
            if not (name.endswith("token_projection.weight") and _only_size_differs(model, adapter)):
                problems.append(f"{name}: shape {tuple(value.shape)}, the model has {tuple(own[name].shape)}")
        elif own[name].is_floating_point() and not value.is_floating_point():
            problems.append(f"{name}: dtype {value.dtype}, expected floating-point numbers")
        elif not own[name].is_floating_point() and value.dtype != own[name].dtype:
            problems.append(f"{name}: dtype {value.dtype}, expected {own[name].dtype}")
        elif own[name].is_meta:
            problems.append(f"{name}: the model has it on the meta device; call model.to_empty(device=...)")
    return problems


def _only_size_differs(model: nn.Module, adapter: _Adapter) -> bool:
    """Whether all there is between adapter and backbone is the size of the images, as is told by itself."""
    saved, own = adapter.config["backbone"], _geometry(model)
    return [key for key in own if saved.get(key) != own[key]] == ["grid"]


def _raise_misfit(adapter: _Adapter, problems: list[str]) -> None:
    if problems:
        raise AdapterError(f"the adapter in {adapter.folder} does not fit the model", problems)


def _num_classes(adapter: _Adapter) -> int:
    return adapter.config["backbone"]["num_classes"]


def _copy(model: nn.Module, adapter: _Adapter) -> None:
    own = model.adapter_state()
    # All conversions first: one that runs out of memory must not leave half an adapter in the model.
    values = {name: adapter.tensors[name].to(own[name].device, own[name].dtype) for name in own}
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(values[name])
    names, config = adapter.config.get("class_names"), adapter.config
    model.adapter_metadata = config["metadata"]
    model.class_names = None if names is None else tuple(names)
    # The size is the model's own, which may change.
    model.data_config = {key: value for key, value in config["data"].items() if key != "input_size"}


def _take_dtypes(model: nn.Module, adapter: _Adapter) -> None:
    """Give the tensors of a new model the dtypes that they were saved in."""
    for name, tensor in model.adapter_state().items():
        tensor.data = tensor.data.to(adapter.tensors[name].dtype)


# ---- making a backbone


def _build_by_name(
    cls: Callable[..., nn.Module],
    adapter: _Adapter,
    name: str | None,
    weights: str | os.PathLike | None,
    backend: str | None,
) -> nn.Module:
    args = _check_rebuild(adapter, name, weights)
    saved = adapter.config["backbone"]
    kwargs = {"prompts": adapter.prompts, "backend": backend}
    if name is None and weights is None and not adapter.has_backbone:
        name = saved["name"]
    if name is not None and weights is None:
        return _making(adapter, name, True, lambda: cls(name, pretrained=True, **kwargs, **args))
    if name is None:
        name = saved.get("architecture") or saved["name"].partition(".")[0]
    made = _making(adapter, name, False, lambda: create_backbone(name, **args))
    if weights is None:
        _assign(made, _read_backbone(adapter), adapter)
    else:
        try:
            load_weights(made, weights)
        except (FileNotFoundError, ValueError) as error:
            raise AdapterError(_cannot_make(adapter), [str(error)]) from error
    return cls(made, **kwargs)


def _cannot_make(adapter: _Adapter) -> str:
    return f"the backbone of the adapter in {adapter.folder} can't be made"


def _check_rebuild(adapter: _Adapter, name: str | None, weights: str | os.PathLike | None) -> dict[str, Any]:
    """The arguments for timm.create_model, unless the adapter does not tell enough, or tells too much."""
    saved = adapter.config["backbone"]
    args, left_out = saved.get("args"), saved.get("args_left_out")
    problems = []
    if not isinstance(args, dict) or (name is None and not isinstance(saved.get("name"), str)):
        problems.append(
            "its config does not tell how timm makes it; make it yourself and pass it: backbone=..."
        )
    elif left_out:
        problems.append(
            f"its config has not the arguments {left_out}, which JSON can't express; make it yourself and "
            "pass it: backbone=..."
        )
    elif refused := sorted(LOCAL_ARGS & args.keys()):
        problems.append(f"its config has the arguments {refused}, which no adapter may choose")
    elif name is None and weights is None and not adapter.has_backbone:
        if path := saved.get("weights_path"):
            problems.append(
                f"it has the weights of the file {path!r} on the machine where it was saved, and no adapter "
                f"may choose which files are opened; if you trust that file, pass it: weights={path!r}, or "
                f"--weights {shlex.quote(str(path))} on the command line"
            )
        elif is_local(saved["name"]):
            problems.append(
                f"it was made from {saved['name']!r} on the machine where it was saved, and no adapter may "
                "choose which files are opened; if you trust that folder, pass it: "
                f"backbone={saved['name']!r}, or --backbone {shlex.quote(saved['name'])} on the command line"
            )
    if problems:
        raise AdapterError(_cannot_make(adapter), problems)
    return args | {"num_classes": _num_classes(adapter)}


def _making(adapter: _Adapter, name: str, pretrained: bool, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except BackendUnavailableError:
        raise
    except Exception as error:  # whatever timm, the hub's client or the network raise
        problems = [f"timm.create_model({name!r}, {pretrained=}) failed: {type(error).__name__}: {error}"]
        if pretrained:
            problems.append(
                "if its weights can't be downloaded here, make the timm model yourself and pass it: "
                "backbone=..."
            )
        raise AdapterError(_cannot_make(adapter), problems) from error


def _assign(backbone: nn.Module, state: dict[str, Tensor], adapter: _Adapter) -> None:
    """Put the tensors of the backbone's file into it, dtypes included."""
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        backbone.to(*dtypes)  # also what no state dict holds
    try:
        keys = backbone.load_state_dict(state, strict=False, assign=True)
        problems = [*keys.unexpected_keys, *(k for k in keys.missing_keys if not k.startswith(HEADS))]
    except RuntimeError as error:
        problems = [str(error)]
    if problems:
        path = adapter.folder / _backbone_name(adapter.config)
        raise _unreadable(path, f"its tensors are not those of {type(backbone).__name__}: {problems}")
