"""Where a backbone comes from: the names by which timm makes it again, and files of weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from timm.models import get_arch_pretrained_cfgs, load_state_dict
from torch import Tensor, nn

from .arguments import listing, plain

__all__ = [
    "HEADS",
    "HUB_PREFIX",
    "LOCAL_ARGS",
    "PREFIX",
    "backbone_source",
    "check_state_names",
    "hub_repository",
    "is_local",
    "load_weights",
    "misfits",
    "rebuild_args",
]

# The beginnings of the names of a backbone's classifiers in its state dict.
HEADS = ("head.", "head_dist.")

# of the names under which timm knows an architecture with prompts
PREFIX = "vapt_"

# of the names of what is on the Hugging Face Hub, timm's models and adapters
HUB_PREFIX = "hf-hub:"

# Arguments of timm.create_model that say where one machine finds the weights. Another machine has no use for
# them, and an adapter from a stranger must not choose which files are opened.
LOCAL_ARGS = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}


def backbone_source(
    backbone: nn.Module, options: Mapping[str, Any] | None = None, pretrained: bool | None = None
) -> dict[str, Any]:
    """What is known about the origin of a timm model.

    Args:
        backbone: the timm model.
        options: the keywords that timm.create_model was given, if that is known.
        pretrained: whether it was to load weights, if that is known.

    Returns:
        ``name``: what timm.create_model takes to make it, as "vit_base_patch16_224.augreg_in21k",
        "hf-hub:owner/name" or "local-dir:/folder"; None for a model that timm did not make.
        ``architecture``: timm's name of the architecture alone.
        ``weights_path``: a file of weights that was loaded into it, None if there was none.
        ``pretrained``: as given.
    """
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    architecture, tag, file = cfg.get("architecture"), cfg.get("tag"), cfg.get("file")
    name = f"{architecture}.{tag}" if architecture and tag else architecture
    if cfg.get("source") == "local-dir":
        name, file = f"local-dir:{file}", None
    elif cfg.get("source") == "hf-hub":
        name, file = f"hf-hub:{cfg.get('hf_hub_id')}", None
    elif architecture and file in [known.file for known in get_arch_pretrained_cfgs(architecture).values()]:
        file = None  # timm's own entry for that name
    path = (options or {}).get("checkpoint_path") or file
    return {
        "name": name,
        "architecture": architecture,
        "weights_path": None if path is None else str(path),
        "pretrained": pretrained,
    }


def hub_repository(source: Mapping[str, Any]) -> str | None:
    """The repository of the Hugging Face Hub with a backbone's weights, None if they are not from there.

    Args:
        source: of ``backbone_source``.
    """
    name, architecture = source["name"], source["architecture"]
    if name is None or source["weights_path"] is not None or is_local(name):
        return None
    if name.startswith(HUB_PREFIX):
        return name.removeprefix(HUB_PREFIX).partition("@")[0]
    known = get_arch_pretrained_cfgs(architecture).get(name)
    return None if known is None else known.hf_hub_id


def is_local(name: str) -> bool:
    """Whether timm looks for this model in a folder of this machine."""
    return name.partition(":")[0].strip().lower() == "local-dir"


def rebuild_args(backbone: nn.Module, **current: Any) -> dict[str, Any]:
    """The keywords with which timm makes the architecture again.

    Args:
        backbone: a model that timm.create_model has made, or another of its classes.
        **current: what is known better than timm remembers it: num_classes, img_size, ...
    """
    args = {**getattr(backbone, "_model_args", {}), **current}
    # dtype and device are the choice of whoever uses the backbone
    return {key: plain(value) for key, value in args.items() if key not in LOCAL_ARGS | {"dtype", "device"}}


def load_weights(backbone: nn.Module, path: str | PathLike) -> None:
    """Load a timm model's weights from a file, all but the head's, or change nothing.

    Weights of another image size are resampled, and the names of other code bases translated, as timm does
    when it loads pre-trained weights. The model's ``pretrained_cfg`` says from then on which file it was.

    Args:
        backbone: the timm model.
        path: a safetensors file, or a checkpoint of torch.save: a state dict, or a dict with one under
            "state_dict", "model", "state_dict_ema" or "model_ema". Nothing in it can run code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, or tensors that are missing, unexpected or of another shape; lists all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(path)!r}: no such file")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # for damaged files, torch's unpickler raises whatever it comes upon
        raise ValueError(
            f"weights {str(path)!r} can't be read as a state dict; expected a safetensors file, named "
            f"*.safetensors, or one of torch.save with another ending: {type(error).__name__}: {error}"
        ) from error
    if any(name.startswith("backbone.") for name in state):
        raise ValueError(
            f"weights {str(path)!r} are those of a whole AdaptiveViT (names begin with 'backbone.'); "
            "expected the weights of a timm model without prompts"
        )
    translate = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if translate is not None:
        state = translate(state, backbone)
    own = backbone.state_dict()
    own, state = (
        {name: value for name, value in of.items() if not name.startswith(HEADS)} for of in (own, state)
    )
    if problems := list(misfits(state, own)):
        raise ValueError(listing(f"weights {str(path)!r} do not fit {type(backbone).__name__}", problems))
    backbone.load_state_dict(state, strict=False)  # the head's are the only ones missing
    # timm's key for where the weights came from
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    cast(Any, backbone).pretrained_cfg = {**cfg, "file": str(path.absolute())}


def misfits(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield which tensors of a state dict are missing, of another shape, or unexpected."""
    for name, tensor in expected.items():
        if name not in state:
            yield f"{name}: missing, expected shape {tuple(tensor.shape)}"
        elif (shape := tuple(getattr(state[name], "shape", ()))) != tensor.shape:
            yield f"{name}: shape {shape}, expected {tuple(tensor.shape)}"
    yield from (f"{name}: unexpected" for name in state if name not in expected)


def check_state_names(state: Mapping[str, Any], backbone: nn.Module) -> None:
    """Raise if a state dict meant for an AdaptiveViT is one of its backbone as timm has it.

    Raises:
        RuntimeError: it is, as torch's own refusals of state dicts; with what to do.
    """
    known = state.keys() & backbone.state_dict().keys()
    if known and not any(name.startswith(("backbone.", "prompts.", "adapters.")) for name in state):
        raise RuntimeError(
            f"the state dict is one of a timm model without prompts: it has {sorted(known)[0]!r}, which is "
            f"'backbone.{sorted(known)[0]}' here. Make the timm model with these weights first: "
            "AdaptiveViT(timm.create_model(name, checkpoint_path=...)). In timm's own scripts, give them as "
            "--pretrained --pretrained-path FILE instead of --initial-checkpoint"
        )
