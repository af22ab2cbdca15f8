"""PromptConfig: every option of the prompts, validated when it is made."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .activations import ACTIVATIONS
from .arguments import boolean, integer, real

__all__ = ["KINDS", "PromptConfig", "explain_unexpected", "split_options"]

KINDS = ("adaptive", "deep", "shallow")

METHOD_KINDS = {"vapt": "adaptive", "vpt-deep": "deep", "vpt-shallow": "shallow"}
"""The kind of prompts of each method, by its name on the command line."""


@dataclass(frozen=True)
class PromptConfig:
    """How prompts are made and where they go.

    Attributes:
        kind: ``"adaptive"`` computes the prompts of each block from the image's own patch tokens (VAPT,
            arXiv 2501.18936, section 4); ``"deep"`` learns a table for every block (VPT-deep, Jia et al.
            2022); ``"shallow"`` learns one table, placed before block 0, whose tokens then travel through
            all blocks (VPT-shallow).
        num_prompts: P, prompts a block. 0 makes a linear probe: only the head is trained.
        static_depth: number of first blocks whose prompts are a learned table (``"adaptive"`` only).
        conv_kernel: K, side of the K x K convolution over the patch grid; None for no convolution.
        conv_padding: zero padding of that convolution on each side, in patches, smaller than K.
        conv_shared: True for one kernel shared by all channels, False for one kernel a channel (depthwise).
        projector_dim: r, width of the feature projector's bottleneck; None for no projector.
        projector_shared: True for one projector for all blocks, False for one a block.
        projector_activation: ``"relu"``, ``"gelu"`` (exact), ``"sigmoid"``, ``"softmax"`` (over the r
            features) or ``"identity"``.
        projector_dropout: dropout rate on the r features.
        projector_scale_learnable: learn the factor of the projector's branch (it starts at 1).
        prompt_dropout: dropout rate on the static tables.
        channel_dropout: rate at which whole (image, channel) planes are dropped after the convolution.
        pool_prompts: average the prompts of the last block together with the patch tokens, as the public
            MAE variant does. Needs a backbone with average pooling.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range; the message names the option, what was given and what is expected.
    """

    kind: str = "adaptive"
    num_prompts: int = 10
    static_depth: int = 1
    conv_kernel: int | None = 2
    conv_padding: int = 0
    conv_shared: bool = True
    projector_dim: int | None = 8
    projector_shared: bool = True
    projector_activation: str = "relu"
    projector_dropout: float = 0.1
    projector_scale_learnable: bool = False
    prompt_dropout: float = 0.0
    channel_dropout: float = 0.1
    pool_prompts: bool = False

    def __post_init__(self) -> None:
        if self.kind in tuple(METHOD_KINDS):
            raise ValueError(
                f"kind must be one of {KINDS}, got {self.kind!r}; that method's kind is "
                f"{METHOD_KINDS[self.kind]!r}"
            )
        _check_choice("kind", self.kind, KINDS)
        self._set("num_prompts", integer("num_prompts", self.num_prompts, minimum=0))
        self._set("static_depth", integer("static_depth", self.static_depth, minimum=0))
        if self.conv_kernel is not None:
            self._set("conv_kernel", integer("conv_kernel", self.conv_kernel, minimum=1))
        self._set("conv_padding", integer("conv_padding", self.conv_padding, minimum=0))
        if self.conv_padding and (self.conv_kernel is None or self.conv_padding >= self.conv_kernel):
            raise ValueError(
                f"conv_padding must be smaller than conv_kernel ({self.conv_kernel}), got {self.conv_padding}"
            )
        if self.projector_dim is not None:
            self._set("projector_dim", integer("projector_dim", self.projector_dim, minimum=1))
        _check_choice("projector_activation", self.projector_activation, tuple(ACTIVATIONS))
        for name in ("projector_dropout", "prompt_dropout", "channel_dropout"):
            self._set(name, _rate(name, getattr(self, name)))
        for name in ("conv_shared", "projector_shared", "projector_scale_learnable", "pool_prompts"):
            self._set(name, boolean(name, getattr(self, name)))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> PromptConfig:
        """The config with these options; unknown names are a TypeError that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"unknown prompt options {unknown}, expected some of {known}")
        return cls(**options)

    def as_keywords(self) -> dict[str, Any]:
        """The options as keywords for timm.create_model, with 0 for None, which it would drop."""
        return {name: 0 if value is None else value for name, value in asdict(self).items()}

    def num_static_blocks(self, depth: int) -> int:
        """How many of ``depth`` blocks, from block 0 on, get their prompts from a learned table."""
        if self.num_prompts == 0:
            return 0
        return {"adaptive": min(self.static_depth, depth), "deep": depth, "shallow": 1}[self.kind]

    def num_adaptive_blocks(self, depth: int) -> int:
        """How many of ``depth`` blocks, the last ones, compute their prompts from the image."""
        if self.num_prompts == 0 or self.kind != "adaptive":
            return 0
        return depth - self.num_static_blocks(depth)

    def conv_output(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width, in patches, of the grid after the convolution.

        Raises:
            ValueError: the convolution leaves nothing of a grid this small.
        """
        if self.conv_kernel is None:
            return grid
        height, width = (side + 2 * self.conv_padding - self.conv_kernel + 1 for side in grid)
        if height < 1 or width < 1:
            raise ValueError(
                f"conv_kernel={self.conv_kernel} with conv_padding={self.conv_padding} does not fit the "
                f"{grid[0]}x{grid[1]} patch grid; use a smaller kernel, more padding or a larger image"
            )
        return height, width


def split_options(
    prompts: PromptConfig | None, options: Mapping[str, Any]
) -> tuple[PromptConfig, dict[str, Any]]:
    """The options of the prompts, and all others.

    timm.create_model drops keywords that are None, so 0 says it for the two options where None matters:
    ``conv_kernel=0`` means no convolution and ``projector_dim=0`` no projector.

    Args:
        prompts: all options of the prompts, None if ``options`` has them.
        options: keywords of any sort.

    Raises:
        TypeError: ``prompts`` is not a PromptConfig, or there are options of the prompts beside it.
        TypeError, ValueError: as PromptConfig raises.
    """
    names = {field.name for field in fields(PromptConfig)}
    own = {name: value for name, value in options.items() if name in names}
    if prompts is None:
        own |= {name: None for name in ("conv_kernel", "projector_dim") if own.get(name) == 0}
        prompts = PromptConfig(**own)
    elif not isinstance(prompts, PromptConfig):
        raise TypeError(f"prompts must be a PromptConfig, got {type(prompts).__name__}")
    elif own:
        raise TypeError(
            f"options of the prompts must be given as keywords or as prompts=PromptConfig(...), got both: "
            f"{sorted(own)} beside prompts"
        )
    return prompts, {name: value for name, value in options.items() if name not in names}


# Options of timm's that people mean when they mistype one.
_TIMM_OPTIONS = ("num_classes", "img_size", "in_chans", "global_pool", "drop_rate", "patch_size", "embed_dim")


def explain_unexpected(error: TypeError, options: Collection[str], backbone: str) -> TypeError | None:
    """What is wrong, if ``error`` is timm's about one of ``options`` that it does not know; else None."""
    match = re.search(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'", str(error))
    if match is None or match[1] not in options:
        return None
    name, own = match[1], [field.name for field in fields(PromptConfig)]
    close = difflib.get_close_matches(name, [*own, "backend", "pretrained", *_TIMM_OPTIONS], n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return TypeError(
        f"{name!r} is an option neither of the prompts nor of timm's {backbone}{meant} The prompts' options "
        f"are {own}"
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, one of {choices}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _rate(name: str, value: object) -> float:
    rate = real(name, value)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {rate}")
    return rate
