"""What a kind of prompts is, the register of kinds, and the container of one model's prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import KINDS, PromptConfig
from ..modules import has_global_hooks, has_hooks, is_ordinary, is_plain, weights_of
from .plain import KeysValues, PlainPrompts

__all__ = [
    "BlockPrompts",
    "CalledSource",
    "Geometry",
    "Masks",
    "NoPrompts",
    "Prompts",
    "affine",
    "call",
    "draw_mask",
    "layer_norm",
    "register_kind",
    "stored_shape",
]


@dataclass(frozen=True)
class Geometry:
    """What prompts have to suit.

    Attributes:
        dim: C, channels of the backbone's tokens.
        depth: number of blocks of the backbone.
        grid: (H, W), patches along each side of the image.
        patch_size: (height, width) of a patch in pixels.
        blocks: the backbone's blocks, for kinds that have to know them.
    """

    dim: int
    depth: int
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    blocks: nn.Sequential | None = None


@dataclass(frozen=True)
class Masks:
    """Factors 0 or 1 / (1 - rate) of one block's dropouts; None where nothing is dropped.

    Attributes:
        table: (B, P, C), on a learned table.
        channels: (B, 1, C), on whole (image, channel) planes after the convolution (Dropout2d).
        features: (B, P, r), on the projector's r features.
    """

    table: Tensor | None = None
    channels: Tensor | None = None
    features: Tensor | None = None

    def take(self, rows: Tensor) -> Masks:
        """Return the masks of the images ``rows``."""
        masks = (self.table, self.channels, self.features)
        return Masks(*(None if mask is None else mask[rows] for mask in masks))


class BlockPrompts(nn.Module):
    """The prompts of one block: the base class of every kind.

    A subclass makes its parameters in ``__init__`` and computes the prompts in ``forward``; all else has a
    default. ``register_kind`` gives it a name.

    Args:
        config: the options.
        num_prompts: P, prompts of this block.
        geometry: what they have to suit.

    Attributes:
        travels: the prompt tokens stay in the sequence of all later blocks; otherwise they are thrown away
            after their block.
        token_table: name of the parameter (P, C) whose rows are prompt tokens, which data may initialise.
        Options: a dataclass of the options that PromptConfig does not have; ``kind_options`` are its
            arguments, and ``self.options`` is the instance.
        method, title: the method's name on the command line and in tables.
    """

    travels: ClassVar[bool] = False
    token_table: ClassVar[str | None] = None
    Options: ClassVar[type | None] = None
    method: ClassVar[str] = ""
    title: ClassVar[str] = ""

    def __init__(self, config: PromptConfig, num_prompts: int, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        self.num_prompts = num_prompts
        self.dim = geometry.dim
        self.options = None if self.Options is None else self.Options(**config.kind_options)

    @classmethod
    def check_config(cls, config: PromptConfig) -> None:
        """Raise TypeError or ValueError for options that contradict each other."""
        if cls.Options is not None:
            cls.Options(**config.kind_options)
        elif config.kind_options:
            raise TypeError(
                f"kind_options must be empty for kind {config.kind!r}, got {dict(config.kind_options)}"
            )

    @classmethod
    def make(cls, config: PromptConfig, index: int, num_prompts: int, geometry: Geometry) -> BlockPrompts:
        """Return the ``num_prompts`` > 0 prompts of block ``index``; the default is of this class."""
        return cls(config, num_prompts, geometry)

    @classmethod
    def make_shared(cls, config: PromptConfig, geometry: Geometry) -> dict[str, nn.Module | None]:
        """Return the modules that all blocks of this class share, by the names ``forward`` has for them."""
        return {}

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""

    def draw_masks(self, batch: int, **options: Any) -> Any:
        """Return masks for ``batch`` images with the dtype and device in ``options``.

        ``forward`` is given them; it draws no random numbers itself, so that every backend sees the same.
        """
        return None

    def forward(self, patches: Tensor, masks: Any = None, **shared: Any) -> Tensor | KeysValues | None:
        """Return the prompts of this block, differentiable in everything.

        Args:
            patches: the patch tokens (B, N, C) that enter the block.
            masks: of ``draw_masks``; None drops nothing.
            **shared: calls of the modules of ``make_shared``, by name.

        Returns:
            Prompt tokens (B, P, C), (1, P, C) if they are the same for every image; or KeysValues.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward()")

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError if the prompts can't be made for ``grid``, (H, W) patches."""

    def resize(self, grid: tuple[int, int]) -> None:
        """Make the prompts for ``grid``, (H, W) patches; the default depends on no grid."""

    @classmethod
    def sources(
        cls, prompts: Prompts, masks: list[Any], dtype: torch.dtype, backend: str | None
    ) -> list[Any]:
        """Return where the rewritten pass gets the prompts of each block; None for a block without prompts.

        Args:
            prompts: all prompts of the model.
            masks: of the blocks that are run.
            dtype: of the tokens.
            backend: of the ops.
        """
        return [
            None if isinstance(block, NoPrompts) else CalledSource(prompts, index, block_masks)
            for index, (block, block_masks) in enumerate(zip(prompts.blocks, masks, strict=False))
        ]

    @classmethod
    def plain_blocks(cls, prompts: Prompts, dtype: torch.dtype) -> list[PlainPrompts | None]:
        """Return the prompts of each block as plain tensors; None for one that can't be told by them.

        Args:
            prompts: all prompts of the model.
            dtype: of the matrices, at least.
        """
        return [
            block.plain() if "plain" in type(block).__dict__ and not has_hooks(block) else None
            for block in prompts.blocks
        ]

    def plain(self) -> PlainPrompts | None:
        """Return the prompts as plain tensors, by which adapters share a batch; None where they can't be.

        A subclass does not inherit this method: it may make its prompts otherwise. Without it, a batch for
        several adapters is computed adapter by adapter.
        """
        return None

    def rate(self, rate: float) -> float:
        """Return the rate of a dropout, 0 in eval mode."""
        return rate if self.training else 0.0

    def report(self, **shared: Any) -> str:
        """Return how the rewritten pass makes the prompts, if that is worth a word."""
        return ""

    def official_names(self, number: int) -> dict[str, str | tuple[str, int]]:
        """Return the public implementation's names of the tensors, by their own names.

        A tensor may be a row of a public one: (name, row). A subclass does not inherit these names, because
        its tensors may mean something else.

        Args:
            number: how many blocks of the same class come before this one.
        """
        return {}


class NoPrompts(BlockPrompts):
    """The place of a block without prompts."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, patches: Tensor, masks: Any = None, **shared: Any) -> None:
        """Return None."""

    def plain(self) -> PlainPrompts:
        """Return no prompts."""
        return PlainPrompts(0)


Kind = TypeVar("Kind", bound=type[BlockPrompts])


def register_kind(
    name: str, *, method: str | None = None, title: str | None = None
) -> Callable[[Kind], Kind]:
    """Return a decorator that makes a class of BlockPrompts the prompts of ``PromptConfig(kind=name)``.

    Args:
        name: of the kind.
        method: of the method on the command line; None for ``name``.
        title: of the method in tables; None for ``name``.

    Raises:
        TypeError: the class is no subclass of BlockPrompts.
        ValueError: another class has that name.
    """

    def register(cls: Kind) -> Kind:
        if not (isinstance(cls, type) and issubclass(cls, BlockPrompts)):
            raise TypeError(f"a kind must be a subclass of BlockPrompts, got {cls!r}")
        known = KINDS.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"kind {name!r} is {known.__module__}.{known.__qualname__}; choose another name")
        cls.method, cls.title = method or name, title or name
        KINDS[name] = cls
        for known_name in sorted(KINDS):
            KINDS[known_name] = KINDS.pop(known_name)
        return cls

    return register


class Prompts(nn.Module):
    """All learnable parameters of the prompts of one model.

    ``blocks[i]`` belongs to block i of the backbone; after the last block with prompts there are no entries.
    Modules that all blocks share are attributes: ``projector`` of adaptive prompts.

    Args:
        config: the options.
        geometry: what the prompts have to suit.

    Raises:
        ValueError: options that don't suit the geometry.
        NotImplementedError: a backbone that can't take prompts of this kind.
    """

    blocks: Any  # an nn.ModuleList of BlockPrompts

    def __init__(self, config: PromptConfig, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        kind, blocks = KINDS[config.kind], []
        for index, count in enumerate(config.num_prompts_by_block(geometry.depth)):
            blocks.append(kind.make(config, index, count, geometry) if count else NoPrompts())
        while blocks and isinstance(blocks[-1], NoPrompts):
            blocks.pop()
        self.blocks = nn.ModuleList(blocks)
        shared = kind.make_shared(config, geometry) if self._has_own_blocks() else {}
        self._shared_names = tuple(shared)
        for name, module in shared.items():
            setattr(self, name, module)

    def _has_own_blocks(self) -> bool:
        return any(isinstance(block, KINDS[self.config.kind]) for block in self.blocks)

    @property
    def shared(self) -> dict[str, Any]:
        """The modules that all blocks share, by name."""
        named = ((name, getattr(self, name)) for name in self._shared_names)
        return {name: module for name, module in named if module is not None}

    def reset_parameters(self) -> None:
        """Initialise everything again, as the papers do."""
        for part in (*self.blocks, *self.shared.values()):
            part.reset_parameters()

    def compute(self, index: int, patches: Tensor, masks: Any = None) -> Tensor | KeysValues | None:
        """Return the prompts of block ``index``, as its BlockPrompts gives them; None without prompts.

        Args:
            index: of the block.
            patches: the patch tokens (B, N, C) before that block.
            masks: of its dropouts; None drops nothing.
        """
        if index >= len(self.blocks):
            return None
        # Not the modules themselves: hooks on the block might move what they find among its arguments.
        shared = {name: partial(module) for name, module in self.shared.items()}
        return self.blocks[index](patches, masks, **shared)

    def travels(self, index: int, depth: int) -> bool:
        """Whether the prompt tokens of block ``index`` of ``depth`` stay in the sequence after it."""
        return self.blocks[index].travels or (self.config.pool_prompts and index == depth - 1)

    def draw_masks(self, batch: int, **options: Any) -> list[Any]:
        """Return masks of each entry of ``blocks``, all at once: every backend sees the same numbers."""
        return [block.draw_masks(batch, **options) for block in self.blocks]

    def sources(self, masks: list[Any], dtype: torch.dtype, backend: str | None) -> list[Any]:
        """Return what the kind's ``sources`` gives."""
        return KINDS[self.config.kind].sources(self, masks, dtype, backend)

    def plain(self, dtype: torch.dtype) -> list[PlainPrompts] | None:
        """Return the prompts of each block as plain tensors, None if some can't be told by them.

        Args:
            dtype: of the matrices, at least.
        """
        observed = has_hooks(self) or has_global_hooks()
        if observed or not all(map(is_ordinary, self.parameters())):
            return None
        if self.config.pool_prompts or any(block.travels for block in self.blocks):
            return None
        blocks = KINDS[self.config.kind].plain_blocks(self, dtype)
        known = [block for block in blocks if block is not None]
        return known if len(known) == len(blocks) else None

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError if the prompts can't be made for ``grid``, (H, W) patches."""
        for block in self.blocks:
            block.check_grid(grid)

    def resize(self, grid: tuple[int, int]) -> None:
        """Make the prompts for another ``grid``, (H, W) patches."""
        for block in self.blocks:
            block.resize(grid)

    def prune(self, depth: int) -> None:
        """Drop the prompts of all blocks but the first ``depth``."""
        self.blocks = self.blocks[:depth]
        if not self._has_own_blocks():
            for name in self._shared_names:
                setattr(self, name, None)
        if not isinstance(self.config.num_prompts, int):
            self.config = replace(self.config, num_prompts=self.config.num_prompts[:depth])

    def official_names(self) -> dict[str, str | tuple[str, int]]:
        """Return the public implementation's names of the tensors, by their own; some may have none."""
        names: dict[str, str | tuple[str, int]] = {}
        counts: dict[type, int] = {}
        for index, block in enumerate(self.blocks):
            number = counts.get(type(block), 0)
            counts[type(block)] = number + 1
            if "official_names" in vars(type(block)):
                own = block.official_names(number)
                names |= {f"blocks.{index}.{name}": public for name, public in own.items()}
        for prefix, module in self.shared.items():
            if hasattr(module, "official_names"):
                names |= {f"{prefix}.{name}": public for name, public in module.official_names().items()}
        return names

    def forward(self, images: Tensor, within: Callable[[Prompts, Tensor], Any]) -> Any:
        """Return ``within(self, images)``: whatever uses these parameters runs within this module's call.

        So that what surrounds the call (hooks that gather, move or compute parameters) surrounds every use.
        """
        return within(self, images)


@dataclass(frozen=True)
class CalledSource:
    """Prompts made by calls of their modules.

    Another source may add ``pool(tokens, num_prefix, norm, branch=, layer_scale=)``, which returns the tokens
    with the branch added, and these and the prompts normalised by ``norm``.
    """

    prompts: Prompts
    index: int
    masks: Any

    def make(self, tokens: Tensor, num_prefix: int) -> Tensor | KeysValues:
        """Return the prompts for ``tokens`` (B, S + N, C), S = ``num_prefix``."""
        made = self.prompts.compute(self.index, tokens[:, num_prefix:], self.masks)
        assert made is not None
        return made


# ---- for kinds


def draw_mask(module: nn.Module, rate: float, *shape: int, **options: Any) -> Tensor | None:
    """Return factors 0 or 1 / (1 - rate) of this shape; None in eval mode or at rate 0."""
    if rate == 0 or not module.training:
        return None
    return torch.dropout(torch.ones(shape, **options), rate, train=True)


def call(module: Any, x: Tensor) -> Tensor:
    """Return ``module(x)`` in x's dtype; where the module is not plain, in that of its weights."""
    observed = has_global_hooks()
    if not observed and is_plain(module, nn.Linear):
        weight, bias = _cast(module, x.dtype)
        return F.linear(x, weight, bias)
    if not observed and is_plain(module, nn.LayerNorm):
        return layer_norm(x, module)
    weights = weights_of(module, most=1)
    return module(x.to(weights[0].dtype if weights else x.dtype)).to(x.dtype)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Return x normalised by a plain ``norm``, in x's dtype."""
    return F.layer_norm(x, norm.normalized_shape, *_cast(norm, x.dtype), norm.eps)


def affine(norm: nn.LayerNorm | None, otherwise: float | None) -> dict[str, Any]:
    """Return the block's LayerNorm as keywords of the ops; ``otherwise`` is the eps without one."""
    if norm is None:
        return {"eps": otherwise}
    return {"eps": norm.eps, "norm_weight": norm.weight, "norm_bias": norm.bias}


def _cast(module: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    weight, bias = (None if t is None else t.to(dtype) for t in (module.weight, module.bias))
    return weight, bias


def stored_shape(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...] | None:
    """Return the shape of a tensor, None if it is missing or has another number of dimensions."""
    return tuple(state[name].shape) if name in state and state[name].ndim == ndim else None
