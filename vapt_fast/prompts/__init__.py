"""The prompts: what is learned, how it starts, its dropouts, and the method's literal formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..config import PromptConfig
from ..modules import has_global_hooks, is_plain, remember_forward, weights_of

__all__ = ["AdaptivePrompts", "Masks", "Projector", "Prompts", "StaticPrompts"]

PROMPT_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Masks:
    """Factors 0 or 1 / (1 - rate) of one block's dropouts; None where nothing is dropped.

    Attributes:
        table: (B, P, C), on the learned table of a static block.
        channels: (B, 1, C), on whole (image, channel) planes after the convolution (Dropout2d).
        features: (B, P, r), on the projector's r features.
    """

    table: Tensor | None = None
    channels: Tensor | None = None
    features: Tensor | None = None


class StaticPrompts(nn.Module):
    """A learned table of prompts, the same for every image: ``table`` of (P, C).

    Starts uniform in (-v, v), v = sqrt(6 / (3 * patch_h * patch_w + C)) (VPT, Jia et al. 2022, section 3).
    """

    def __init__(self, config: PromptConfig, dim: int, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.dropout = config.prompt_dropout
        self.table = nn.Parameter(torch.empty(config.num_prompts, dim))
        # The 3 is the number of input channels, whatever the backbone has: so the papers' code defines it.
        self.bound = math.sqrt(6 / (3 * patch_size[0] * patch_size[1] + dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.uniform_(self.table, -self.bound, self.bound)

    def draw_masks(self, batch: int, **options: Any) -> Masks:
        """Masks for ``batch`` images with the dtype and device in ``options``; none in eval mode."""
        return Masks(table=_mask(self, self.dropout, batch, *self.table.shape, **options))

    def forward(self, masks: Masks | None = None) -> Tensor:
        """The prompts (1, P, C), or (B, P, C) where dropout makes them differ by image."""
        prompts = self.table.unsqueeze(0).clone()  # FSDP frees what it gathered when this call ends
        return prompts if masks is None or masks.table is None else prompts * masks.table


class Projector(nn.Module):
    """The feature projector, a bottleneck C -> r -> C without biases: ``down``, ``up`` and a ``scale``.

    ``scale`` is a parameter of (1,) where ``projector_scale_learnable``, else the number 1.0.
    """

    def __init__(self, config: PromptConfig, dim: int) -> None:
        super().__init__()
        self.activation = config.projector_activation
        self.down = nn.Linear(dim, config.projector_dim, bias=False)
        self.up = nn.Linear(config.projector_dim, dim, bias=False)
        self.scale = nn.Parameter(torch.empty(1)) if config.projector_scale_learnable else 1.0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``down`` and ``up`` anew, and set a learnable scale to 1."""
        self.down.reset_parameters()
        self.up.reset_parameters()
        if isinstance(self.scale, nn.Parameter):
            nn.init.ones_(self.scale)

    def forward(self, prompts: Tensor, mask: Tensor | None = None) -> Tensor:
        """prompts + scale * up(mask * activation(down(prompts))), (B, P, C), in the prompts' dtype."""
        with torch.autocast(prompts.device.type, enabled=False):
            features = ACTIVATIONS[self.activation](_call(self.down, prompts))
            if mask is not None:
                features = features * mask
            return prompts + self.scale * _call(self.up, features)


class AdaptivePrompts(nn.Module):
    """Prompts computed from the patch tokens of one block (VAPT, arXiv 2501.18936, section 4.1).

    ``norm``: LayerNorm over C, eps 1e-5. ``kernel``: (1, 1, K, K) shared by all channels or (C, 1, K, K)
    depthwise, None without convolution; starts N(0, 1). ``token_projection``: Linear(H'W' -> P) with bias,
    starts at zero, so that the first prompts are exactly 0. ``projector``: this block's own, or None where
    there is none or one is shared by all blocks.

    Args:
        config: the options.
        dim: C.
        grid: (H, W), patches along each side of the image.
    """

    def __init__(self, config: PromptConfig, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        self.grid = grid
        self.norm = nn.LayerNorm(dim, eps=PROMPT_NORM_EPS)
        size = config.conv_kernel
        self.kernel = None
        if size is not None:
            self.kernel = nn.Parameter(torch.empty(1 if config.conv_shared else dim, 1, size, size))
        self.token_projection = nn.Linear(math.prod(config.conv_output(grid)), config.num_prompts)
        own_projector = config.projector_dim is not None and not config.projector_shared
        self.projector = Projector(config, dim) if own_projector else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew: a random kernel, and a token projection of zeros."""
        self.norm.reset_parameters()
        if self.kernel is not None:
            nn.init.normal_(self.kernel)
        nn.init.zeros_(self.token_projection.weight)
        nn.init.zeros_(self.token_projection.bias)
        if self.projector is not None:
            self.projector.reset_parameters()

    def draw_masks(self, batch: int, **options: Any) -> Masks:
        """Masks for ``batch`` images with the dtype and device in ``options``; none in eval mode."""
        config = self.config
        channels = _mask(self, config.channel_dropout, batch, 1, self.dim, **options)
        features = None
        if config.projector_dim is not None:
            shape = batch, config.num_prompts, config.projector_dim
            features = _mask(self, config.projector_dropout, *shape, **options)
        return Masks(channels=channels, features=features)

    def forward(self, patches: Tensor, masks: Masks | None = None) -> Tensor:
        """The prompts (B, P, C) of patch tokens (B, N, C), N = H * W, word for word as in the paper.

        LayerNorm, convolution over the grid, channel dropout, Linear over the positions, and the feature
        projector if this block has its own; in float32 (float64 where anything is), also under autocast,
        because the first prompts are exactly 0 and the next LayerNorm multiplies their errors by 1000.
        Differentiable in everything.
        """
        masks = Masks() if masks is None else masks
        dtype = torch.promote_types(patches.dtype, torch.float32)
        for weight in weights_of(self):
            dtype = torch.promote_types(dtype, weight.dtype)
        with torch.autocast(patches.device.type, enabled=False):
            z = _call(self.norm, patches.to(dtype))
            batch, _, dim = z.shape
            z = z.transpose(1, 2).reshape(batch, dim, *self.grid)
            if self.kernel is not None:
                depthwise = self.kernel.to(dtype).expand(dim, -1, -1, -1)
                z = F.conv2d(z, depthwise, padding=self.config.conv_padding, groups=dim)
            z = z.flatten(2)
            if masks.channels is not None:
                z = z * masks.channels.transpose(1, 2)
            prompts = _call(self.token_projection, z).transpose(1, 2)
        return prompts if self.projector is None else self.projector(prompts, masks.features)


class Prompts(nn.Module):
    """All learnable parameters of the prompts of one model.

    ``blocks[i]`` belongs to block i of the backbone: StaticPrompts or AdaptivePrompts. Blocks that get no
    prompts of their own (all but the first of ``"shallow"``) have no entry. ``projector`` is the one shared
    by all adaptive blocks, or None.

    Args:
        config: the options.
        dim: C, channels of the backbone's tokens.
        depth: number of blocks of the backbone.
        grid: (H, W), patches along each side of the image.
        patch_size: (height, width) of a patch in pixels.
    """

    def __init__(
        self,
        config: PromptConfig,
        *,
        dim: int,
        depth: int,
        grid: tuple[int, int],
        patch_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.config = config
        num_adaptive = config.num_adaptive_blocks(depth)
        self.blocks = nn.ModuleList(
            [StaticPrompts(config, dim, patch_size) for _ in range(config.num_static_blocks(depth))]
            + [AdaptivePrompts(config, dim, grid) for _ in range(num_adaptive)]
        )
        shared = num_adaptive > 0 and config.projector_dim is not None and config.projector_shared
        self.projector = Projector(config, dim) if shared else None

    def reset_parameters(self) -> None:
        """Initialise everything again, as the papers do."""
        for block in self.blocks:
            block.reset_parameters()
        if self.projector is not None:
            self.projector.reset_parameters()

    def projector_of(self, index: int) -> Projector | None:
        """The projector that the prompts of ``blocks[index]`` pass, its own or the shared one."""
        block = self.blocks[index]
        if not isinstance(block, AdaptivePrompts):
            return None
        return self.projector if block.projector is None else block.projector

    def compute(self, index: int, patches: Tensor, masks: Masks | None = None) -> Tensor:
        """The prompts of block ``index``: (B, P, C), or (1, P, C) where they are the same for every image.

        Args:
            index: of ``blocks``.
            patches: the patch tokens (B, N, C) before that block.
            masks: of its dropouts; None drops nothing.
        """
        block = self.blocks[index]
        if not isinstance(block, AdaptivePrompts):
            return block(masks)
        prompts = block(patches, masks)
        if block.projector is not None or self.projector is None:
            return prompts
        return self.projector(prompts, None if masks is None else masks.features)

    def draw_masks(self, batch: int, **options: Any) -> list[Masks]:
        """Masks of each entry of ``blocks``, all at once: every backend sees the same numbers."""
        return [block.draw_masks(batch, **options) for block in self.blocks]

    def forward(self, images: Tensor, within: Callable[[Prompts, Tensor], Any]) -> Any:
        """``within(self, images)``: whatever uses these parameters runs within this module's call.

        So that what surrounds the call (hooks that gather, move or compute parameters) surrounds every use.
        """
        return within(self, images)


remember_forward(StaticPrompts, Projector, AdaptivePrompts)


def _mask(module: nn.Module, rate: float, *shape: int, **options: Any) -> Tensor | None:
    return F.dropout(torch.ones(shape, **options), rate) if module.training and rate > 0 else None


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` in x's dtype; where the module is not plain, in that of its weights."""
    observed = has_global_hooks()
    if not observed and is_plain(module, nn.Linear):
        return F.linear(x, *_cast(module, x.dtype))
    if not observed and is_plain(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, *_cast(module, x.dtype), module.eps)
    weights = weights_of(module, most=1)
    return module(x.to(weights[0].dtype if weights else x.dtype)).to(x.dtype)


def _cast(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    return tuple(None if t is None else t.to(dtype) for t in (module.weight, module.bias))
