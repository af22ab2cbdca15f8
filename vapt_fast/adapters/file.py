"""The files of an adapter, format 1: what was learned, without the frozen backbone, in one folder.

``adapter_model.safetensors`` holds the prompts and the head and, in its header, the whole config: where it
comes from, what it fits, and a sha256 of every tensor. ``adapter_config.json`` is the same config for people
and other tools. So the first file alone is complete, and replacing it is the one moment at which a save
counts: interrupted before, the earlier adapter is still there, whatever became of the other files.

A folder may hold the frozen backbone too, in ``backbone-<16 digits>.safetensors``. The digits are the
beginning of the file's sha256, so that a new backbone never takes the place of one that an adapter needs.

Later versions of this library read format 1.

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
- ``peft_type``: what PEFT looks for in an adapter_config.json; it refuses this value by its name.
  ``base_model_name_or_path``: where the Hugging Face Hub has the backbone ("timm/...", null if it has not).
  Adapters of earlier versions lack both; nothing is read from them.
- ``backbone``: ``name`` (what timm.create_model takes: a name with its tag, "hf-hub:..." or "local-dir:...";
  null if timm did not make it), ``architecture`` (timm's, without tag), ``args`` (keywords for
  timm.create_model), ``args_left_out`` (those that JSON can't express), ``weights_path`` (a local file of
  weights that it got; null if none), ``pretrained`` (whether timm was to load weights; null if unknown),
  ``file_sha256`` (of the backbone's file in the folder; null if there is none), ``num_classes``; what it
  must share with a model: ``depth``, ``dim``, ``grid``, ``patch_size``, ``num_prefix_tokens``,
  ``global_pool``; its ``fingerprint``; and ``precision``, the ``backbone_precision`` of the model that was
  saved (null, or missing, for that of the weights).
- ``prompts``: the options of PromptConfig, all of them.
- ``heads``: the name of each classifier's class: "Linear", "Identity", or a user's own, which no file can
  make. Adapters of earlier versions lack it.
- ``class_names``: a name for each class, or null.
- ``data``: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``: how images are
  prepared, as timm says it.
- ``tensors``: by name, ``dtype`` (as safetensors calls it), ``shape`` and ``sha256``.
- ``metadata``: the user's own.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .._version import __version__
from ..arguments import listing
from ..config import PromptConfig
from ..data import check_data_config
from ..files import write_files

__all__ = [
    "CONFIG_NAME",
    "HEADER_KEY",
    "WEIGHTS_NAME",
    "AdapterError",
    "AdapterFile",
    "AdapterNotFoundError",
    "class_name_problems",
    "config_sha256",
    "read",
    "read_backbone",
    "remove",
    "tensor_table",
    "unreadable",
    "write",
]

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
BACKBONE_NAME = "backbone-{}.safetensors"
BACKBONES = re.compile(r"backbone-[0-9a-f]{16}\.safetensors")
FORMAT_VERSION = 1

# The config's key in the metadata of the safetensors header. The only one: with more, their order would be
# random, and saving the same adapter twice would give different files.
HEADER_KEY = "adapter_config"

# PEFT, which reads files of this name too, raises KeyError with this text.
PEFT_TYPE = "VAPT, an adapter of vapt_fast and not of PEFT"
BASE_MODEL_KEY = "base_model_name_or_path"


class AdapterError(ValueError):
    """An adapter that can't be saved or loaded as asked.

    Attributes:
        problems: every reason, one line each.
    """

    def __init__(self, summary: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(listing(summary, self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process gets the error, for pickle."""
        return _error_of, (type(self), str(self), self.problems)


def _error_of(kind: type[AdapterError], message: str, problems: tuple[str, ...]) -> AdapterError:
    error = kind("", ())
    error.args, error.problems = (message,), problems
    return error


class AdapterNotFoundError(AdapterError, FileNotFoundError):
    """A file of the adapter does not exist."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from its folder, in agreement with its own checksums."""

    folder: Path
    config: dict[str, Any]
    prompts: PromptConfig
    tensors: dict[str, Tensor]

    @property
    def backbone(self) -> dict[str, Any]:
        """What the config says of the backbone."""
        return self.config["backbone"]

    @property
    def num_classes(self) -> int:
        """The number of classes of its head."""
        return self.backbone["num_classes"]

    @property
    def backbone_path(self) -> Path | None:
        """The backbone's file in the folder, None if the adapter came without."""
        digest = self.backbone.get("file_sha256")
        return None if digest is None else self.folder / _backbone_name(digest)


# ---- writing


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    backbone: Mapping[str, Tensor] | None,
) -> None:
    """Write an adapter; one that is there already stays whole until the new one takes its place.

    Args:
        folder: where to; it is made if it does not exist.
        config: the keys ``base_model_name_or_path``, ``backbone``, ``prompts``, ``heads``, ``class_names``,
            ``data`` and ``metadata``.
        tensors: the tensors of the adapter.
        backbone: those of the backbone, None to leave it out.
    """
    tensors = _copies(tensors)
    contents, digest = {}, None
    if backbone is not None:
        content = safetensors.torch.save(_copies(backbone))
        digest = hashlib.sha256(content).hexdigest()
        contents[_backbone_name(digest)] = content
    whole = {
        "format_version": FORMAT_VERSION,
        "library": "vapt_fast",
        "library_version": __version__,
        "peft_type": PEFT_TYPE,
        **config,
        "backbone": config["backbone"] | {"file_sha256": digest},
        "tensors": tensor_table(safetensors.torch.save(tensors)),
    }
    whole = json.loads(json.dumps(whole))  # as it will be read: tuples become lists
    whole["config_sha256"] = config_sha256(whole)
    contents[CONFIG_NAME] = json.dumps(whole, indent=2).encode()
    contents[WEIGHTS_NAME] = safetensors.torch.save(tensors, metadata={HEADER_KEY: json.dumps(whole)})
    write_files(folder, contents)  # the one that counts comes last
    _remove_other_backbones(folder, keep=contents)


def remove(folder: Path) -> None:
    """Remove the adapter in a folder, and the backbone that it came with."""
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (folder / name).unlink(missing_ok=True)
    _remove_other_backbones(folder, keep={})


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, because safetensors refuses tensors that share memory."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _backbone_name(digest: str) -> str:
    return BACKBONE_NAME.format(digest[:16])


def _remove_other_backbones(folder: Path, keep: Mapping[str, bytes]) -> None:
    """Remove the backbones of adapters that are no longer there."""
    for path in folder.iterdir():
        if BACKBONES.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)


# ---- checksums


def tensor_table(weights: bytes) -> dict[str, dict[str, Any]]:
    """Return dtype (safetensors' name of it), shape and sha256 of each tensor in a safetensors file."""
    return {
        name: {
            "dtype": tensor["dtype"],
            "shape": list(tensor["shape"]),
            "sha256": hashlib.sha256(tensor["data"]).hexdigest(),
        }
        for name, tensor in sorted(safetensors.deserialize(weights), key=lambda entry: entry[0])
    }


def config_sha256(config: Mapping[str, Any]) -> str:
    """Return the sha256 of all keys of the config but ``config_sha256``."""
    content = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- reading


def read(folder: Path) -> AdapterFile:
    """Read and verify an adapter by itself, without regard to any model.

    Raises:
        AdapterNotFoundError: a file is missing.
        AdapterError: damaged or edited files, or those of another version.
    """
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    copy, weights = _parse(_read_bytes(config_path), config_path), _read_bytes(weights_path)
    try:
        table = tensor_table(weights)
    except safetensors.SafetensorError as error:
        raise unreadable(weights_path, f"not a whole safetensors file: {error}") from error
    config = _header_config(weights, weights_path)
    _check_config(config, weights_path)
    _check_tensors(table, config["tensors"], weights_path)
    config["metadata"] = _check_copy(copy, config, config_path)
    try:
        prompts = PromptConfig.from_dict(config["prompts"])
    except (TypeError, ValueError) as error:
        raise unreadable(weights_path, f"prompts{_other_version(config)}: {error}") from error
    tensors = safetensors.torch.load(weights)
    # Heads were part of the backbone once.
    tensors = {name.removeprefix("backbone."): value for name, value in tensors.items()}
    return AdapterFile(folder, config, prompts, tensors)


def read_backbone(adapter: AdapterFile, path: Path) -> dict[str, Tensor]:
    """Return the tensors of the backbone in the adapter's folder, of which the config has the sha256."""
    content = _read_bytes(path)
    if hashlib.sha256(content).hexdigest() != adapter.backbone["file_sha256"]:
        raise unreadable(path, "it was changed after it was saved: the sha256 differs")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise unreadable(path, f"not a whole safetensors file: {error}") from error


def unreadable(path: Path, *problems: str) -> AdapterError:
    """Return the error that says why the file ``path`` can't be read."""
    return AdapterError(f"{path} can't be read", problems)


def class_name_problems(class_names: object, num_classes: int) -> Iterator[str]:
    """Yield what is wrong with the names of the classes; None is right."""
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


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        files = f"{CONFIG_NAME} and {WEIGHTS_NAME}, as save_adapter writes it"
        expected = f"an adapter is a folder with {files}; one on the Hub is hf-hub:owner/name"
        raise AdapterNotFoundError(f"{path} does not exist", [expected]) from error


def _parse(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise unreadable(path, f"expected a JSON object, got {type(value).__name__}")
    return value


def _header_config(weights: bytes, path: Path) -> dict[str, Any]:
    """The config in the header of a file that safetensors has found whole."""
    length = int.from_bytes(weights[:8], "little")
    metadata = _parse(weights[8 : 8 + length], path).get("__metadata__")
    if not isinstance(metadata, dict) or HEADER_KEY not in metadata:
        raise unreadable(path, f"its header has no {HEADER_KEY!r}: not a file that save_adapter wrote")
    return _parse(metadata[HEADER_KEY], path)


def _other_version(config: Mapping[str, Any]) -> str:
    """The advice to install the version that saved the adapter; empty if it is this one."""
    version = config.get("library_version")
    if version == __version__:
        return ""
    return f" (saved by vapt_fast {version}, and this is {__version__}: install that version)"


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Raise unless the config is of this format, unchanged since it was saved, and has all its sections."""
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise unreadable(
            path, f"format_version is {version!r}, expected {FORMAT_VERSION}{_other_version(config)}"
        )
    if config.get("config_sha256") != config_sha256(config):
        raise unreadable(path, "its config was changed after it was saved: the sha256 differs")
    sections = ("backbone", "prompts", "data", "tensors", "metadata")
    missing = [f"{name!r} is missing" for name in sections if not isinstance(config.get(name), dict)]
    if missing:
        raise unreadable(path, *missing)
    backbone = config["backbone"]
    digest, num_classes = backbone.get("file_sha256"), backbone.get("num_classes")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise unreadable(path, f"backbone file_sha256 is {digest!r}, expected 64 digits or null")
    if type(num_classes) is not int or num_classes < 0:
        raise unreadable(path, f"backbone num_classes is {num_classes!r}, expected an int of at least 0")
    problems = list(class_name_problems(config.get("class_names"), num_classes))
    if not isinstance(heads := config.get("heads", {}), dict):
        problems.append(f"heads is {heads!r}, expected classes by name")
    try:
        check_data_config({"crop_mode": "center", **config["data"]})
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"data: {error}")
    if problems:
        raise unreadable(path, *problems)


def _check_tensors(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Raise unless the tensors are those of which the config has the sha256."""
    problems = [f"{name}: missing" for name in expected if name not in found]
    for name, value in found.items():
        if value != expected.get(name):
            problems.append(f"{name}: saved {expected.get(name, 'no such tensor')}, now {value}")
    if problems:
        raise unreadable(path, *problems)


def _check_copy(copy: dict[str, Any], config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Compare adapter_config.json with the config in the header, which is the one that counts.

    One of another save is not an error: an interrupted save leaves that. One of the same save with other
    values is: whoever changed it expects an effect. The metadata, and what is there for other tools, may be
    edited, and keys may be added.

    Returns:
        The metadata, from the file unless that belongs to another save.
    """
    if copy.get("config_sha256") != config["config_sha256"]:
        warnings.warn(
            f"{path} was not saved together with {WEIGHTS_NAME} (a save was interrupted, or one of the files "
            f"was exchanged); the config inside {WEIGHTS_NAME} is used",
            stacklevel=4,
        )
        return config["metadata"]
    metadata = copy.get("metadata")
    free = {"metadata", "peft_type", BASE_MODEL_KEY}
    fixed = {key: value for key, value in config.items() if key not in free}
    changed = list(_differences(fixed, copy))
    if not isinstance(metadata, dict):
        changed.append(f"metadata: expected an object, got {metadata!r}")
    elif not changed:
        return metadata
    raise AdapterError(f"{path} was changed after it was saved", changed)


def _differences(saved: dict[str, Any], found: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in saved.items():
        if key not in found:
            yield f"{prefix}{key}: saved {value!r}, now missing"
        elif isinstance(value, dict) and isinstance(found[key], dict):
            yield from _differences(value, found[key], f"{prefix}{key}.")
        elif found[key] != value:
            yield f"{prefix}{key}: saved {value!r}, now {found[key]!r}"
