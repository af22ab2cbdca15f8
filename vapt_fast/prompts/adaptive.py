"""Prompts computed from the image's own patch tokens: VAPT (arXiv 2501.18936)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ..config import PromptConfig
from ..functional import prompt_matrices, prompt_pool, prompt_projector
from ..modules import Once, has_global_hooks, is_plain, remember_forward, weights_of
from ..ops.autocast import without_autocast
from .base import (
    BlockPrompts,
    Geometry,
    Masks,
    Prompts,
    affine,
    call,
    draw_mask,
    layer_norm,
    register_kind,
    stored_shape,
)
from .deep import StaticPrompts, table_bound
from .plain import PlainProjector, PlainPrompts, Pooling
from .projector import Projector

__all__ = ["AdaptivePrompts"]

PROMPT_NORM_EPS = 1e-5

# Names in the public implementation, where adaptive blocks are numbered from 0.
NORM = "transformer.deep_prompt_norm"
POOLING = "transformer.deep_prompt_downsample"


def conv_output(config: PromptConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """Return height and width, in patches, of the grid after the convolution.

    Raises:
        ValueError: the convolution leaves nothing of a grid this small.
    """
    if config.conv_kernel is None:
        return grid
    height, width = (side + 2 * config.conv_padding - config.conv_kernel + 1 for side in grid)
    if height < 1 or width < 1:
        raise ValueError(
            f"conv_kernel={config.conv_kernel} with conv_padding={config.conv_padding} does not fit the "
            f"{grid[0]}x{grid[1]} patch grid; use a smaller kernel, more padding or a larger image"
        )
    return height, width


@register_kind("adaptive", method="vapt", title="VAPT")
class AdaptivePrompts(BlockPrompts):
    """Prompts computed from the patch tokens of one block (VAPT, section 4.1).

    ``norm``: LayerNorm over C, eps 1e-5. ``kernel``: (1, 1, K, K) shared by all channels or (C, 1, K, K)
    depthwise, None without convolution; starts N(0, 1). ``token_projection``: Linear(H'W' -> P) with bias,
    starts at zero, so that the first prompts are exactly 0. ``projector``: this block's own, or None where
    there is none or one is shared by all blocks. ``table``: (P, C), added to the computed prompts where
    ``add_table``, else None. The first ``static_depth`` blocks have StaticPrompts.
    """

    token_table = "table"

    def __init__(self, config: PromptConfig, num_prompts: int, geometry: Geometry) -> None:
        super().__init__(config, num_prompts, geometry)
        self.grid = geometry.grid
        self.norm = nn.LayerNorm(self.dim, eps=PROMPT_NORM_EPS)
        size = config.conv_kernel
        self.kernel = None
        if size is not None:
            self.kernel = nn.Parameter(torch.empty(1 if config.conv_shared else self.dim, 1, size, size))
        self.token_projection = nn.Linear(math.prod(conv_output(config, self.grid)), num_prompts)
        own_projector = config.projector_dim is not None and not config.projector_shared
        self.projector = Projector(config, self.dim) if own_projector else None
        self.table = nn.Parameter(torch.empty(num_prompts, self.dim)) if config.add_table else None
        self.bound = table_bound(geometry)
        self.reset_parameters()

    @classmethod
    def check_config(cls, config: PromptConfig) -> None:
        """Raise ValueError for a padding that the kernel does not reach beyond."""
        super().check_config(config)
        kernel, padding = config.conv_kernel, config.conv_padding
        if padding and (kernel is None or padding >= kernel):
            raise ValueError(f"conv_padding must be smaller than conv_kernel ({kernel}), got {padding}")

    @classmethod
    def make(cls, config: PromptConfig, index: int, num_prompts: int, geometry: Geometry) -> BlockPrompts:
        """Return a learned table for the first ``static_depth`` blocks, adaptive prompts for the others."""
        return (StaticPrompts if index < config.static_depth else cls)(config, num_prompts, geometry)

    @classmethod
    def make_shared(cls, config: PromptConfig, geometry: Geometry) -> dict[str, nn.Module | None]:
        """Return the projector of all blocks, if they share one."""
        shared = config.projector_shared and config.projector_dim is not None
        return {"projector": Projector(config, geometry.dim) if shared else None}

    def reset_parameters(self) -> None:
        """Begin anew: a random kernel, and a token projection of zeros."""
        self.norm.reset_parameters()
        if self.kernel is not None:
            nn.init.normal_(self.kernel)
        nn.init.zeros_(self.token_projection.weight)
        nn.init.zeros_(self.token_projection.bias)
        if self.projector is not None:
            self.projector.reset_parameters()
        if self.table is not None:
            nn.init.uniform_(self.table, -self.bound, self.bound)

    def draw_masks(self, batch: int, **options: Any) -> Masks:
        """Return the masks of the channels, of the projector's features and of an added table."""
        config = self.config
        channels = draw_mask(self, config.channel_dropout, batch, 1, self.dim, **options)
        features = None
        if config.projector_dim is not None:
            shape = batch, self.num_prompts, config.projector_dim
            features = draw_mask(self, config.projector_dropout, *shape, **options)
        table = None
        if self.table is not None:
            table = draw_mask(self, config.prompt_dropout, batch, *self.table.shape, **options)
        return Masks(table, channels, features)

    def forward(
        self,
        patches: Tensor,
        masks: Masks | None = None,
        projector: Callable[..., Tensor] | None = None,
        **shared: Any,
    ) -> Tensor:
        """Return the prompts (B, P, C) of patch tokens (B, N, C), N = H * W, word for word as in the paper.

        LayerNorm, convolution over the grid, channel dropout, Linear over the positions, and the feature
        projector (this block's own, or the shared ``projector``); in float32 (float64 where anything is),
        also under autocast, because the first prompts are exactly 0 and the next LayerNorm multiplies their
        errors by 1000. Differentiable in everything.
        """
        masks = Masks() if masks is None else masks
        dtype = torch.promote_types(patches.dtype, torch.float32)
        for weight in weights_of(self):
            dtype = torch.promote_types(dtype, weight.dtype)
        with torch.autocast(patches.device.type, enabled=False):
            z = call(self.norm, patches.to(dtype))
            batch, _, dim = z.shape
            z = z.transpose(1, 2).reshape(batch, dim, *self.grid)
            if self.kernel is not None:
                depthwise = self.kernel.to(dtype).expand(dim, -1, -1, -1)
                z = F.conv2d(z, depthwise, padding=self.config.conv_padding, groups=dim)
            z = z.flatten(2)
            if masks.channels is not None:
                z = z * masks.channels.transpose(1, 2)
            prompts = call(self.token_projection, z).transpose(1, 2)
            projector = projector if self.projector is None else self.projector
            if projector is not None:
                prompts = projector(prompts, masks.features)
            return self.add_table(prompts, masks)

    def add_table(self, prompts: Tensor, masks: Masks) -> Tensor:
        """Return the prompts (B, P, C) and the learned table added up; the prompts where there is none."""
        if self.table is None:
            return prompts
        return prompts + (self.table if masks.table is None else self.table * masks.table)

    # ---- another grid

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError if the convolution does not fit ``grid``, (H, W) patches."""
        conv_output(self.config, grid)

    def resize(self, grid: tuple[int, int]) -> None:
        """Resample the projection over positions, (P, H'W'), for another grid (H, W) of patches.

        Each prompt's weights are an image over the grid and are resampled like a position embedding (bicubic,
        with anti-aliasing), then scaled by the ratio of the areas, because a prompt is a sum over positions:
        uniform tokens keep giving the same prompt.
        """
        old, new = (conv_output(self.config, sides) for sides in (self.grid, grid))
        projection = self.token_projection
        with torch.no_grad():
            maps = resample_abs_pos_embed(
                projection.weight.t().unsqueeze(0),
                new_size=list(new),
                old_size=list(old),
                num_prefix_tokens=0,
            )
            weight = maps.squeeze(0).t() * (math.prod(old) / math.prod(new))
        resized = nn.Linear(
            math.prod(new), self.num_prompts, device=projection.weight.device, dtype=projection.weight.dtype
        )
        resized.weight = nn.Parameter(weight.contiguous(), requires_grad=projection.weight.requires_grad)
        resized.bias = projection.bias
        self.token_projection, self.grid = resized, grid

    # ---- rewritten

    def pooling_matrix(self) -> Tensor:
        """Return the convolution and the projection over positions as one matrix, in float32 at least.

        Returns:
            M of (P, N, 1), or (P, N, C) with a kernel for each channel: the prompts before the projector are
            t[p, c] = sum_n M[p, n, c] z[n, c] + bias[p]. Differentiable in the weights.
        """
        (matrix,) = _matrices([self], self.token_projection.weight.dtype)
        if self.kernel is None or self.config.conv_shared:
            return matrix.unsqueeze(-1)
        by_shift = torch.unflatten(matrix, 0, (-1, self.num_prompts))
        return torch.einsum("spn,cs->pnc", by_shift, self.kernel.flatten(1).to(matrix.dtype))

    def can_pool(self, projector: Any) -> bool:
        """Whether the prompts can be pooled from the tokens, because all weights may be read."""
        return _can_read_shared(projector) and _can_read(self)

    def report(self, projector: nn.Module | None = None, **shared: Any) -> str:
        """Return whether the prompts are pooled or called."""
        return "prompts pooled" if self.can_pool(projector) else "prompts called"

    @classmethod
    def sources(
        cls, prompts: Prompts, masks: list[Any], dtype: torch.dtype, backend: str | None
    ) -> list[Any]:
        """Return sources that pool where that can be; one call makes the matrices of equally many prompts."""
        sources = super().sources(prompts, masks, dtype, backend)
        for i, projector, matrix in _pooled_blocks(prompts, len(sources), dtype):
            sources[i] = _PooledSource(prompts.blocks[i], projector, masks[i], matrix, backend)
        return sources

    @classmethod
    def plain_blocks(cls, prompts: Prompts, dtype: torch.dtype) -> list[PlainPrompts | None]:
        """Return matrices where all weights may be read, and the norm's eps is the one for all."""
        blocks = super().plain_blocks(prompts, dtype)
        projectors: dict[Any, PlainProjector | None] = {None: None}  # a shared one stays one
        for i, projector, matrix in _pooled_blocks(prompts, len(blocks), dtype):
            if prompts.blocks[i].norm.eps != PROMPT_NORM_EPS:
                continue
            if projector not in projectors:
                projectors[projector] = projector.plain()
            blocks[i] = prompts.blocks[i].plain_pooling(projectors[projector], matrix)
        return blocks

    def plain_pooling(self, projector: PlainProjector | None, matrix: Tensor) -> PlainPrompts:
        """Return the prompts as plain tensors; ``matrix`` (R, N) is the convolution and the projection."""
        config, kernel = self.config, None
        if self.kernel is not None and not config.conv_shared:
            kernel = self.kernel.flatten(1).t()
        pooling = Pooling(
            matrix=torch.unflatten(matrix, 0, (-1, self.num_prompts)),
            offset=self.token_projection.bias,
            weight=self.norm.weight,
            bias=self.norm.bias,
            kernel=kernel,
            projector=projector,
            own_projector=self.projector is not None,
        )
        rates = (
            self.rate(config.prompt_dropout),
            self.rate(config.channel_dropout),
            self.rate(config.projector_dropout),
        )
        return PlainPrompts(self.num_prompts, self.table, pooling, rates=rates)

    # ---- the public implementation

    def official_names(self, number: int) -> dict[str, str | tuple[str, int]]:
        """Return the names of the ``number``-th adaptive block."""
        pooling = f"{POOLING}.{number}"
        linear = pooling if self.kernel is None else f"{pooling}.linear"
        names: dict[str, str | tuple[str, int]] = {}
        for leaf in ("weight", "bias"):
            names[f"norm.{leaf}"] = f"{NORM}.{number}.{leaf}"
            names[f"token_projection.{leaf}"] = f"{linear}.{leaf}"
        if self.kernel is not None:
            names["kernel"] = f"{pooling}.conv.kernel"
        if self.projector is not None:
            own = self.projector.official_names(number)
            names |= {f"projector.{name}": public for name, public in own.items()}
        return names

    @classmethod
    def official_count(cls, state: Mapping[str, Tensor]) -> int:
        """Return how many adaptive blocks a state dict of the public implementation has."""
        return next(j for j in count() if f"{NORM}.{j}.weight" not in state)

    @classmethod
    def official_options(cls, state: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, object]:
        """Return the options that the first adaptive block's tensors and the projector's tell."""
        return dict(_convolution_told(state, grid)) | Projector.official_options(state)


def _convolution_told(state: Mapping[str, Tensor], grid: tuple[int, int]) -> Iterator[tuple[str, object]]:
    if f"{POOLING}.0.conv.kernel" not in state:
        yield "conv_kernel", None
    kernel = stored_shape(state, f"{POOLING}.0.conv.kernel", 4)
    linear = stored_shape(state, f"{POOLING}.0.linear.weight", 2)
    if kernel is None:
        return
    size = kernel[-1]
    yield from (("conv_kernel", size), ("conv_shared", kernel[0] == 1))
    for padding in range(size):
        if linear is not None and math.prod(side + 2 * padding - size + 1 for side in grid) == linear[1]:
            yield "conv_padding", padding


class _PooledSource(NamedTuple):
    """Prompts pooled from the tokens: ``matrix`` (R, N) is the block's convolution and projection."""

    block: AdaptivePrompts
    projector: Any  # a Projector or None
    masks: Masks
    matrix: Tensor
    backend: str | None

    def make(self, tokens: Tensor, num_prefix: int) -> Tensor:
        """Return the prompts (B, P, C) alone, as they are."""
        _, _, pooled = self._pool(tokens, num_prefix, None)
        return self._project(pooled, None, tokens.dtype)

    def pool(
        self,
        tokens: Tensor,
        num_prefix: int,
        norm: nn.LayerNorm,
        *,
        branch: Tensor | None,
        layer_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens; they and the prompts (B, P, C) normalised by ``norm``."""
        tokens, normed, pooled = self._pool(tokens, num_prefix, norm, branch=branch, layer_scale=layer_scale)
        return tokens, normed, self._project(pooled, norm, normed.dtype)

    def _pool(
        self, tokens: Tensor, num_prefix: int, norm: nn.LayerNorm | None, **residual: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = self.block.norm
        return prompt_pool(
            tokens,
            self.matrix,
            own.weight,
            own.bias,
            num_prefix=num_prefix,
            prompt_eps=own.eps,
            backend=self.backend,
            **residual,
            **affine(norm, otherwise=own.eps),
        )

    def _project(self, pooled: Tensor, norm: nn.LayerNorm | None, dtype: torch.dtype) -> Tensor:
        block, projector, kernel = self.block, self.projector, self.block.kernel
        if kernel is not None and not block.config.conv_shared:
            by_shift = torch.unflatten(pooled, 1, (-1, block.num_prompts))
            pooled = (by_shift * kernel.to(pooled.dtype).flatten(1).t().unsqueeze(1)).sum(dim=1)
        fused = block.table is None  # else the table comes between the projector and the block's norm
        prompts = prompt_projector(
            pooled,
            block.token_projection.bias,
            down=None if projector is None else projector.down.weight,
            up=None if projector is None else projector.up.weight,
            scale=1.0 if projector is None else projector.scale,
            channel_mask=self.masks.channels,
            feature_mask=self.masks.features,
            activation="identity" if projector is None else projector.activation,
            dtype=dtype if fused else pooled.dtype,
            backend=self.backend,
            **affine(norm if fused else None, otherwise=None),
        )
        if fused:
            return prompts
        prompts = block.add_table(prompts, self.masks)
        return (prompts if norm is None else layer_norm(prompts, norm)).to(dtype)


def _pooled_blocks(
    prompts: Prompts, num_blocks: int, dtype: torch.dtype
) -> Iterator[tuple[int, Any, Tensor]]:
    """Yield index, projector and matrix of each block that can be pooled; one call makes those of equal P."""
    shared = prompts.shared.get("projector")
    blocks = list(prompts.blocks)[:num_blocks]
    by_number: dict[int, list[int]] = {}
    for i, block in enumerate(blocks if _can_read_shared(shared) else []):
        if isinstance(block, AdaptivePrompts) and _can_read(block):
            by_number.setdefault(block.num_prompts, []).append(i)
    for indices in by_number.values():
        matrices = _matrices([blocks[i] for i in indices], dtype)
        for i, matrix in zip(indices, matrices.unbind(), strict=True):
            yield i, shared if blocks[i].projector is None else blocks[i].projector, matrix


def _can_read_shared(projector: Any) -> bool:
    """Return whether nothing but a block's own modules keeps its weights from being read."""
    return not has_global_hooks() and (projector is None or _can_read(projector))


@Once
def _can_read(module: Any) -> bool:
    """Return whether all weights may be read, of a block's AdaptivePrompts or of a Projector."""
    if isinstance(module, Projector):
        return is_plain(module, Projector) and module.is_plain()
    return (
        is_plain(module, AdaptivePrompts)
        and _is_affine(module.norm, nn.LayerNorm)
        and _is_affine(module.token_projection, nn.Linear)
        and (module.projector is None or _can_read(module.projector))
    )


def _is_affine(module: nn.Module, cls: type[nn.Module]) -> bool:
    return is_plain(module, cls) and module.weight is not None and module.bias is not None


def _matrices(blocks: list[AdaptivePrompts], dtype: torch.dtype) -> Tensor:
    """Return the convolution and projection of each block as a matrix, (A, R, N); in float32 at least."""
    config = blocks[0].config
    weights = torch.stack([block.token_projection.weight for block in blocks])
    weights = weights.to(torch.promote_types(torch.promote_types(dtype, weights.dtype), torch.float32))
    kernels = None
    if config.conv_kernel is not None:
        kernels = torch.stack([block.kernel[:, 0] for block in blocks if block.kernel is not None])
        kernels = kernels[:, 0] if config.conv_shared else kernels
    with without_autocast(weights.device.type):  # an empty context of autocast can't be exported
        return prompt_matrices(
            weights,
            kernels,
            blocks[0].grid,
            padding=config.conv_padding,
            depthwise=not config.conv_shared,
        )


remember_forward(AdaptivePrompts)
