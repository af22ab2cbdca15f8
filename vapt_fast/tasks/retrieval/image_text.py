"""ImageTextModel: a model of open_clip whose image tower is given prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...adapters import AdapterError, fingerprint, read_config
from ...config import PromptConfig
from ...model import AdaptiveViT
from .scores import ImageTextRecall, image_text_retrieval
from .towers import as_timm_model

__all__ = ["ImageTextModel", "evaluate_image_text"]

_METADATA_KEY = "image_text"


class ImageTextModel(nn.Module):
    """A frozen model of images and texts (CLIP, SigLIP) with prompts in its image tower.

    The model is taken over: its image tower is replaced by an AdaptiveViT and everything else is frozen, so
    ``clip.encode_image`` has the prompts too.

    Args:
        clip: a model of open_clip with a tower of timm's (SigLIP, ...) or with CLIP's own.
        prompts: the options of the prompts; None to give them as keywords.
        train_head: train the projection of the images too. False keeps the space that images and texts
            share, and with it the model's zero-shot use.
        loss: a module that is called with image features, text features and logit scale, and the logit bias
            if there is one; None for the model's own, open_clip's SigLipLoss (with a bias) or ClipLoss.
        options: those of PromptConfig, and ``backend``, ``cuda_graphs`` and ``backbone_precision`` of
            AdaptiveViT.

    Raises:
        ModuleNotFoundError: open_clip is missing; the message says how to install it.
        NotImplementedError: an image tower that is no ViT that AdaptiveViT takes.
        TypeError, ValueError: as AdaptiveViT.

    Attributes:
        clip: the model of open_clip.
        tower: the AdaptiveViT in it.
        loss: the loss.
    """

    def __init__(
        self,
        clip: Any,
        *,
        prompts: PromptConfig | None = None,
        train_head: bool = False,
        loss: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        has_bias = getattr(clip, "logit_bias", None) is not None
        self.loss = _own_loss(has_bias) if loss is None else loss
        visual = clip.visual
        trunk = getattr(visual, "trunk", None)
        if trunk is not None and trunk.global_pool == "":
            raise NotImplementedError(
                "the image tower pools by a module of open_clip's, which takes no prompts"
            )
        tower = AdaptiveViT(as_timm_model(visual) if trunk is None else trunk, prompts=prompts, **options)
        clip.requires_grad_(False)
        if trunk is None:
            clip.visual = tower
        else:
            visual.trunk = tower
            if tower.num_classes == 0:  # then open_clip projects; as the tower's head, an adapter holds it
                tower.find_adapter(tower.active_adapter).set_heads({"head": visual.head}, num_classes=0)
                visual.head = nn.Identity()
        tower.head.requires_grad_(train_head)
        self.clip = clip
        self.train_head = train_head
        self.train()

    @property
    def tower(self) -> AdaptiveViT:
        """The image tower."""
        return cast(AdaptiveViT, getattr(self.clip.visual, "trunk", self.clip.visual))

    def train(self, mode: bool = True) -> ImageTextModel:
        """Training mode for what learns; the frozen parts stay in eval mode. Returns self."""
        super().train(mode)
        self.clip.eval()
        self.tower.train(mode)
        self.tower.head.train(mode and self.train_head)
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to give to an optimizer."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return normalised features (B, D) of images (B, C, height, width)."""
        return self.clip.encode_image(images, normalize=True)

    def encode_text(self, texts: Tensor) -> Tensor:
        """Return normalised features (B, D) of texts (B, L), as open_clip's tokenizer gives them."""
        return self.clip.encode_text(texts, normalize=True)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the loss of a batch of images and texts, the i-th text being the i-th image's."""
        scale, bias = self.clip.logit_scale.exp(), getattr(self.clip, "logit_bias", None)
        arguments = [scale] if bias is None else [scale, bias]
        return self.loss(self.encode_image(images), self.encode_text(texts), *arguments)

    def save_adapter(self, folder: str | PathLike[str], *, metadata: dict[str, Any] | None = None) -> None:
        """Write prompts and projection to ``folder``; see vapt_fast.adapters.save.

        Raises:
            AdapterError: as for AdaptiveViT.
        """
        described = {_METADATA_KEY: {"text_fingerprint": self._text_fingerprint()}}
        self.tower.save_adapter(folder, metadata={**(metadata or {}), **described})

    def load_adapter(self, folder: str | PathLike[str]) -> None:
        """Read prompts and projection from ``folder``.

        Raises:
            AdapterError: as for AdaptiveViT; or the adapter was trained with other texts' features.
        """
        described = read_config(folder)["metadata"].get(_METADATA_KEY)
        if described != {"text_fingerprint": self._text_fingerprint()}:
            raise AdapterError(
                f"the adapter in {folder} does not fit the model",
                ["it was not trained with this text tower (its fingerprint differs)"],
            )
        self.tower.load_adapter(folder)

    def _text_fingerprint(self) -> str:
        """Return the sha256 of everything but the image tower."""
        state = self.clip.state_dict()
        return fingerprint({name: value for name, value in state.items() if not name.startswith("visual.")})


def _own_loss(has_bias: bool) -> nn.Module:
    try:
        module = import_module("open_clip.loss")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "models of images and texts need open_clip, which is not installed; "
            "install it with: pip install 'vapt_fast[retrieval]'"
        ) from error
    return module.SigLipLoss() if has_bias else module.ClipLoss()


@torch.no_grad()
def evaluate_image_text(
    model: ImageTextModel,
    images: Iterable[Tensor],
    texts: Iterable[Tensor],
    image_of_text: Tensor,
    **options: Any,
) -> ImageTextRecall:
    """Measure recall at k both ways on a data set with any number of texts an image.

    Args:
        model: it is left in eval mode.
        images, texts: batches, of images (B, C, height, width) and of tokens (B, L), on the model's device.
        image_of_text: the index of the image of each text, (M), integers, on the CPU.
        options: ``ks`` and ``chunk_size``, as for ``image_text_retrieval``.

    Raises:
        TypeError, ValueError: as for ``image_text_retrieval``.
    """
    model.eval()
    of_images, of_texts = (
        torch.cat([encode(batch).float().cpu() for batch in batches])
        for encode, batches in ((model.encode_image, images), (model.encode_text, texts))
    )
    return image_text_retrieval(of_images, of_texts, image_of_text, **options)
