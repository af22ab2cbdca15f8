"""Initialise learned tables by the tokens of real images, as SPT does (Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backbones
from .arguments import integer
from .modules import call_within, evaluating, weights_of

if TYPE_CHECKING:
    from .model import AdaptiveViT

__all__ = ["init_from_data"]

TOKENS_PER_IMAGE = 16
NUM_STEPS = 20


def init_from_data(
    model: AdaptiveViT, loader: Iterable[Any], *, num_images: int = 512, seed: int = 0
) -> None:
    """Set each learned table of prompts to the k-means centres of the patch tokens that enter its block.

    The tokens are those of the backbone without prompts, 16 an image, drawn at random. Adaptive prompts that
    are added to a table start at exactly the centres.

    Args:
        model: with tables: ``"deep"``, ``"shallow"``, the static blocks of ``"adaptive"``, ``add_table``.
        loader: gives batches of images (B, in_chans, height, width), or tuples that begin with one.
        num_images: how many to take at most.
        seed: of the choice of tokens and first centres; the same images then give the same tables.

    Raises:
        TypeError: a batch that is neither a tensor nor begins with one.
        ValueError: no tables, or computed ones (parametrised, pruned), no or too few images, or tokens that
            are not finite; nothing is changed.
    """
    num_images = integer("num_images", num_images, minimum=1)
    generator = torch.Generator().manual_seed(integer("seed", seed))
    named = ((i, block, block.token_table) for i, block in enumerate(model.prompts.blocks))
    tables = {i: getattr(block, name) for i, block, name in named if name is not None}
    tables = {i: table for i, table in tables.items() if table is not None}
    if not tables:
        raise ValueError(
            f"kind {model.config.kind!r} with these options has no tables of prompt tokens; expected "
            "'deep', 'shallow', or 'adaptive' with static_depth > 0 or add_table=True"
        )
    computed = sorted(i for i, table in tables.items() if not isinstance(table, nn.Parameter))
    if computed:
        raise ValueError(
            f"the tables of blocks {computed} must be parameters, got computed ones (parametrised, pruned): "
            "initialise them before that"
        )
    with evaluating(model):
        tokens = _sample(model, loader, sorted(tables), num_images, generator)
    centres = {i: _k_means(tokens[i], len(table), generator) for i, table in tables.items()}
    with torch.no_grad():
        for i, table in tables.items():
            table.copy_(centres[i])


@torch.no_grad()
def _sample(
    model: AdaptiveViT, loader: Iterable[Any], indices: list[int], num_images: int, generator: torch.Generator
) -> dict[int, Tensor]:
    """Return some of the patch tokens (n, C) that enter each of these blocks."""
    (weight,) = weights_of(model.backbone, most=1)
    found: dict[int, list[Tensor]] = {i: [] for i in indices}
    remaining = num_images
    for batch in loader:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor):
            raise TypeError(
                f"loader must give tensors of images, or tuples that begin with one, got "
                f"{type(images).__name__}"
            )
        images = images[:remaining].to(weight.device)
        model.check_images(images)
        entering = call_within(model.backbone, lambda _, x: _entering(model.backbone, x, indices), images)
        for i, patches in entering.items():
            rows = patches.flatten(0, 1)
            if i == indices[0]:
                order = torch.randperm(len(rows), generator=generator, device="cpu")
                chosen = order[: TOKENS_PER_IMAGE * len(images)]
            found[i].append(rows[chosen.to(rows.device)])
        remaining -= len(images)
        if remaining == 0:
            break
    if remaining == num_images:
        raise ValueError("loader must give at least one image, it gave none")
    return {i: torch.cat(parts) for i, parts in found.items()}


def _entering(backbone: Any, images: Tensor, indices: list[int]) -> dict[int, Tensor]:
    """Return the patch tokens (B, N, C) before each of these blocks, without prompts."""
    tokens, positions = backbones.embed(backbone, images)
    found = {}

    def run_blocks(blocks: nn.Module, tokens: Tensor) -> None:
        for index in range(indices[-1] + 1):
            if index in indices:
                found[index] = tokens[:, backbone.num_prefix_tokens :]
            if index < indices[-1]:
                tokens = backbones.call_block(backbone, index, tokens, positions)

    call_within(backbone.blocks, run_blocks, tokens)
    return found


def _k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` centres (count, C) of ``points`` (n, C), by Lloyd's algorithm."""
    if len(points) < count:
        raise ValueError(
            f"loader must give images for at least {count} tokens, one a prompt, got {len(points)}"
        )
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if not points.isfinite().all():
        raise ValueError("loader must give images whose tokens are finite, got infinities or NaN")
    first = torch.randperm(len(points), generator=generator, device="cpu")[:count]
    centres = points[first.to(points.device)]
    for _ in range(NUM_STEPS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        members = nn.functional.one_hot(nearest, count).to(points.dtype)  # sums in a fixed order
        sizes = members.sum(dim=0).unsqueeze(1)
        centres = torch.where(sizes > 0, members.t() @ points / sizes.clamp(min=1), centres)
    return centres
