"""Grad-CAM (Selvaraju et al. 2017): where the evidence for a class is, by the gradient of its logit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import integer
from ..modules import evaluating
from .tracing import block_index

if TYPE_CHECKING:
    from ..model import AdaptiveViT

__all__ = ["check_targets", "grad_cam", "normalise", "reshape_transform", "target_layers"]

_EPS = 1e-7  # pytorch-grad-cam's, so that the maps are the same


def target_layers(model: AdaptiveViT, block: int = -1) -> list[nn.Module]:
    """Return the layers whose output Grad-CAM looks at: the first norm of a block.

    In the last block of a model that pools its first token, a patch has its last say there: nothing reads the
    block's output for the patches. ``pytorch_grad_cam.GradCAM(model, target_layers(model),
    reshape_transform=reshape_transform(model))`` takes them.

    Raises:
        ValueError: there is no such block, or it has no ``norm1``.
    """
    index = block_index(model, block)
    chosen = model.backbone.blocks[index]
    norm = getattr(chosen, "norm1", None)
    if not isinstance(norm, nn.Module):
        raise ValueError(f"block must be one with a norm1, got {block}, a {type(chosen).__name__}")
    return [norm]


def reshape_transform(model: AdaptiveViT) -> Callable[[Tensor], Tensor]:
    """Return a function from tokens (B, T, C), prefix and prompts among them, to patches (B, C, H, W).

    Patches come last, whatever stands before them, so it suits every kind of prompts and of backbone.
    """

    def to_grid(tokens: Tensor) -> Tensor:
        grid = model.grid
        return tokens[:, -math.prod(grid) :].transpose(1, 2).unflatten(2, grid)

    return to_grid


def grad_cam(
    model: AdaptiveViT,
    images: Tensor,
    targets: int | Sequence[int] | Tensor | None = None,
    *,
    block: int = -1,
) -> Tensor:
    """Return the Grad-CAM of a class for each image, as pytorch-grad-cam computes it.

    A hook looks at the layer, so its block is called as it is. The model runs in eval mode, and the ``grad``
    of its parameters is left alone.

    Args:
        model: any, also one of which nothing is trainable; not with prompts of kind "kv" in that block, which
            have to take it apart.
        images: (B, in_chans, height, width), as the model takes them.
        targets: the class, one for all images or one each; None for the class that the model predicts.
        block: whose ``target_layers`` to look at.

    Returns:
        (B, H, W) over the patch grid, each from 0 to 1, in float32 at least; all zeros for an image of which
        no patch speaks for the class. Not differentiable. ``to_pixels`` brings them to the size of an image.

    Raises:
        TypeError, ValueError: no such class or block, or images that the model can't take.
        NotImplementedError: learned keys and values in that block.
    """
    (layer,) = target_layers(model, block)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # In a model of which nothing before this layer learns, it is the first to need a gradient.
        output = output if output.requires_grad else output.detach().requires_grad_()
        seen.append(output)
        return output

    hook = layer.register_forward_hook(keep)
    try:
        # What was compiled before does not call the hook.
        eager = torch.compiler.set_stance("force_eager")
        with evaluating(model), torch.inference_mode(False), torch.enable_grad(), eager:
            logits = model(images)
            indices = check_targets(targets, logits)
            chosen = logits.gather(1, indices.unsqueeze(1)).sum()
            (gradient,) = torch.autograd.grad(chosen, seen[-1])
    finally:
        hook.remove()
    to_grid = reshape_transform(model)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    activations, gradients = (to_grid(x.detach()).to(dtype) for x in (seen[-1], gradient))
    weights = gradients.mean((2, 3), keepdim=True)
    return normalise((weights * activations).sum(1).relu())


def check_targets(targets: int | Sequence[int] | Tensor | None, logits: Tensor) -> Tensor:
    """Return one class an image, int64 (B,), on the device of ``logits`` (B, classes).

    Raises:
        TypeError, ValueError: not one class, or one an image, or there is no such class.
    """
    batch, num_classes = logits.shape
    if targets is None:
        return logits.detach().argmax(1)
    if isinstance(targets, Tensor):
        targets = targets.tolist()
    numbers = list(targets) if isinstance(targets, Sequence) else [targets] * batch
    if len(numbers) != batch:
        raise ValueError(f"targets must be one class or one an image, {batch}, got {len(numbers)}")
    numbers = [integer("targets", number, minimum=0) for number in numbers]
    if numbers and max(numbers) >= num_classes:
        raise ValueError(f"targets must be classes below {num_classes}, got {max(numbers)}")
    return torch.tensor(numbers, dtype=torch.int64, device=logits.device)


def normalise(maps: Tensor) -> Tensor:
    """Return maps (B, H, W) scaled so that each reaches from 0 to 1; a constant one becomes 0."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (_EPS + maps.amax((1, 2), keepdim=True))
