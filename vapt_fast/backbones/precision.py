"""Which of the frozen products of a backbone are computed in FP8, and why others are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..arguments import choice, listing
from ..ops.fp8_linear import MULTIPLE
from .blocks import kind_reason
from .linears import LINEARS, Fp8Linear

__all__ = ["PRECISIONS", "precision_of", "precision_report", "set_precision"]

PRECISIONS = tuple(name for name in LINEARS if name is not None)


def precision_of(blocks: nn.Module) -> str | None:
    """Return the precision of the products in ``blocks``; None for that of the weights."""
    linears = (module for module in blocks.modules() if isinstance(module, Fp8Linear))
    return next(map(_own_precision, linears), None)


def set_precision(blocks: nn.Module, precision: str | None) -> None:
    """Compute the products of the Linears in ``blocks`` in ``precision``.

    Args:
        blocks: those of a backbone.
        precision: one of PRECISIONS; None for that of the weights.

    Raises:
        TypeError, ValueError: not a precision, one that suits none of the Linears, or another than that of a
            Linear that has become something else (sharded, parametrised); nothing is changed.
    """
    if precision is not None:
        precision = choice("backbone_precision", precision, PRECISIONS)
    able, reasons, fixed = [], [], []
    for block in blocks.children():
        for name, linear, reason in _linears(block):
            if type(linear) in LINEARS.values() and (precision is None or reason is None):
                able.append(linear)
            elif isinstance(linear, Fp8Linear) and _own_precision(linear) != precision:
                fixed.append(f"{name} is a {type(linear).__name__} already")
            else:
                reasons.append(f"{name}: {reason}")
    if fixed:
        raise ValueError(listing("backbone_precision can't be changed any more", dict.fromkeys(fixed)))
    if precision is not None and not able:
        summary = f"backbone_precision={precision!r} suits no Linear of this backbone"
        raise ValueError(listing(summary, dict.fromkeys(reasons)))
    for linear in able:
        linear.__class__ = LINEARS[precision]


def precision_report(block: nn.Module) -> str:
    """Say which Linears of ``block`` compute in FP8, and why others don't; nothing where none does."""
    names, others = [], []
    for name, linear, reason in _linears(block):
        if isinstance(linear, Fp8Linear):
            names.append(name)
        else:
            others.append(f"{name} not: {reason or 'it came later'}")
    return "; ".join([f"FP8 in {', '.join(names)}", *others]) if names else ""


def _own_precision(linear: nn.Module) -> str | None:
    return next((name for name, cls in reversed(LINEARS.items()) if isinstance(linear, cls)), None)


def _linears(block: Any) -> Iterator[tuple[str, nn.Linear, str | None]]:
    """Yield names of Linears of a block, these, and why their products can't be in FP8; None if they can.

    Those that learn, such as LoRA's, are left out: they keep their precision.
    """
    kind = kind_reason(block)
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module.weight.requires_grad and not isinstance(module, Fp8Linear):
            continue
        reason = None
        if kind is not None:
            reason = f"the block is called as it is, {kind}"
        elif type(module) not in LINEARS.values():
            reason = f"it is a {type(module).__name__}"
        elif name == "attn.qkv" and getattr(block.attn, "q_bias", None) is not None:
            reason = "timm's attention reads its weight"
        elif module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            sizes = f"{module.in_features} and {module.out_features}"
            reason = f"its sizes, {sizes}, are not both multiples of {MULTIPLE}"
        yield name, module, reason
