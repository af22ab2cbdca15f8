"""timm's Vision Transformers: base.py has what they share, one file a family what differs."""

from importlib import import_module
from pkgutil import iter_modules

from .base import (
    FAMILIES,
    Family,
    TimmViT,
    adopt,
    call_block,
    check_image_size,
    check_supported,
    copy_heads,
    embed,
    find_family,
    grid_size,
    head_inputs,
    head_names,
    image_size,
    normed_tokens,
    num_pooled_rows,
    patch_size,
    pool,
    register,
    set_image_size,
    take_heads,
    timm_modules,
)
from .positions import Positions, remove_prompts

__all__ = [
    "FAMILIES",
    "Family",
    "Positions",
    "TimmViT",
    "adopt",
    "call_block",
    "check_image_size",
    "check_supported",
    "copy_heads",
    "embed",
    "find_family",
    "grid_size",
    "head_inputs",
    "head_names",
    "image_size",
    "normed_tokens",
    "num_pooled_rows",
    "patch_size",
    "pool",
    "register",
    "remove_prompts",
    "set_image_size",
    "take_heads",
    "timm_modules",
]

for _module in iter_modules(__path__):  # each family registers itself
    import_module(f"{__name__}.{_module.name}")
