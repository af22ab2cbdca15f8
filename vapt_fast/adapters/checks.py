"""What must agree between a model and an adapter, and how backbones are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backbones import patch_size
from ..modules import is_wrapper
from .file import AdapterError, AdapterFile
from .module import Adapter

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = [
    "backbone_fingerprint",
    "backbone_problems",
    "fingerprint",
    "geometry",
    "head_problems",
    "prompt_problems",
    "tensor_problems",
]

# Dropout acts in training only, so a model may take an adapter that was trained with other rates.
TRAINING_OPTIONS = {"projector_dropout", "prompt_dropout", "channel_dropout"}


def backbone_fingerprint(model: AdaptiveViT) -> str:
    """Return the sha256 of everything frozen in ``model``: names, shapes, values of parameters and buffers.

    The head, being trained, is left out. Values are rounded to bfloat16 first, so that a bfloat16 copy of a
    float32 backbone has the same fingerprint (a float16 copy has not: it rounds to other values).
    """
    return fingerprint(model.backbone.state_dict())


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, shapes and values, as ``backbone_fingerprint`` has them.

    Raises:
        AdapterError: values that are not here: sharded ones (DTensor), or ones that accelerate has offloaded.
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if value.is_meta or hasattr(value, "full_tensor"):
            where = "on meta, as accelerate offloads it" if value.is_meta else "sharded (DTensor)"
            advice = "gather the whole state dict into a model that is neither, and take that"
            raise AdapterError("the backbone's weights aren't all here", [f"{name} is {where}; {advice}"])
        if is_wrapper(value):  # quantised by torchao
            value = value.dequantize()
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


def backbone_problems(model: AdaptiveViT, adapter: AdapterFile, check_weights: bool) -> Iterator[str]:
    """Yield where the backbones differ: in geometry or, with ``check_weights``, in their fingerprints."""
    saved, own, differ = adapter.backbone, geometry(model), _differing(model, adapter)
    if differ == ["grid"]:
        yield _other_size(model, adapter)
        return
    for key in differ:
        yield f"backbone {key}: the adapter was made for {saved.get(key)!r}, the model has {own[key]!r}"
    if not differ and check_weights and saved.get("fingerprint") != backbone_fingerprint(model):
        random = " (it was made with pretrained=False: if its weights were drawn at random, save the adapter "
        random += "with include_backbone=True)"
        yield (
            f"backbone weights: not those of {saved.get('name') or 'the backbone'} that the adapter was "
            f"trained on (their fingerprints differ){random if saved.get('pretrained') is False else ''}; "
            "use a model with those weights, or pass check_backbone=False if the difference is meant, such "
            "as a float16 or quantised copy"
        )


def prompt_problems(own_adapter: Adapter, adapter: AdapterFile) -> Iterator[str]:
    """Yield the options of the prompts that differ, those of training aside."""
    saved, own = asdict(adapter.prompts), asdict(own_adapter.prompts.config)
    for name in own:
        if name not in TRAINING_OPTIONS and saved[name] != own[name]:
            yield f"prompts {name}: the adapter has {saved[name]!r}, the model {own[name]!r}"


def head_problems(own_adapter: Adapter, adapter: AdapterFile) -> Iterator[str]:
    """Yield whether the heads have different numbers of classes."""
    saved, own = adapter.num_classes, own_adapter.num_classes
    if saved != own:
        yield (
            f"num_classes: the adapter has {saved}, the model {own}; call "
            f"model.reset_classifier({saved}) first"
        )


def tensor_problems(model: AdaptiveViT, own_adapter: Adapter, adapter: AdapterFile) -> Iterator[str]:
    """Yield the tensors that the model has not, the adapter has not, or that have another shape or dtype.

    And the heads of another class, which would compute something else with the same tensors.
    """
    own = own_adapter.state_dict(keep_vars=True)
    for name, mine in own_adapter.head_classes().items():
        saved = adapter.config.get("heads", {}).get(name, mine)
        if saved != mine:
            yield f"{name}: the adapter has a {saved}, the model a {mine}; give the model one first"
    yield from (f"{name}: the adapter has no such tensor" for name in own if name not in adapter.tensors)
    if any(name.startswith("head.") for name in own.keys() ^ adapter.tensors.keys()):
        yield "head: the adapter's is another module; set model.head to one like it, then call load_adapter"
    other_size = _differing(model, adapter) == ["grid"]  # is told by itself
    for name, value in adapter.tensors.items():
        if name not in own:
            yield f"{name}: the model has no such tensor"
        elif value.shape != own[name].shape:
            if not (other_size and name.endswith("token_projection.weight")):
                yield f"{name}: shape {tuple(value.shape)}, the model has {tuple(own[name].shape)}"
        elif own[name].is_floating_point() and not value.is_floating_point():
            yield f"{name}: dtype {value.dtype}, expected floating-point numbers"
        elif not own[name].is_floating_point() and value.dtype != own[name].dtype:
            yield f"{name}: dtype {value.dtype}, expected {own[name].dtype}"
        elif own[name].is_meta:
            yield f"{name}: the model has it on the meta device; call model.to_empty(device=...)"


def _differing(model: AdaptiveViT, adapter: AdapterFile) -> list[str]:
    """The keys of ``geometry`` in which the backbones differ; of two sizes of images, only the grid."""
    return [key for key, value in geometry(model).items() if adapter.backbone.get(key) != value]


def _other_size(model: AdaptiveViT, adapter: AdapterFile) -> str:
    size, own = adapter.config["data"]["input_size"][1:], list(model.pretrained_cfg["input_size"][1:])
    return (
        f"backbone grid: the adapter was made for images of {size[0]}x{size[1]} pixels, the model takes "
        f"{own[0]}x{own[1]}; load it into a model of its size, then call "
        f"model.set_input_size(({own[0]}, {own[1]}))"
    )
