"""A timm model for images and patches of another size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["resize_backbone"]

# The attribute of a timm model that keeps what resampling has replaced.
_ORIGINALS = "_vapt_fast_originals"


@dataclass(frozen=True)
class _Originals:
    """The parameters of a backbone before timm resampled them.

    Attributes:
        size, patch: height and width of images and patches, pixels, that they were made for.
        values: the parameters as they were, by name.
        resampled: the parameters that came in their places.
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    values: dict[str, Tensor]
    resampled: dict[str, Tensor]


def resize_backbone(
    model: nn.Module,
    new_size: tuple[int, int],
    new_patch: tuple[int, int],
    *,
    old_size: tuple[int, int],
    old_patch: tuple[int, int],
) -> None:
    """Let timm resample what depends on the sizes of images and patches, always from the original values.

    The positions of a frozen backbone then depend on its weights and the size only, not on the sizes in
    between: 64 to 96 and back to 64 pixels gives the same bits as before. If the resampled parameters have
    been replaced since, by a state dict for instance, then those are the originals.

    Args:
        model: a timm model with ``set_input_size``.
        new_size, new_patch: (height, width) in pixels, which suit each other.
        old_size, old_patch: those that ``model`` has now.
    """
    kept: _Originals | None = getattr(model, _ORIGINALS, None)
    if kept is not None and _are_current(model, kept.resampled):
        _set_input_size(model, kept.size, kept.patch, current_patch=old_patch)
        for name, value in kept.values.items():
            _replace(model, name, value)
        old_size, old_patch = kept.size, kept.patch
    before = dict(model.named_parameters())
    _set_input_size(model, new_size, new_patch, current_patch=old_patch)
    after = dict(model.named_parameters())
    replaced = [name for name, parameter in before.items() if after[name] is not parameter]
    values, resampled = ({name: of[name].detach() for name in replaced} for of in (before, after))
    resampled = {name: value.clone() for name, value in resampled.items()}
    setattr(model, _ORIGINALS, _Originals(old_size, old_patch, values, resampled) if replaced else None)


def _set_input_size(
    model: nn.Module, size: tuple[int, int], patch: tuple[int, int], *, current_patch: tuple[int, int]
) -> None:
    set_input_size: Any = model.set_input_size
    set_input_size(img_size=size, patch_size=None if patch == current_patch else patch)


def _are_current(model: nn.Module, values: dict[str, Tensor]) -> bool:
    """Whether the parameters of these names have these values, in whatever dtype they are now."""
    own = dict(model.named_parameters())
    return all(
        own[name].shape == value.shape and torch.equal(own[name].detach(), value.to(own[name]))
        for name, value in values.items()
    )


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    setattr(
        model.get_submodule(path),
        leaf,
        nn.Parameter(value.to(old, copy=True), requires_grad=old.requires_grad),
    )
