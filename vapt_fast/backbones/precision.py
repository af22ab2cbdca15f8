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
    classes = {cls: name for name, cls in LINEARS.items() if name is not None}
    found = (name for module in blocks.modules() for cls, name in classes.items() if type(module) is cls)
    return next(found, None)


def set_precision(blocks: nn.Module, precision: str | None) -> None:
    """Compute the products of the Linears in ``blocks`` in ``precision``.

    Args:
        blocks: those of a backbone.
        precision: one of PRECISIONS; None for that of the weights.

    Raises:
        TypeError, ValueError: not a precision, or one that suits none of the Linears; nothing is changed.
    """
    if precision is not None:
        precision = choice("backbone_precision", precision, PRECISIONS)
    linears = [found for block in blocks.children() for found in _linears(block)]
    able = [linear for _, linear, reason in linears if reason is None]
    if precision is not None and not able:
        reasons = dict.fromkeys(f"{name}: {reason}" for name, _, reason in linears)
        raise ValueError(
            listing(f"backbone_precision={precision!r} suits no Linear of this backbone", reasons)
        )
    for linear in able:
        linear.__class__ = LINEARS[precision]


def precision_report(block: nn.Module) -> str:
    """Say which Linears of ``block`` compute in FP8, and why others don't; nothing where none does."""
    linears = list(_linears(block))
    names = [name for name, linear, _ in linears if isinstance(linear, Fp8Linear)]
    if not names:
        return ""
    others = [
        f"{name} not: {reason}" for name, linear, reason in linears if not isinstance(linear, Fp8Linear)
    ]
    return "; ".join([f"FP8 in {', '.join(names)}", *others])


def _linears(block: Any) -> Iterator[tuple[str, nn.Linear, str | None]]:
    """Yield the Linears of a block, their names, and why their products can't be in another precision."""
    kind = kind_reason(block)
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
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
