"""Segmenter: an AdaptiveViT whose head is a decoder, and names the class of every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any, cast

from torch import Tensor, nn

from ...adapters import Adapter, AdapterError, MissingHead, build, read_config
from ...arguments import choice, integer
from ...backbones import patch_size
from ...config import PromptConfig
from ...model import AdaptiveViT
from ...prompts import Prompts
from ...training.saved import SEGMENTATION
from .decoders import DECODERS, resized

__all__ = ["Segmenter"]


class Segmenter(AdaptiveViT):
    """An AdaptiveViT for semantic segmentation: its head is a decoder, and logits are given for every pixel.

    Prompts and decoder learn; an adapter holds both. ``model(images)`` takes images of the backbone's size;
    ``vapt_fast.tasks.segmentation.sliding_window`` serves all larger ones.

    Args:
        backbone: as for AdaptiveViT.
        num_classes: of the pixels, at least 1.
        decoder: "linear", "pup" (SETR-PUP) or "dpt".
        taps: the blocks whose tokens the decoder reads, by index, ascending to the last one. None for the
            decoder's own: the last block, or four at equal distances for "dpt".
        options: all others of AdaptiveViT: ``prompts`` or PromptConfig's options, ``pretrained``,
            ``backend``, ``img_size``, ...

    Raises:
        TypeError, ValueError, NotImplementedError: as AdaptiveViT; an unknown decoder, taps that it can't
            read, or prompts that are pooled.
        ModuleNotFoundError: "dpt" without segmentation_models_pytorch.

    Attributes:
        decoder: the decoder's name; the module is ``head``.
        taps: the blocks that it reads.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_classes: int,
        decoder: str = "linear",
        taps: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        num_classes = integer("num_classes", num_classes, minimum=1)
        decoder_class = DECODERS[choice("decoder", decoder, tuple(DECODERS))]
        super().__init__(backbone, num_classes=num_classes, **options)
        _check_not_pooled(self.config)
        depth = len(self.backbone.blocks)
        self.decoder = decoder
        self.taps = _checked_taps(decoder_class.default_taps(depth) if taps is None else taps, depth)
        self._set_decoder(num_classes)
        self._base.set_heads({"head": MissingHead()})  # the backbone's own knows no pixels

    def _set_decoder(self, num_classes: int) -> None:
        """Take a new decoder, as the only head: a distilled backbone has two."""
        self._active.set_heads(self._make_heads(num_classes), num_classes)
        self.train(self.training)

    def _make_heads(self, num_classes: int) -> dict[str, nn.Module]:
        decoder = DECODERS[self.decoder](
            self.embed_dim,
            num_classes,
            num_taps=len(self.taps),
            patch_size=patch_size(self.backbone),
            has_prefix=self.num_prefix_tokens > 0,
        )
        weight = next(self.backbone.parameters())
        return {"head": decoder.to(weight.device, weight.dtype)}

    def make_prompts(self, config: PromptConfig) -> Prompts:
        """As AdaptiveViT, and ValueError for prompts that are pooled."""
        _check_not_pooled(config)
        return super().make_prompts(config)

    def forward(self, images: Tensor, adapter_names: Any = None) -> Tensor:
        """Images (B, in_chans, height, width) to logits (B, num_classes, height, width).

        Raises:
            NotImplementedError: ``adapter_names``; ``set_adapter`` chooses one for all images.
            TypeError, ValueError: as AdaptiveViT.
        """
        if adapter_names is not None:
            raise NotImplementedError("a Segmenter has one adapter for all images: call set_adapter(name)")
        return super().forward(images)

    def _logits(self, images: Tensor, backend: str, adapter: Adapter | None = None, **options: Any) -> Tensor:
        """Return logits of all pixels; ``backend`` is what ``self.backend`` resolves to."""
        decoder = self.head
        tapped = self.forward_intermediates(
            images,
            list(self.taps),
            return_prefix_tokens=True,
            norm=getattr(decoder, "normed", False),
            intermediates_only=True,
            output_dict=True,
        )
        prefixes = tapped.get("image_intermediates_prefix", [None] * len(self.taps))
        return resized(decoder(tapped["image_intermediates"], prefixes), images.shape[-2:])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return pooled features (B, C) of tokens (B, T, C), with ``pre_logits`` only.

        Raises:
            NotImplementedError: without ``pre_logits``; the decoder reads tokens of several blocks.
        """
        if not pre_logits:
            raise NotImplementedError("a Segmenter has no head for pooled tokens; call model(images)")
        return super().forward_head(x, pre_logits=True)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Take a new decoder for ``num_classes``; ``global_pool`` is for other heads, and refused.

        Raises:
            TypeError, ValueError: not a positive number of classes, or a pooling.
        """
        if global_pool is not None:
            raise ValueError(f"global_pool is for one vector an image; leave it out, got {global_pool!r}")
        self._set_decoder(integer("num_classes", num_classes, minimum=1))
        self._active.class_names = None

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Refuse: the decoder reads the last block.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("prune the timm model first, and make the Segmenter of that")

    # ---- adapters

    def save_adapter(
        self,
        folder: str | PathLike[str],
        name: str | None = None,
        *,
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Write prompts and decoder to ``folder``; arguments as for AdaptiveViT.

        The metadata have the decoder's name and its taps beside what the user gives.
        """
        if metadata is None:
            metadata = self.find_adapter(self.active_adapter if name is None else name).metadata
        super().save_adapter(folder, name, metadata={**metadata, SEGMENTATION: self._described()}, **options)

    def load_adapter(self, folder: str | PathLike[str], name: str | None = None, **options: Any) -> None:
        """Read prompts and decoder from ``folder``; arguments as for AdaptiveViT.

        Raises:
            AdapterError: as for AdaptiveViT; or another decoder, or the same with other taps.
        """
        described = _description(folder)
        if described != self._described():
            raise AdapterError(
                f"the adapter in {folder} does not fit the model",
                [f"{SEGMENTATION}: the adapter has {described}, the model {self._described()}"],
            )
        super().load_adapter(folder, name, **options)

    def _described(self) -> dict[str, Any]:
        return {"decoder": self.decoder, "taps": list(self.taps)}

    @classmethod
    def from_adapter(cls, folder: str | PathLike[str], **options: Any) -> Segmenter:
        """Return the model of the adapter in ``folder``, in eval mode; arguments as for AdaptiveViT.

        Raises:
            AdapterError: as for AdaptiveViT; or the adapter is none of a Segmenter.
        """
        described = _description(folder)
        num_classes = read_config(folder)["backbone"]["num_classes"]
        return cast(Segmenter, build(partial(cls, num_classes=num_classes, **described), folder, **options))


def _description(folder: str | PathLike[str]) -> dict[str, Any]:
    """Return the decoder and the taps of the adapter in ``folder``."""
    described = read_config(folder)["metadata"].get(SEGMENTATION)
    if not isinstance(described, dict) or described.keys() != {"decoder", "taps"}:
        raise AdapterError(
            f"the adapter in {folder} is none of a Segmenter",
            [f"its metadata have no {SEGMENTATION!r} with decoder and taps; try AdaptiveViT.from_adapter"],
        )
    return described


def _check_not_pooled(config: PromptConfig) -> None:
    if config.pool_prompts:
        raise ValueError("pool_prompts=True is for one vector an image; leave it out of a Segmenter")


def _checked_taps(taps: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the taps, if they ascend to the last block: prompts of blocks after it would learn nothing."""
    indices = tuple(integer(f"taps[{i}]", tap, minimum=0) for i, tap in enumerate(taps))
    if not indices or list(indices) != sorted(set(indices)) or indices[-1] != depth - 1:
        raise ValueError(
            f"taps must be indices of blocks, ascending to the last, {depth - 1}, got {list(taps)}"
        )
    return indices
