"""What a timm Vision Transformer is, whatever its family: grid, prefix tokens, blocks, head.

A family's file defines what differs in it, as a subclass of ``Family``. The functions here find the family
of a model and apply it. All are stateless. What can't be served is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..arguments import size_pair
from ..modules import (
    enclosing,
    has_global_hooks,
    has_user_hooks,
    register_by_token,
    remember_forward,
    share_tensors,
    token_mixing_reason,
    weights_of,
)
from .positions import Positions, remove_prompts
from .resize import resize_backbone

Size = tuple[int, int]  # height, width


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


class Family:
    """What the models of one timm class have of their own; the methods here are those of most families.

    A subclass keeps nothing of a model. ``register`` makes it known.

    Attributes:
        timm_class: the class of the models. A subclass of it that passes through its blocks in its own way
            is refused.
        timm_modules: the modules of ``timm.models`` whose architectures belong to registered families.
        examples: well-known models, for messages.
        blocks: classes of standard blocks: x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x)), with the
            names of timm's own. Blocks of other classes are called as they are.
        attentions: classes of the attention in standard blocks: proj(softmax(scale * q k^T + bias) v), with
            the names of timm's own.
        layers: classes of other layers that act on each token by itself, besides those of timm.layers.
        head_names: names of the classifiers within the model.
    """

    timm_class: ClassVar[type[nn.Module]]
    timm_modules: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[str] = ""
    blocks: ClassVar[tuple[type[nn.Module], ...]] = ()
    attentions: ClassVar[tuple[type[nn.Module], ...]] = ()
    layers: ClassVar[tuple[type[nn.Module], ...]] = ()
    head_names: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self) -> None:
        self._pooling = {name: getattr(self.timm_class, name, None) for name in _POOLING}

    def prepare(self, model: TimmViT) -> None:
        """Change what has to be changed in a model before it can be called with prompts."""

    def patch_embed(self, model: TimmViT) -> Any:
        """Return the module that cuts images into patches."""
        return model.patch_embed

    def image_size(self, model: TimmViT) -> Size:
        """Return the (height, width), in pixels, of the images that the model was made for."""
        height, width = self.patch_embed(model).img_size
        return height, width

    def takes_any_grid(self, model: TimmViT) -> bool:
        """Return whether the model accepts images of other sizes than the one that it was made for."""
        return bool(getattr(model, "dynamic_img_size", False))

    def resize(self, model: TimmViT, size: Size, patch: Size, old_size: Size, old_patch: Size) -> None:
        """Make the model take images of ``size`` with patches of ``patch`` pixels, which suit each other."""
        resize_backbone(model, size, patch, old_size=old_size, old_patch=old_patch)

    def embed(
        self, model: Any, images: Tensor, embed_patches: Callable[[nn.Module, Tensor], Tensor]
    ) -> tuple[Tensor, Positions]:
        """Return the tokens (B, T, C) before block 0 and their positions.

        Args:
            model: the model.
            images: (B, in_chans, height, width).
            embed_patches: how the module that cuts images into patches is called with them.
        """
        tokens = model.patch_drop(model._pos_embed(embed_patches(model.patch_embed, images)))
        return model.norm_pre(tokens), Positions()

    def call_block(self, block: nn.Module, index: int, tokens: Tensor, positions: Positions) -> Any:
        """Return ``tokens`` (B, T, C) after ``block``, the model's block ``index``."""
        rope = positions.sequence_rope(index)
        return block(tokens) if rope is None else block(tokens, rope=rope)

    def pool(self, model: Any, tokens: Tensor, pool_type: str | None) -> Any:
        """Return the tokens (B, T, C) after the final norm pooled to (B, C), in the model's way for None."""
        return model.pool(tokens, pool_type)

    def head_inputs(self, model: TimmViT, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what each of ``head_names`` reads, (B, C), of tokens (B, T, C) after the final norm."""
        return (model.forward_head(tokens, pre_logits=True),)

    def num_pooled_rows(self, model: TimmViT) -> int | None:
        """Return how many first tokens are all that ``head_inputs`` reads; None if others, or it might."""
        by_token = model.global_pool == "token" and getattr(model, "attn_pool", None) is None
        return 1 if by_token and self._pools_as_timm(model) else None

    def _pools_as_timm(self, model: TimmViT) -> bool:
        return all(
            name not in model.__dict__ and getattr(type(model), name, None) is method
            for name, method in self._pooling.items()
        )


# How timm pools tokens; a class may lack one of these.
_POOLING = ("forward_head", "pool", "_pool")

# A family stands before those of its class's bases.
FAMILIES: list[Family] = []


def register(family: type[Family]) -> type[Family]:
    """Make a family known; a decorator of subclasses of Family."""
    bases = (i for i, known in enumerate(FAMILIES) if issubclass(family.timm_class, known.timm_class))
    FAMILIES.insert(next(bases, len(FAMILIES)), family())
    remember_forward(*family.blocks, *family.attentions)
    register_by_token(*family.layers)
    return family


def find_family(model: object) -> Family | None:
    """Return the family of ``model``; None if there is none."""
    for family in FAMILIES:  # not next() with a default, which PyTorch 2.8 can't compile
        if isinstance(model, family.timm_class):
            return family
    return None


def family_of(model: object) -> Family:
    """Return the family of ``model``.

    Raises:
        NotImplementedError: it belongs to none.
    """
    family = find_family(model)
    if family is None:
        module = type(model).__module__.rsplit(".", 1)[-1]
        raise NotImplementedError(
            f"backbone {type(model).__name__} (family {module!r}) is not supported: its tokens do not form "
            f"one sequence that prompts can join in every block. Supported timm classes: {supported()}"
        )
    return family


def supported() -> str:
    """Return the classes of all families, with examples, for messages."""
    return ", ".join(sorted(f"{family.timm_class.__name__} ({family.examples})" for family in FAMILIES))


def timm_modules() -> list[str]:
    """Return the timm modules all of whose architectures are supported, sorted."""
    return sorted({module for family in FAMILIES for module in family.timm_modules})


def check_supported(model: object) -> None:
    """Raise if prompts can't be put into ``model``, saying why and what is supported.

    Raises:
        TypeError: not a torch module.
        NotImplementedError: a family of models, or an option, that is not served.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"backbone must be a timm model or the name of one, got {type(model).__name__}")
    # Blocks are called one by one here, so a subclass with its own way through them would be bypassed.
    cls: Any = family_of(model).timm_class
    if cast(Any, type(model)).forward_features is not cls.forward_features:
        raise NotImplementedError(
            f"backbone {type(model).__name__} overrides forward_features() of timm's {cls.__name__}, which "
            f"vapt_fast replaces; expected one of timm's own classes: {supported()}"
        )
    dropout = getattr(model, "patch_drop", None)
    if not isinstance(dropout, (nn.Identity, type(None))):
        raise NotImplementedError(
            "backbone has patch_drop_rate > 0: prompts are computed from the whole grid of patches; "
            "create the backbone with patch_drop_rate=0"
        )


def adopt(model: nn.Module, *, shared: bool) -> TimmViT:
    """Return the timm model as an AdaptiveViT holds it: frozen, in eval mode, Enclosing as its ``blocks``.

    Args:
        model: a timm model that ``check_supported`` passes.
        shared: leave ``model`` as it is and take a copy that shares the memory of all weights but the head's;
            False to change ``model`` itself.
    """
    if shared:
        model = share_tensors(model, own=[getattr(model, name) for name in head_names(model)])
    vit = cast(TimmViT, model)
    family_of(vit).prepare(vit)
    enclosing(vit.blocks)
    enclosing(vit).requires_grad_(False).eval()
    return vit


# ---- sizes


def image_size(model: nn.Module) -> Size:
    """Return the (height, width), in pixels, of the images that the backbone was made for."""
    return family_of(model).image_size(cast(TimmViT, model))


def grid_size(model: nn.Module, image: Size) -> Size:
    """Return (H, W): patches along each side of an image of ``image`` pixels, (height, width)."""
    height, width = family_of(model).patch_embed(cast(TimmViT, model)).dynamic_feat_size(image)
    return height, width


def patch_size(model: nn.Module) -> Size:
    """Return the (height, width) in pixels of the part of an image that one token stands for."""
    height, width = family_of(model).patch_embed(cast(TimmViT, model)).feat_ratio(as_scalar=False)
    return height, width


def check_image_size(model: TimmViT, given: Size, expected: Size) -> None:
    """Raise ValueError unless images of ``given`` pixels have the grid of those of ``expected`` pixels."""
    if given == expected:
        return
    grid = grid_size(model, expected)
    if family_of(model).takes_any_grid(model) and grid_size(model, given) == grid:
        return
    raise ValueError(
        f"images must be {expected[0]}x{expected[1]} pixels (the prompts are made for {grid[0]}x{grid[1]} "
        f"patches), got {given[0]}x{given[1]}; resize the images, or call model.set_input_size({given})"
    )


def set_image_size(
    model: TimmViT,
    current: Size,
    img_size: Size | int | None,
    patch: Size | int | None,
    check_grid: Callable[[Size], None],
) -> Size:
    """Make the backbone take images of ``img_size`` with patches of ``patch``; returns the new image size.

    Args:
        model: the timm model.
        current: its image size.
        img_size, patch: new sizes in pixels; None leaves them.
        check_grid: called with the new grid before anything is changed; may raise.
    """
    old_patch = patch_size(model)
    size = current if img_size is None else size_pair("img_size", img_size)
    patches = old_patch if patch is None else size_pair("patch_size", patch)
    if any(pixels % side for pixels, side in zip(size, patches, strict=True)):
        raise ValueError(f"img_size must be a multiple of the patch size {patches}, got {size}")
    check_grid((size[0] // patches[0], size[1] // patches[1]))
    family_of(model).resize(model, size, patches, current, old_patch)
    return size


# ---- tokens and blocks


def embed(
    model: TimmViT,
    images: Tensor,
    embed_patches: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
) -> tuple[Tensor, Positions]:
    """Return images (B, in_chans, height, width) as tokens (B, T, C) before block 0, and their positions."""
    return family_of(model).embed(model, images, embed_patches)


def call_block(model: TimmViT, index: int, tokens: Tensor, positions: Positions) -> Tensor:
    """Call block ``index`` as timm defines it, on tokens with ``positions.num_extra`` prompts among them."""
    block = model.blocks[index]
    _check_offloading(block)
    return family_of(model).call_block(block, index, tokens, positions)


def _check_offloading(block: nn.Module) -> None:
    """Raise where timm would compute with a weight that accelerate has not brought back.

    Its attentions with a bias of their own read the weight of qkv, and don't call it.
    """
    attn: Any = getattr(block, "attn", None)
    if getattr(attn, "q_bias", None) is None or attn.qkv_bias_separate:
        return
    if hasattr(attn.qkv, "_hf_hook") and attn.qkv.weight.is_meta:
        name = type(block).__name__
        raise RuntimeError(
            f"{type(attn).__name__} reads attn.qkv.weight, which is offloaded and comes back only in calls "
            f"of attn.qkv; offload blocks as a whole, with preload_module_classes=[{name!r}]"
        )


# ---- pooling and heads


def normed_tokens(model: TimmViT, tokens: Tensor, extra: int) -> Tensor:
    """Return the tokens (B, T, C) after the final norm, without the ``extra`` prompts after the prefix."""
    return model.norm(remove_prompts(tokens, model.num_prefix_tokens, extra))


def pool(model: TimmViT, tokens: Tensor, pool_type: str | None) -> Tensor:
    """Return the tokens (B, T, C) after the final norm pooled to (B, C), in the backbone's way for None."""
    return family_of(model).pool(model, tokens, pool_type)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifiers within the backbone."""
    return family_of(model).head_names


def take_heads(model: TimmViT) -> dict[str, nn.Module]:
    """Return the classifiers by name, trainable; ``model`` is left without them."""
    heads = {name: getattr(model, name).requires_grad_(True) for name in head_names(model)}
    for name in heads:
        setattr(model, name, nn.Identity())
    model.num_classes = 0
    return heads


def copy_heads(model: TimmViT) -> dict[str, nn.Module]:
    """Return frozen copies of the classifiers by name."""
    return {name: copy.deepcopy(getattr(model, name)).requires_grad_(False) for name in head_names(model)}


def head_inputs(model: TimmViT, tokens: Tensor) -> tuple[Tensor, ...]:
    """Return what each classifier reads, (B, C): tokens (B, T, C) after the final norm, pooled as timm does.

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
    return family_of(model).head_inputs(model, tokens)


def num_pooled_rows(model: TimmViT) -> int | None:
    """Return how many first tokens are all that the head reads, None if it reads the others too, or might.

    It might if the final norm or the pooling is not timm's.
    """
    if (
        has_global_hooks()
        or has_user_hooks(model.blocks)
        or token_mixing_reason(model.norm, "norm") is not None
    ):
        return None
    return family_of(model).num_pooled_rows(model)
