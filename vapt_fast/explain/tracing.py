"""What enters each block of a model: the tokens, and the prompts that were made from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..backbones import Positions
from ..modules import evaluating
from ..prompts import KeysValues

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = ["BlockInputs", "block_index", "prompt_values", "trace"]


class BlockInputs(NamedTuple):
    """What enters one block, before its first norm.

    Attributes:
        tokens: (B, S + Q + N, C), the prefix tokens, then Q prompts, then the patch tokens.
        positions: where they are; ``positions.num_extra`` is Q.
        prompts: the block's own prompts, (B or 1, P, C) or KeysValues; None if it has none. KeysValues are
            not among the tokens; prompts of earlier blocks that travel are.
    """

    tokens: Tensor
    positions: Positions
    prompts: Tensor | KeysValues | None


def trace(model: AdaptiveViT, images: Tensor) -> list[BlockInputs]:
    """Run the literal method in eval mode, and return what enters each block.

    Args:
        model: any.
        images: (B, in_chans, height, width), as the model takes them.

    Returns:
        An entry for each block, differentiable as the logits are.

    Raises:
        TypeError, ValueError: images that the model can't take.
    """
    model.check_images(images)
    found: list[BlockInputs] = []

    def observe(
        index: int, tokens: Tensor, positions: Positions, prompts: Tensor | KeysValues | None
    ) -> None:
        found.append(BlockInputs(tokens, positions, prompts))

    with evaluating(model):
        model._run(images, lambda *_: None, "reference", observe=observe)
    return found


def prompt_values(model: AdaptiveViT, images: Tensor) -> list[Tensor | KeysValues | None]:
    """Return the prompts of each block for these images, without dropout, as the literal method makes them.

    Args:
        model: any.
        images: (B, in_chans, height, width), as the model takes them.

    Returns:
        An entry for each block: prompt tokens (B, P, C), or (1, P, C) if they are the same for every image;
        KeysValues of kind "kv"; None for a block without prompts of its own. They are as they were made:
        before the block's norm, at least in the dtype of the learned weights. Differentiable in everything
        that requires a gradient; call it under ``torch.no_grad()`` to keep nothing for that.

    Raises:
        TypeError, ValueError: images that the model can't take.
    """
    return [inputs.prompts for inputs in trace(model, images)]


def block_index(model: AdaptiveViT, block: int) -> int:
    """Return the number of a block, counted from the end if it is negative.

    Raises:
        ValueError: there is no such block.
    """
    depth = len(model.backbone.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"block must be in [-{depth}, {depth}), the model has {depth} blocks, got {block}")
    return block % depth
