"""What a timm Vision Transformer is: grid, prefix tokens, blocks, head. What can't be served is refused.

Everything that differs between timm's families is in this file, as stateless functions of the timm model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from timm.models import beit, get_model_traits
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..arguments import size_pair
from ..modules import (
    enclosing,
    has_global_hooks,
    has_user_hooks,
    share_tensors,
    token_mixing_reason,
    weights_of,
)
from ..resize import resize_backbone

__all__ = [
    "BeitAttention",
    "Positions",
    "TimmViT",
    "adopt",
    "call_block",
    "check_image_size",
    "check_supported",
    "embed",
    "grid_size",
    "head_inputs",
    "head_names",
    "image_size",
    "num_pooled_rows",
    "patch_size",
    "remove_prompts",
    "set_image_size",
    "take_heads",
]


class TimmViT(nn.Module):
    """The attributes of timm's Vision Transformers that are used here, for type checkers.

    It is a name for what the models have in common, not a base class: none of them is an instance.
    """

    blocks: nn.Sequential
    norm: nn.Module
    head: nn.Module
    head_drop: nn.Module
    embed_dim: int
    num_features: int
    head_hidden_size: int
    num_prefix_tokens: int
    num_classes: int
    in_chans: int
    global_pool: str
    feature_info: list[dict[str, Any]]
    forward_head: Callable[..., Tensor]
    reset_classifier: Callable[..., None]
    prune_intermediate_layers: Callable[..., list[int]]
    no_weight_decay: Callable[[], set[str]]
    group_matcher: Callable[..., dict[str, Any]]


FAMILIES = (VisionTransformer, Eva, Beit, NaFlexVit)
# How timm pools tokens; a family may lack one of these.
_POOLING = {
    family: {name: getattr(family, name, None) for name in ("forward_head", "pool", "_pool")}
    for family in FAMILIES
}
SUPPORTED = (
    "VisionTransformer (ViT, DeiT and distilled DeiT, CLIP, SigLIP, DINOv2, MAE, hybrids, ViTamin, ...), "
    "Eva (EVA02, DINOv3, PE, RoPE ViTs), Beit and NaFlexVit (fixed grid)"
)


def check_supported(model: object) -> None:
    """Raise if prompts can't be put into ``model``, saying why and what is supported.

    Raises:
        TypeError: not a torch module.
        NotImplementedError: a family of models, or an option, that is not served.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"backbone must be a timm model or the name of one, got {type(model).__name__}")
    family = next((family for family in FAMILIES if isinstance(model, family)), None)
    name = type(model).__name__
    if family is None:
        module = type(model).__module__.rsplit(".", 1)[-1]
        raise NotImplementedError(
            f"backbone {name} (family {module!r}) is not supported: its tokens do not form one sequence that "
            f"prompts can join in every block. Supported timm classes: {SUPPORTED}"
        )
    # Blocks are called one by one here, so a subclass with its own way through them would be bypassed.
    overridden = type(model).forward_features is not family.forward_features
    if overridden and not isinstance(model, VisionTransformerDistilled):
        raise NotImplementedError(
            f"backbone {name} overrides forward_features() of timm's {family.__name__}, which vapt_fast "
            f"replaces; expected one of timm's own classes: {SUPPORTED}"
        )
    dropout = getattr(model, "patch_drop", None)
    if not isinstance(dropout, (nn.Identity, type(None))):
        raise NotImplementedError(
            "backbone has patch_drop_rate > 0: prompts are computed from the whole grid of patches; "
            "create the backbone with patch_drop_rate=0"
        )


def adopt(model: nn.Module, *, shared: bool) -> TimmViT:
    """The timm model as an AdaptiveViT holds it: frozen, in eval mode; it and its ``blocks`` are Enclosing.

    Args:
        model: a timm model that ``check_supported`` passes.
        shared: leave ``model`` as it is and take a copy that shares the memory of all weights but the head's;
            False to change ``model`` itself.
    """
    if shared:
        model = share_tensors(model, own=[getattr(model, name) for name in head_names(model)])
    for module in model.modules():
        if type(module) is beit.Attention:
            module.__class__ = BeitAttention
    enclosing(model.blocks)
    return cast(TimmViT, enclosing(model).requires_grad_(False).eval())


def _patch_embed(model: nn.Module) -> nn.Module:
    return model.embeds if isinstance(model, NaFlexVit) else model.patch_embed


def image_size(model: nn.Module) -> tuple[int, int]:
    """(height, width), in pixels, of the images the backbone was made for."""
    if not isinstance(model, NaFlexVit):
        return tuple(model.patch_embed.img_size)
    # It takes any size, and its positions have a grid of their own: what timm was asked for comes first.
    configured = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    size = get_model_traits(model).get("img_size") or (configured and configured[-2:])
    if size:
        return tuple(size)
    height, width = model.embeds.pos_embed_grid_size or (0, 0)
    patch_height, patch_width = patch_size(model)
    return height * patch_height, width * patch_width


def grid_size(model: nn.Module, image: tuple[int, int] | None = None) -> tuple[int, int]:
    """(H, W): patches along each side of an image of ``image`` pixels (default: the backbone's own size)."""
    return tuple(_patch_embed(model).dynamic_feat_size(image or image_size(model)))


def patch_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) of a patch in pixels; for a hybrid, of the part of the image one token stands for."""
    return tuple(_patch_embed(model).feat_ratio(as_scalar=False))


def takes_any_grid(model: nn.Module) -> bool:
    """Whether the backbone itself accepts images of other sizes than the one it was made for."""
    return isinstance(model, NaFlexVit) or bool(getattr(model, "dynamic_img_size", False))


def check_image_size(model: nn.Module, given: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raise ValueError unless images of ``given`` pixels have the grid of those of ``expected`` pixels."""
    if given == expected or (takes_any_grid(model) and grid_size(model, given) == grid_size(model, expected)):
        return
    grid = grid_size(model, expected)
    raise ValueError(
        f"images must be {expected[0]}x{expected[1]} pixels (the prompts are made for {grid[0]}x{grid[1]} "
        f"patches), got {given[0]}x{given[1]}; resize the images, or call model.set_input_size({given})"
    )


def set_image_size(
    model: nn.Module,
    current: tuple[int, int],
    img_size: tuple[int, int] | int | None,
    patch: tuple[int, int] | int | None,
    check_grid: Callable[[tuple[int, int]], None],
) -> tuple[int, int]:
    """Make the backbone take images of ``img_size`` with patches of ``patch``; returns the new image size.

    Args:
        model: the timm model.
        current: its image size.
        img_size, patch: new sizes in pixels; None leaves them.
        check_grid: called with the new grid before anything is changed; may raise.
    """
    size = current if img_size is None else size_pair("img_size", img_size)
    patches = patch_size(model) if patch is None else size_pair("patch_size", patch)
    if any(pixels % side for pixels, side in zip(size, patches, strict=True)):
        raise ValueError(f"img_size must be a multiple of the patch size {patches}, got {size}")
    check_grid((size[0] // patches[0], size[1] // patches[1]))
    if isinstance(model, NaFlexVit):
        if patch is not None:
            raise ValueError("patch_size can't be changed on a NaFlexVit backbone; make a new one")
    else:
        resize_backbone(model, size, patches, old_size=current, old_patch=patch_size(model))
    return size


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier modules within the backbone."""
    return ("head", "head_dist") if isinstance(model, VisionTransformerDistilled) else ("head",)


def take_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier modules by name, trainable; ``model`` is left without them."""
    heads = {name: getattr(model, name).requires_grad_(True) for name in head_names(model)}
    for name in heads:
        setattr(model, name, nn.Identity())
    model.num_classes = 0
    return heads


def head_inputs(model: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
    """What each classifier reads, (B, C): tokens (B, T, C) after the final norm, pooled as timm does.

    Raises:
        ValueError: someone gave the backbone a head again, which nobody would call.
    """
    for name in head_names(model):
        head = getattr(model, name)
        if weights_of(head, most=1):
            raise ValueError(
                f"model.backbone.{name} must be an Identity, got a {type(head).__name__}: the head is "
                f"the adapter's; set model.{name} or call model.reset_classifier() instead"
            )
    if isinstance(model, VisionTransformerDistilled):
        return model.head_drop(tokens[:, 0]), model.head_drop(tokens[:, 1])
    return (model.forward_head(tokens, pre_logits=True),)


def num_pooled_rows(model: nn.Module) -> int | None:
    """How many first tokens are all that the head reads, None if it reads the patch tokens too, or might.

    It might if the final norm or the pooling is not timm's.
    """
    if (
        has_global_hooks()
        or has_user_hooks(model.blocks)
        or token_mixing_reason(model.norm, "norm") is not None
    ):
        return None
    if isinstance(model, VisionTransformerDistilled):
        return 2
    by_token = model.global_pool == "token" and getattr(model, "attn_pool", None) is None
    return 1 if by_token and _pools_as_timm(model) else None


def _pools_as_timm(model: nn.Module) -> bool:
    family = next(family for family in FAMILIES if isinstance(model, family))
    pooling = _POOLING[family].items()
    return all(name not in model.__dict__ and getattr(type(model), name, None) is it for name, it in pooling)


def remove_prompts(tokens: Tensor, num_prefix: int, count: int) -> Tensor:
    """The tokens (B, T, C) without the ``count`` prompt tokens after the prefix."""
    return torch.cat([tokens[:, :num_prefix], tokens[:, num_prefix + count :]], dim=1) if count else tokens


# ---- positions


@dataclass(frozen=True)
class Positions:
    """Where the tokens are, in the forms that blocks are told.

    Attributes:
        rope: sines and cosines (N, 2d) of the patch tokens, or (L, h, N, 2d) where they differ by block.
        rope_by_block: whether the first dimension of ``rope`` is the block.
        bias: (h, T, T) or (1, h, T, T), added to the attention scores of every block, or None.
        num_extra: prompt tokens that stand between the prefix and the patch tokens. They have no position:
            rotary embeddings leave them as they are, and their attention bias is zero.
    """

    rope: Tensor | None = None
    rope_by_block: bool = False
    bias: Tensor | None = None
    num_extra: int = 0

    def with_extra(self, count: int) -> Positions:
        """The same positions with ``count`` more prompt tokens in the sequence."""
        return replace(self, num_extra=self.num_extra + count)

    def patch_rope(self, block: int) -> Tensor | None:
        """The rotary embedding of the patch tokens alone for block ``block``."""
        return self.rope[block] if self.rope_by_block else self.rope

    def sequence_rope(self, block: int) -> Tensor | None:
        """The rotary embedding of prompt and patch tokens: rotation by 0 (sine 0, cosine 1) for prompts."""
        rope = self.patch_rope(block)
        if rope is None or self.num_extra == 0:
            return rope
        *lead, _, width = rope.shape
        sine = rope.new_zeros(*lead, self.num_extra, width // 2)
        return torch.cat([torch.cat([sine, torch.ones_like(sine)], dim=-1), rope], dim=-2)

    def pad_bias(self, bias: Tensor | None, num_prefix: int) -> Tensor | None:
        """``bias`` (..., T, T) with zero rows and columns for the prompt tokens after the prefix."""
        return bias if bias is None or self.num_extra == 0 else _pad_bias(bias, self.num_extra, num_prefix)


def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, Positions]:
    """Everything before block 0: images (B, in_chans, height, width) to tokens (B, T, C) and positions."""
    if isinstance(model, NaFlexVit):
        embedded = model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
        return embedded["patches"], Positions(embedded["rope_embeds"], model.rope_is_mixed)
    if isinstance(model, Eva):
        tokens, rope = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(tokens), Positions(rope, model.rope_mixed)
    if isinstance(model, Beit):
        patches = model.patch_embed(images)
        tokens = torch.cat([model.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        tokens = model.pos_drop(tokens)
        return tokens, Positions(bias=model.rel_pos_bias() if model.rel_pos_bias is not None else None)
    tokens = model.patch_drop(model._pos_embed(model.patch_embed(images)))
    return model.norm_pre(tokens), Positions()


def call_block(model: nn.Module, index: int, tokens: Tensor, positions: Positions) -> Tensor:
    """Block ``index`` as timm defines it, on a sequence that holds ``positions.num_extra`` prompt tokens."""
    block = model.blocks[index]
    _check_offloading(block)
    if isinstance(model, Beit):
        return block(tokens, shared_rel_pos_bias=positions.bias)
    if positions.rope is not None:
        return block(tokens, rope=positions.sequence_rope(index))
    return block(tokens)


def _check_offloading(block: nn.Module) -> None:
    """Raise where timm would compute with a weight that accelerate has not brought back.

    Its attentions with a bias of their own read the weight of qkv, and don't call it.
    """
    attn = getattr(block, "attn", None)
    if getattr(attn, "q_bias", None) is None or attn.qkv_bias_separate:
        return
    if hasattr(attn.qkv, "_hf_hook") and attn.qkv.weight.is_meta:
        name = type(block).__name__
        raise RuntimeError(
            f"{type(attn).__name__} reads attn.qkv.weight, which is offloaded and comes back only in calls "
            f"of attn.qkv; offload blocks as a whole, with preload_module_classes=[{name!r}]"
        )


class BeitAttention(beit.Attention):
    """timm's attention with a relative position bias, for sequences with prompts, whose bias is zero.

    It takes the biases as they are for a sequence without prompts, and knows the number of prompts from the
    sequence: they stand between the CLS token and the patch tokens.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """As timm's."""
        own, shared = self.relative_position_index, shared_rel_pos_bias
        if own is None and shared is None:
            return super().forward(x)
        count = x.shape[1] - (shared if own is None else own).shape[-1]
        if count == 0:
            return super().forward(x, shared_rel_pos_bias=shared)
        outer, _prompts_in_sequence.count = _prompts_in_sequence.count, count
        try:
            shared = None if shared is None else _pad_bias(shared, count, num_prefix=1)
            return super().forward(x, shared_rel_pos_bias=shared)
        finally:
            _prompts_in_sequence.count = outer

    def _get_rel_pos_bias(self) -> Tensor:
        return _pad_bias(super()._get_rel_pos_bias(), _prompts_in_sequence.count, num_prefix=1)


class _PromptsInSequence(threading.local):
    """How many prompts the sequence holds that a BeitAttention of this thread is called with."""

    count: int = 0


_prompts_in_sequence = _PromptsInSequence()


def _pad_bias(bias: Tensor, count: int, num_prefix: int) -> Tensor:
    """``bias`` (..., T, T) with zero rows and columns for ``count`` prompt tokens after the prefix."""
    for dim in (-2, -1):
        prefix, patches = bias.tensor_split([num_prefix], dim=dim)
        shape = list(bias.shape)
        shape[dim] = count
        bias = torch.cat([prefix, bias.new_zeros(shape), patches], dim=dim)
    return bias
