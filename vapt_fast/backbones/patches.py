"""The patch embedding as a product: the same sums as timm's convolution, without a convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from ..modules import has_global_hooks, is_plain, remember_forward

__all__ = ["embed_patches"]


def embed_patches(patch_embed: Any, images: Tensor) -> Tensor:
    """Return ``patch_embed(images)``: (B, N, C), or (B, H, W, C), of images (B, in_chans, height, width).

    A convolution whose stride is its kernel multiplies each patch by one matrix. On re-ordered pixels that is
    a product, which takes a tenth of the time on a GPU. Where the module may be more than that, it is called.
    """
    if not _is_product(patch_embed, images):
        tokens: Tensor = patch_embed(images)
        return tokens
    proj = patch_embed.proj
    batch, channels, height, width = images.shape
    rows, columns = proj.kernel_size
    grid = images.reshape(batch, channels, height // rows, rows, width // columns, columns)
    size = channels * rows * columns
    pixels = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // rows, width // columns, size)
    patches = F.linear(pixels, proj.weight.flatten(1), proj.bias)
    normed: Tensor = patch_embed.norm(patches.flatten(1, 2) if patch_embed.flatten else patches)
    return normed


def _is_product(patch_embed: Any, images: Tensor) -> bool:
    if has_global_hooks() or not is_plain(patch_embed, PatchEmbed):
        return False
    proj, size = patch_embed.proj, tuple(images.shape[-2:])
    # A convolution leaves out pixels past the last whole patch; timm may pad them, or refuse the size.
    return (
        is_plain(proj, nn.Conv2d)
        and (patch_embed.flatten or patch_embed.output_fmt == "NHWC")
        and all(side % patch == 0 for side, patch in zip(size, proj.kernel_size, strict=True))
        and (not patch_embed.strict_img_size or patch_embed.img_size in (None, size))
        and proj.stride == proj.kernel_size
        and proj.padding == (0, 0)
        and proj.dilation == (1, 1)
        and proj.groups == 1
    )


remember_forward(PatchEmbed, nn.Conv2d)
