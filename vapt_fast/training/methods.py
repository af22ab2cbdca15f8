"""The methods that can be compared, all trained by the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from timm import get_pretrained_cfg
from torch import Tensor, nn

from ..config import KINDS, PromptConfig
from ..model import AdaptiveViT
from ..names import create_backbone, is_backbone, similar_names
from ..source import load_weights
from .errors import UserError
from .lora import LoraOptions, add_lora

__all__ = [
    "METHODS",
    "LoraOptions",
    "Method",
    "build_model",
    "check_backbone",
    "method_name",
    "param_groups",
    "trained_state",
]


@dataclass(frozen=True)
class Method:
    """One way to adapt a pre-trained model.

    Attributes:
        title: the name in tables.
        prompts: what differs from the user's PromptConfig; None for a timm model without prompts.
        lora: for a model without prompts, whether it is trained by LoRA, and not every weight.
        base_lrs: by optimizer, the learning rates tried if the user gives none, at a batch size of 256.
    """

    title: str
    prompts: dict[str, Any] | None
    base_lrs: Mapping[str, tuple[float, ...]]
    lora: bool = False


# The papers search ten learning rates from 0.05 to 50 for prompts. These are a coarse walk over that range.
_PROMPT_LRS = {"sgd": (10.0, 2.5, 0.5, 0.1), "adamw": (0.04, 0.01, 0.0025, 0.0006)}
_FULL_LRS = {"sgd": (0.1, 0.02, 0.004), "adamw": (0.001, 0.0002, 0.00004)}


def _method_of(kind: str) -> Method:
    return Method(KINDS[kind].title, {"kind": kind}, _PROMPT_LRS)


METHODS = {
    **{KINDS[kind].method: _method_of(kind) for kind in KINDS},
    "linear": Method("linear probe", {"num_prompts": 0}, _PROMPT_LRS),
    "lora": Method("LoRA", None, _PROMPT_LRS, lora=True),
    "full": Method("full fine-tuning", None, _FULL_LRS),
}


def check_backbone(name: str) -> dict[str, Any]:
    """Return what timm knows of a backbone before it is made: its ``pretrained_cfg``.

    Args:
        name: as timm.create_model takes it. Of "hf-hub:owner/name" and "local-dir:/folder" that is read in
            their config.json.

    Raises:
        UserError: timm knows no such backbone, or no such tag; the message suggests similar names.
    """
    if is_backbone(name):
        try:
            cfg = get_pretrained_cfg(name)
        except RuntimeError as error:
            problem = f"backbone {name!r}: {error}"
        else:
            return {} if cfg is None else cfg.to_dict()
    elif ":" in name:
        try:
            with torch.device("meta"):
                return dict(cast(Any, create_backbone(name)).pretrained_cfg)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"backbone {name!r} can't be made: {error}") from error
    else:
        known = "the name of a timm model, hf-hub:owner/name or local-dir:/folder"
        problem = f"backbone must be {known}, got {name!r}"
    similar = ", ".join(similar_names(name))
    raise UserError(f"{problem}; similar: {similar}" if similar else problem)


def method_name(name: str) -> str:
    """Return the key of METHODS for a method, or for the kind of its prompts.

    Raises:
        UserError: neither.
    """
    for kind, cls in KINDS.items():  # those of users may be registered at any time
        METHODS.setdefault(cls.method, _method_of(kind))
    method = KINDS[name].method if isinstance(name, str) and name in KINDS else name
    if method not in tuple(METHODS):
        kinds = ", ".join(f"{kind!r} for {cls.method!r}" for kind, cls in KINDS.items())
        raise UserError(
            f"method must be one of {tuple(METHODS)}, or a kind of prompts ({kinds}), got {name!r}"
        )
    return method


def build_model(
    method: str,
    backbone: str,
    num_classes: int,
    *,
    prompts: PromptConfig | None = None,
    pretrained: bool = True,
    backend: str | None = None,
    backbone_precision: str | None = None,
    weights: str | Path | None = None,
    make: Callable[..., nn.Module] = AdaptiveViT,
    lora: LoraOptions | None = None,
    **timm_options: Any,
) -> nn.Module:
    """Make the model that a method trains: an AdaptiveViT, or for "lora" and "full" a timm model.

    Args:
        method: a key of METHODS, or a kind of prompts.
        backbone: timm's name of the backbone.
        num_classes: of the new head.
        prompts: options of the prompts; the method decides on their kind. None for the defaults.
        pretrained: start from pre-trained weights.
        backend, backbone_precision: as for AdaptiveViT; "lora" and "full" run timm's own forward pass, and
            so have no precision.
        weights: a file with the backbone's weights, in the place of pre-trained ones; see
            vapt_fast.source.load_weights.
        make: what makes a model with prompts: AdaptiveViT, or a function with its arguments.
        lora: options of "lora"; None for the defaults.
        **timm_options: for ``timm.create_model``.

    Raises:
        UserError: an unknown method, a number of classes that is none, "lora" or "full" with a
            backbone_precision, or "lora" with targets that the backbone doesn't have.
        ModuleNotFoundError: PEFT is missing, which "lora" needs.
        FileNotFoundError, ValueError: there is no such file of weights, or they don't fit.
        ValueError, NotImplementedError: as AdaptiveViT raises for a backbone that it can't serve.
    """
    chosen = METHODS[method_name(method)]
    changes = chosen.prompts
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise UserError(f"num_classes must be a positive int, got {num_classes!r}")
    pretrained = pretrained and weights is None
    timm_options = {"num_classes": num_classes, "pretrained": pretrained, **timm_options}
    if changes is None and backbone_precision is not None:
        raise UserError(
            f"backbone_precision={backbone_precision!r} is for methods with prompts and linear probes, and "
            f"{method!r} runs timm's own forward pass: leave it out"
        )
    config = None if changes is None else replace(prompts or PromptConfig(), **changes)
    kwargs: dict[str, Any] = {"backend": backend, "backbone_precision": backbone_precision}
    if config is not None and weights is None:
        return make(backbone, prompts=config, **kwargs, **timm_options)
    model = create_backbone(backbone, **timm_options)
    if weights is not None:
        load_weights(model, weights)
    if chosen.lora:
        add_lora(model, **asdict(LoraOptions() if lora is None else lora))
    return model if config is None else make(model, prompts=config, **kwargs)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trained parameters for an optimizer: everything decays but the head's bias."""
    if isinstance(model, AdaptiveViT):
        return model.param_groups(weight_decay)
    classifier: nn.Module = cast(Any, model).get_classifier()
    head = {id(parameter) for parameter in classifier.parameters() if parameter.ndim == 1}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in head], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in head], "weight_decay": 0.0},
    ]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes, by their names in the state dict, without a copy."""
    if isinstance(model, AdaptiveViT):
        return {name: t for name, t in model.state_dict().items() if name.startswith("adapters.")}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
