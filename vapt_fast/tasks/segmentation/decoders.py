"""Decoders: from the tokens of some blocks to a map of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...training.options import DECODER_NAMES

__all__ = ["DECODERS", "DPTDecoder", "Decoder", "LinearDecoder", "PUPDecoder"]

CHANNELS = 256  # of PUP's convolutions and of what DPT fuses, as published


class Decoder(nn.Module):
    """A module that makes logits from the tokens of the blocks that are tapped.

    A decoder is made from the width of the tokens ``dim``, the number of classes, the number of taps, the
    patches' (height, width) and whether there are prefix tokens.

    Attributes:
        normed: whether it reads tokens after the backbone's final norm.
    """

    normed = False

    def __init__(
        self, dim: int, num_classes: int, num_taps: int, patch_size: Sequence[int], has_prefix: bool
    ) -> None:
        super().__init__()

    @classmethod
    def default_taps(cls, depth: int) -> tuple[int, ...]:
        """Return the blocks to tap of ``depth``, where the user chooses none: the last."""
        return (depth - 1,)

    def forward(self, patches: list[Tensor], prefixes: list[Tensor | None]) -> Tensor:
        """Return logits (B, num_classes, h, w), of any h and w.

        Args:
            patches: for each tap, patch tokens (B, C, H, W).
            prefixes: for each tap, prefix tokens (B, T, C); None where the backbone has none.
        """
        raise NotImplementedError


class LinearDecoder(Decoder):
    """A BatchNorm and one linear map for all patches, as DINOv2 evaluates frozen features.

    Several taps are concatenated.
    """

    normed = True

    def __init__(
        self, dim: int, num_classes: int, num_taps: int, patch_size: Sequence[int], has_prefix: bool
    ) -> None:
        super().__init__(dim, num_classes, num_taps, patch_size, has_prefix)
        self.norm = nn.BatchNorm2d(num_taps * dim)
        self.classifier = nn.Conv2d(num_taps * dim, num_classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, patches: list[Tensor], prefixes: list[Tensor | None]) -> Tensor:
        """Return logits (B, num_classes, H, W), one for each patch."""
        return self.classifier(self.norm(torch.cat(patches, dim=1)))


class PUPDecoder(Decoder):
    """Progressive upsampling, the decoder of SETR-PUP (arXiv 2012.15840), without its auxiliary heads.

    A LayerNorm, then steps of a 3 x 3 convolution to 256 channels, BatchNorm, ReLU and upsampling by 2, until
    the next would pass the size of the image (four with patches of 16 pixels), then a linear map. It reads
    one tap.
    """

    def __init__(
        self, dim: int, num_classes: int, num_taps: int, patch_size: Sequence[int], has_prefix: bool
    ) -> None:
        super().__init__(dim, num_classes, num_taps, patch_size, has_prefix)
        if num_taps != 1:
            raise ValueError(f"taps must be one block for the decoder 'pup', got {num_taps}")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        num_steps = int(math.log2(min(patch_size)))
        widths = [dim, *[CHANNELS] * num_steps]
        self.steps = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(width_in, width_out, kernel_size=3, padding=1, bias=False),
                    nn.BatchNorm2d(width_out),
                    nn.ReLU(inplace=True),
                    nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                )
                for width_in, width_out in pairwise(widths)
            )
        )
        self.classifier = nn.Conv2d(widths[-1], num_classes, kernel_size=1)

    def forward(self, patches: list[Tensor], prefixes: list[Tensor | None]) -> Tensor:
        """Return logits (B, num_classes, H * 2^n, W * 2^n) after n steps."""
        normed = self.norm(patches[0].movedim(1, -1)).movedim(-1, 1)
        return self.classifier(self.steps(normed))


class DPTDecoder(Decoder):
    """The decoder of DPT (arXiv 2103.13413): four taps, as of four resolutions, fused from the last on.

    It is that of segmentation_models_pytorch. Prefix tokens join the patches ("cat"); the number of patches
    along each side must be even.

    Raises:
        ModuleNotFoundError: segmentation_models_pytorch is missing; the message says how to install it.
    """

    NUM_TAPS = 4

    def __init__(
        self, dim: int, num_classes: int, num_taps: int, patch_size: Sequence[int], has_prefix: bool
    ) -> None:
        super().__init__(dim, num_classes, num_taps, patch_size, has_prefix)
        try:
            from segmentation_models_pytorch.decoders.dpt import decoder as smp
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the decoder 'dpt' needs segmentation_models_pytorch, which is not installed; "
                "install it with: pip install 'vapt_fast[segmentation]'"
            ) from error
        if num_taps != self.NUM_TAPS:
            raise ValueError(f"taps must be {self.NUM_TAPS} blocks for the decoder 'dpt', got {num_taps}")
        self.fusion = smp.DPTDecoder(
            encoder_out_channels=[dim] * num_taps,
            encoder_output_strides=[16] * num_taps,  # maps of 4, 2, 1 and 1/2 times the grid, whatever it is
            encoder_has_prefix_tokens=has_prefix,
            fusion_channels=CHANNELS,
        )
        self.classifier = smp.DPTSegmentationHead(CHANNELS, num_classes)

    @classmethod
    def default_taps(cls, depth: int) -> tuple[int, ...]:
        """Return four blocks at equal distances, the last of ``depth`` among them."""
        return tuple(depth * (tap + 1) // cls.NUM_TAPS - 1 for tap in range(cls.NUM_TAPS))

    def forward(self, patches: list[Tensor], prefixes: list[Tensor | None]) -> Tensor:
        """Return logits (B, num_classes, 16 * H, 16 * W).

        Raises:
            ValueError: an odd H or W.
        """
        grid = tuple(patches[0].shape[-2:])
        if any(side % 2 for side in grid):
            raise ValueError(f"the decoder 'dpt' needs an even number of patches along each side, got {grid}")
        return self.classifier(self.fusion(patches, prefixes))


DECODERS: dict[str, type[Decoder]] = dict(
    zip(DECODER_NAMES, (LinearDecoder, PUPDecoder, DPTDecoder), strict=True)
)
"""The decoders by name."""


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map (B, K, h, w) at another (height, width), bilinear, computed in float32 at least."""
    # A GPU adds up the gradient of an entry, of hundreds of pixels, in the dtype of the map.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, tuple(size), mode="bilinear", align_corners=False).to(logits.dtype)
