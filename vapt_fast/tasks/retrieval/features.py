"""Features of images: what a frozen or adapted model gives its head, at length one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import AdaptiveViT
from ...training.errors import UserError
from ...training.trainer import autocast

__all__ = ["embed", "image_features"]


def image_features(model: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled features of images, normalised: (B, D), float32 or float64.

    They are what the head of a timm model or of an AdaptiveViT reads (of a distilled one, the mean of both
    tokens), so they are adapted as far as the prompts are. Differentiable in the images and what learns.

    Args:
        model: a timm model or an AdaptiveViT.
        images: (B, C, height, width), as the model takes them.

    Raises:
        UserError: a model whose head reads the prompts too (``pool_prompts``).
    """
    if isinstance(model, AdaptiveViT) and model.config.pool_prompts:
        raise UserError("pool_prompts=True: the head reads prompts too, which are no features of the image")
    timm_model = cast(Any, model)
    pooled = timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)
    return F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def embed(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: torch.device | str = "cpu",
    amp: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the features (N, D) of all images, and their labels (N) if there are any; both on the CPU.

    Args:
        model: as for ``image_features``, on ``device``; it is left in eval mode.
        batches: of images (B, C, height, width), or of pairs of images and labels (B).
        device, amp: as for vapt_fast.training.evaluate.

    Raises:
        ValueError: no images.
    """
    device = torch.device(device)
    model.eval()
    features, labels = [], []
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch[0]
        if not isinstance(batch, Tensor):
            labels.append(torch.as_tensor(batch[1]).cpu())
        with autocast(device, amp):
            features.append(image_features(model, images.to(device)).cpu())
    if not features:
        raise ValueError("batches must have images, got none")
    return torch.cat(features), torch.cat(labels) if labels else None
