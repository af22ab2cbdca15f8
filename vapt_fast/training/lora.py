"""LoRA in a frozen timm model, through PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from .errors import UserError

__all__ = ["LoraOptions", "add_lora", "has_lora", "import_peft", "merged_lora"]


@dataclass(frozen=True)
class LoraOptions:
    """The options of LoRA.

    Attributes:
        rank: of the matrices.
        alpha: their product is scaled by alpha / rank.
        targets: the ends of the names of the modules that get them.

    Raises:
        UserError: a rank or an alpha out of range, or no targets.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: Sequence[str] = ("qkv",)

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise UserError(f"lora_rank and lora_alpha must be positive, got {self.rank} and {self.alpha}")
        if not self.targets:
            raise UserError("lora_targets must name at least one module, as qkv")


def import_peft() -> Any:
    """Return the package peft.

    Raises:
        ModuleNotFoundError: it is missing; the message says how to install it.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "method 'lora' needs PEFT, which is not installed; install it with: pip install 'vapt_fast[lora]'"
        ) from error
    return peft


def add_lora(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze a timm model but for its head, and put trainable low-rank matrices beside some of its weights.

    Args:
        model: changed in place.
        rank, alpha, targets: see LoraOptions.

    Raises:
        ModuleNotFoundError: PEFT is missing; the message says how to install it.
        UserError: a target that the model doesn't have.
    """
    peft = import_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=cast(Any, alpha), target_modules=list(targets))
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"lora_targets {list(targets)} do not fit {type(model).__name__}: {reason}"
        ) from error
    classifier: nn.Module = cast(Any, model).get_classifier()
    classifier.requires_grad_(True)


def has_lora(model: nn.Module) -> bool:
    """Return whether ``add_lora`` has changed a model."""
    return any(_is_lora(module) for module in model.modules())


def merged_lora(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose weights have the low-rank products added, and that needs no PEFT."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if _is_lora(module):
            layer = cast(Any, module)
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    return model


def _is_lora(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.") and hasattr(module, "lora_A")
