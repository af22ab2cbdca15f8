"""Adapter files: what was learned, without the frozen backbone, in one folder.

``adapter_model.safetensors`` holds the prompts and the head and, in its header, the whole config: where it
comes from, what it fits, and a sha256 of every tensor. ``adapter_config.json`` is the same config for people
and other tools. So the first file alone is complete, and replacing it is the one moment at which a save
counts: interrupted before, the earlier adapter is still there, whatever became of the second file.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ._version import __version__
from .backbone import patch_size
from .backends._dispatch import BackendUnavailable
from .config import PromptConfig

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

# Arguments of timm.create_model that say where one machine finds the weights. Another machine has no use for
# them, and an adapter from a stranger must not choose which files are opened.
LOCAL_ARGS = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}


# timm's names for how images must be prepared
DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


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


# ---- what users call, by way of AdaptiveViT


def save(model: nn.Module, folder: str | os.PathLike, metadata: dict[str, Any] | None = None) -> None:
    """Write the prompts and the head of ``model`` to ``folder``, which is made if it does not exist.

    An adapter that is there already stays whole until the new one takes its place, in one step.
    Save from one process only.

    Args:
        model: an AdaptiveViT; its parameters are written in their own dtypes.
        folder: where to.
        metadata: anything that JSON can express, kept with the adapter; None for ``model.adapter_metadata``.

    Raises:
        AdapterError: metadata that JSON can't express, or trainable parameters that are neither prompts nor
            head; lists every problem.
        OSError: the file system's own refusals.
    """
    metadata = model.adapter_metadata if metadata is None else metadata
    problems = _save_problems(model, metadata)
    if problems:
        raise AdapterError("the adapter can't be saved", problems)
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {name: value.detach().cpu().clone() for name, value in model.adapter_state().items()}
    config = _describe(model, _tensor_table(safetensors.torch.save(tensors)), metadata)
    _write_files(
        Path(folder),
        {
            CONFIG_NAME: json.dumps(config, indent=2).encode(),
            WEIGHTS_NAME: safetensors.torch.save(tensors, metadata={HEADER_KEY: json.dumps(config)}),
        },
    )


def load(model: nn.Module, folder: str | os.PathLike, *, check_backbone: bool = True) -> None:
    """Copy the adapter in ``folder`` into ``model``, or change nothing at all.

    The model's parameters keep their dtype and device. ``model.adapter_metadata`` becomes the adapter's.

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
    backbone: nn.Module | None = None,
    check_backbone: bool = True,
    backend: str | None = None,
) -> nn.Module:
    """A new model made for the adapter in ``folder``, with the adapter loaded.

    Args:
        cls: AdaptiveViT, or a function with its arguments.
        folder: what ``save`` wrote.
        backbone: the timm model to adapt; it gets a head of the adapter's number of classes. None to make it
            with timm, pretrained, from the name and the arguments in the adapter's config.
        check_backbone: as for ``load``.
        backend: as for AdaptiveViT.

    Raises:
        AdapterNotFoundError: a file is missing.
        AdapterError: damaged files, a backbone that timm can't make here, or one that does not fit; lists
            every mismatch.
        TypeError, ValueError, NotImplementedError: AdaptiveViT refuses ``backbone`` or ``backend``.
    """
    adapter = _read(Path(folder))
    num_classes = _num_classes(adapter)
    if backbone is None:
        model = _build_by_name(cls, adapter, num_classes, backend)
    else:
        model = cls(backbone, prompts=adapter.prompts, backend=backend)
    # Before the head is replaced: a backbone that does not fit is handed back as it was.
    _raise_misfit(adapter, _backbone_problems(model, adapter, check_backbone))
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    _raise_misfit(adapter, _tensor_problems(model, adapter))
    _copy(model, adapter)
    return model


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config of the adapter in ``folder``, after the same checks of both files as ``load`` makes.

    Keys: ``backbone`` (name, timm arguments, geometry, fingerprint), ``prompts`` (the options of
    PromptConfig), ``data`` (mean, std, input_size, interpolation and crop_pct the images need), ``tensors``
    (dtype, shape and sha256 of each), ``metadata`` (the user's), ``library_version``, ``format_version``.

    Raises:
        AdapterNotFoundError, AdapterError: as for ``load``.
    """
    return _read(Path(folder)).config


def backbone_fingerprint(model: nn.Module) -> str:
    """The sha256 of everything frozen in ``model``: names, shapes and values of parameters and buffers.

    The head, being trained, is left out. Values are rounded to bfloat16 first, so that a bfloat16 copy of a
    float32 backbone has the same fingerprint (a float16 copy has not: it rounds to other values).
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.backbone.state_dict().items()):
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


def _describe(model: nn.Module, tensor_table: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    config = {
        "format_version": FORMAT_VERSION,
        "library": "vapt_fast",
        "library_version": __version__,
        "backbone": {
            "name": model.backbone_name,
            "args": _rebuild_args(model),
            "num_classes": model.num_classes,
            **_geometry(model),
            "fingerprint": backbone_fingerprint(model),
        },
        "prompts": asdict(model.config),
        "data": {key: model.pretrained_cfg.get(key) for key in DATA_KEYS},
        "tensors": tensor_table,
        "metadata": metadata,
    }
    config = json.loads(json.dumps(config))  # as it will be read: tuples become lists
    return config | {"config_sha256": _config_sha256(config)}


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


def _rebuild_args(model: nn.Module) -> dict[str, Any] | None:
    """The arguments with which timm makes the backbone again, None if JSON can't express them."""
    args = {key: value for key, value in model.backbone_args.items() if key not in LOCAL_ARGS}
    return args if _why_not_json(args) is None else None


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
        raise _unreadable(weights_path, f"prompts: {error}") from error
    return _Adapter(folder, config, prompts, safetensors.torch.load(weights))


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


def _save_problems(model: nn.Module, metadata: object) -> list[str]:
    problems = []
    if not isinstance(metadata, dict):
        problems.append(f"metadata must be a dict, got {type(metadata).__name__}")
    elif reason := _why_not_json(metadata):
        problems.append(f"metadata must be made of what JSON knows: {reason}")
    saved = {id(parameter) for _, parameter in model.named_adapter_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in saved:
            problems.append(
                f"{name} is trainable, but adapters hold the prompts and the head only; freeze it, or keep "
                f"the whole model.state_dict()"
            )
    return problems


def _backbone_problems(model: nn.Module, adapter: _Adapter, check_backbone: bool) -> list[str]:
    saved = adapter.config["backbone"]
    problems = [
        f"backbone {key}: the adapter was made for {saved.get(key)!r}, the model has {value!r}"
        for key, value in _geometry(model).items()
        if saved.get(key) != value
    ]
    if not problems and check_backbone and saved.get("fingerprint") != backbone_fingerprint(model):
        problems.append(
            f"backbone weights: not those of {saved.get('name') or 'the backbone'} that the adapter was "
            f"trained on (their fingerprints differ); use a model with those weights, or pass "
            f"check_backbone=False if the difference is meant, such as a float16 or quantised copy"
        )
    return problems


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
            problems.append(f"{name}: shape {tuple(value.shape)}, the model has {tuple(own[name].shape)}")
        elif value.is_floating_point() != own[name].is_floating_point():
            problems.append(f"{name}: dtype {value.dtype}, the model has {own[name].dtype}")
        elif own[name].is_meta:
            problems.append(f"{name}: the model has it on the meta device; call model.to_empty(device=...)")
    return problems


def _raise_misfit(adapter: _Adapter, problems: list[str]) -> None:
    if problems:
        raise AdapterError(f"the adapter in {adapter.folder} does not fit the model", problems)


def _num_classes(adapter: _Adapter) -> int:
    value = adapter.config["backbone"].get("num_classes")
    if type(value) is not int or value < 0:
        raise _unreadable(adapter.folder / WEIGHTS_NAME, f"backbone num_classes is {value!r}")
    return value


def _copy(model: nn.Module, adapter: _Adapter) -> None:
    own = model.adapter_state()
    # All conversions first: one that runs out of memory must not leave half an adapter in the model.
    values = {name: adapter.tensors[name].to(own[name].device, own[name].dtype) for name in own}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
    model.adapter_metadata = adapter.config["metadata"]


def _build_by_name(
    cls: Callable[..., nn.Module], adapter: _Adapter, num_classes: int, backend: str | None
) -> nn.Module:
    name, args = adapter.config["backbone"].get("name"), adapter.config["backbone"].get("args")
    summary = f"the backbone of the adapter in {adapter.folder} can't be made"
    if not isinstance(name, str) or not isinstance(args, dict):
        raise AdapterError(
            summary,
            ["its config does not tell how timm makes it; make it yourself and pass it: backbone=..."],
        )
    refused = sorted(LOCAL_ARGS & args.keys())
    if refused:
        raise AdapterError(summary, [f"its config has the arguments {refused}, which no adapter may choose"])
    try:
        return cls(
            name,
            prompts=adapter.prompts,
            backend=backend,
            pretrained=True,
            **args | {"num_classes": num_classes},
        )
    except BackendUnavailable:
        raise
    except Exception as error:  # whatever timm, the hub's client or the network raise
        raise AdapterError(
            summary,
            [
                f"timm.create_model({name!r}, pretrained=True) failed: {type(error).__name__}: {error}",
                "if its weights can't be downloaded here, make the timm model yourself and pass it: "
                "backbone=...",
            ],
        ) from error
