"""The learnable parameters of the prompts and their initialisation. No math: see reference.py for that."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import PromptConfig

__all__ = ["AdaptivePrompts", "Projector", "Prompts", "StaticPrompts"]

PROMPT_NORM_EPS = 1e-5


class StaticPrompts(nn.Module):
    """A learned table of prompts, the same for every image: ``table`` of (P, C).

    Starts uniform in (-v, v), v = sqrt(6 / (3 * patch_h * patch_w + C)) (VPT, Jia et al. 2022, section 3).
    """

    def __init__(self, config: PromptConfig, dim: int, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.num_prompts, dim))
        # The 3 is the number of input channels, whatever the backbone has: so the papers' code defines it.
        self.bound = math.sqrt(6 / (3 * patch_size[0] * patch_size[1] + dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.table, -self.bound, self.bound)


class Projector(nn.Module):
    """The feature projector, a bottleneck C -> r -> C without biases: ``down``, ``up`` and a ``scale``.

    ``scale`` is a parameter of (1,) where ``projector_scale_learnable``, else the number 1.0.
    """

    def __init__(self, config: PromptConfig, dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, config.projector_dim, bias=False)
        self.up = nn.Linear(config.projector_dim, dim, bias=False)
        self.scale = nn.Parameter(torch.empty(1)) if config.projector_scale_learnable else 1.0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.down.reset_parameters()
        self.up.reset_parameters()
        if isinstance(self.scale, nn.Parameter):
            nn.init.ones_(self.scale)


class AdaptivePrompts(nn.Module):
    """What one adaptive block learns (VAPT, arXiv 2501.18936, section 4.1).

    ``norm``: LayerNorm over C, eps 1e-5. ``kernel``: (1, 1, K, K) shared by all channels or (C, 1, K, K)
    depthwise, None without convolution; starts N(0, 1). ``token_projection``: Linear(H'W' -> P) with bias,
    starts at zero, so that the first prompts are exactly 0. ``projector``: this block's own, or None where
    there is none or one is shared by all blocks.
    """

    def __init__(self, config: PromptConfig, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
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
        self.norm.reset_parameters()
        if self.kernel is not None:
            nn.init.normal_(self.kernel)
        nn.init.zeros_(self.token_projection.weight)
        nn.init.zeros_(self.token_projection.bias)
        if self.projector is not None:
            self.projector.reset_parameters()


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

    def of_block(self, index: int) -> StaticPrompts | AdaptivePrompts | None:
        """The parameters of block ``index``, None where it gets no prompts of its own."""
        return self.blocks[index] if index < len(self.blocks) else None
