"""What a timm Vision Transformer is: grid, prefix tokens, blocks, head. What can't be served is refused.

Everything that differs between timm's families is in this file, as stateless functions of the timm model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import timm
import torch
from timm.layers import GELU, Attention, AttentionRope, LayerNorm, LayerScale, Mlp
from timm.models import beit, eva, get_model_traits, vision_transformer
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .arguments import integer
from .resize import resize_backbone

__all__ = [
    "Positions",
    "StandardBlock",
    "call_block",
    "check_image_size",
    "check_supported",
    "embed",
    "grid_size",
    "head_names",
    "image_size",
    "num_pooled_rows",
    "patch_size",
    "remove_prompts",
    "set_image_size",
    "similar_names",
    "standard_block",
]

FAMILIES = (VisionTransformer, Eva, Beit, NaFlexVit)
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
    size = _pair("img_size", img_size, current)
    patches = _pair("patch_size", patch, patch_size(model))
    if any(pixels % side for pixels, side in zip(size, patches, strict=True)):
        raise ValueError(f"img_size must be a multiple of the patch size {patches}, got {size}")
    check_grid((size[0] // patches[0], size[1] // patches[1]))
    if isinstance(model, NaFlexVit):
        if patch is not None:
            raise ValueError("patch_size can't be changed on a NaFlexVit backbone; make a new one")
    else:
        resize_backbone(model, size, patches, old_size=current, old_patch=patch_size(model))
    return size


def _pair(name: str, value: object, default: tuple[int, int]) -> tuple[int, int]:
    if value is None:
        return default
    given = value.tolist() if hasattr(value, "tolist") else value
    sides = given if isinstance(given, (tuple, list)) else (given, given)
    try:
        height, width = (integer(name, side) for side in sides)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be (height, width) in pixels, got {value!r}") from None
    pair = (height, width)
    if min(pair) < 1:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return pair


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier modules within the backbone."""
    return ("head", "head_dist") if isinstance(model, VisionTransformerDistilled) else ("head",)


def num_pooled_rows(model: nn.Module) -> int | None:
    """How many first tokens are all that the head reads, None if it reads the patch tokens too."""
    if isinstance(model, VisionTransformerDistilled):
        return 2
    by_token = model.global_pool == "token" and getattr(model, "attn_pool", None) is None
    return 1 if by_token else None


def similar_names(name: str) -> list[str]:
    """A few names of timm models that begin like ``name``, for messages."""
    return timm.list_models(f"*{name.partition('.')[0][:8]}*")[:5]


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
        if bias is None or self.num_extra == 0:
            return bias
        for dim in (-2, -1):
            prefix, patches = bias.tensor_split([num_prefix], dim=dim)
            shape = list(bias.shape)
            shape[dim] = self.num_extra
            bias = torch.cat([prefix, bias.new_zeros(shape), patches], dim=dim)
        return bias


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
        return tokens, Positions(bias=model.rel_pos_bias() if model.rel_pos_bias is not None else None)
    return model.norm_pre(model._pos_embed(model.patch_embed(images))), Positions()


def call_block(model: nn.Module, index: int, tokens: Tensor, positions: Positions) -> Tensor:
    """Block ``index`` as timm defines it, on a sequence that holds ``positions.num_extra`` prompt tokens."""
    block = model.blocks[index]
    if isinstance(model, Beit):
        return _call_beit_block(block, tokens, positions, model.num_prefix_tokens)
    if positions.rope is not None:
        return block(tokens, rope=positions.sequence_rope(index))
    return block(tokens)


def _call_beit_block(block: beit.Block, tokens: Tensor, positions: Positions, num_prefix: int) -> Tensor:
    """timm's Beit block, with a bias of zero for prompts, which its own forward has no argument for."""
    attn = block.attn
    shared = positions.pad_bias(positions.bias, num_prefix)
    if not attn.window_size or positions.num_extra == 0:
        return block(tokens, shared_rel_pos_bias=shared)
    # Asked for from within the block's own forward, so that hooks and sharded weights keep working.
    own_bias = attn._get_rel_pos_bias
    attn._get_rel_pos_bias = lambda: positions.pad_bias(own_bias(), num_prefix)
    try:
        return block(tokens, shared_rel_pos_bias=shared)
    finally:
        del attn._get_rel_pos_bias


# ---- standard blocks, part by part


@dataclass(frozen=True)
class StandardBlock:
    """A pre-norm block, x + gain1 * attention(norm1(x)) then x + gain2 * mlp(norm2(x)), seen part by part.

    Attributes:
        block: timm's block.
        weights: rows of the query, key and value projections: one (3C, C) tensor or three.
        biases: likewise (3C,) or three of (C,), any of them None.
        num_heads, num_kv_heads, head_dim: h, heads of keys and values (fewer: grouped queries), d.
        rotate_half: which of the two layouts of rotary embeddings the block uses.
        bias: (1, h, T, T), added to the scores by this block itself, or None.
        mlp_norm: norm2 if it is a LayerNorm with affine and nothing more.
        gelu_mlp: fc1 and fc2 if the MLP is fc2(gelu(fc1(x))), with the exact GELU, and nothing more.
    """

    block: nn.Module
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotate_half: bool
    bias: Tensor | None
    mlp_norm: nn.LayerNorm | None
    gelu_mlp: tuple[nn.Linear, nn.Linear] | None

    @property
    def attn(self) -> nn.Module:
        return self.block.attn

    @property
    def q_norm(self) -> nn.Module | None:
        return _unless_identity(getattr(self.attn, "q_norm", None))

    @property
    def k_norm(self) -> nn.Module | None:
        return _unless_identity(getattr(self.attn, "k_norm", None))

    @property
    def out_norm(self) -> nn.Module | None:
        """A norm between attention and its projection ("scale norm")."""
        return _unless_identity(getattr(self.attn, "norm", None))

    @property
    def foldable_norm(self) -> nn.LayerNorm | None:
        """norm1 if it is a LayerNorm with affine, whose statistic and affine can be shared and folded."""
        return _layer_norm(self.block.norm1)

    @property
    def gain1(self) -> Tensor | None:
        """The layer scale (C,) of the attention branch, or None."""
        return _layer_scale(self.block, 1)

    @property
    def gain2(self) -> Tensor | None:
        """The layer scale (C,) of the MLP branch, or None."""
        return _layer_scale(self.block, 2)


def standard_block(block: nn.Module) -> StandardBlock | None:
    """``block`` part by part, or None if it must be called as it is.

    Types are compared exactly: a subclass, a LoRA layer or a parametrised one in the place of a Linear, or a
    hook or another forward on a module that would be bypassed, may do anything, and calling the block as it
    is respects that.
    """
    if type(block) not in (vision_transformer.Block, eva.EvaBlock, beit.Block):
        return None
    attn = block.attn
    if type(attn) is beit.Attention:
        weights, biases = (attn.qkv.weight,), (_beit_qkv_bias(attn),)
    elif type(attn) in (eva.EvaAttention, AttentionRope, Attention):
        if getattr(attn, "gate", None) is not None:
            return None
        if attn.qkv is not None:
            weights = (attn.qkv.weight,)
            separate = type(attn) is eva.EvaAttention
            biases = (_beit_qkv_bias(attn) if separate else attn.qkv.bias,)
        else:
            parts = (attn.q_proj, attn.k_proj, attn.v_proj)
            weights, biases = tuple(p.weight for p in parts), tuple(p.bias for p in parts)
    else:
        return None
    linears = [getattr(attn, name, None) for name in ("qkv", "q_proj", "k_proj", "v_proj", "proj")]
    linears = [linear for linear in linears if linear is not None]
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    scales = [getattr(block, name, None) for name in ("ls1", "ls2")]
    scales = [scale for scale in scales if scale is not None]
    if any(type(scale) not in (LayerScale, nn.Identity) for scale in scales):
        return None
    parts = (block, block.norm1, block.drop_path1, block.drop_path2, *scales, attn, *attn.children())
    if any(map(_is_altered, parts)):
        return None
    mlp_norm = block.norm2
    num_heads = attn.num_heads
    return StandardBlock(
        block=block,
        weights=weights,
        biases=biases,
        num_heads=num_heads,
        num_kv_heads=getattr(attn, "num_kv_heads", num_heads),
        head_dim=attn.proj.in_features // num_heads,
        rotate_half=getattr(attn, "rotate_half", False),
        bias=attn._get_rel_pos_bias() if getattr(attn, "window_size", None) else None,
        mlp_norm=None if _is_altered(mlp_norm) else _layer_norm(mlp_norm),
        gelu_mlp=_gelu_mlp(block.mlp),
    )


def _gelu_mlp(mlp: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    if type(mlp) is not Mlp or any(map(_is_altered, (mlp, *mlp.children()))):
        return None
    act, fc1, fc2 = mlp.act, mlp.fc1, mlp.fc2
    exact = type(act) is GELU or (type(act) is nn.GELU and act.approximate == "none")
    dropping = any(drop.training and drop.p for drop in (mlp.drop1, mlp.drop2))
    plain = type(fc1) is nn.Linear and type(fc2) is nn.Linear and type(mlp.norm) is nn.Identity
    return (fc1, fc2) if exact and plain and not dropping else None


def _is_altered(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than the forward of its class."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(hooks) or "forward" in module.__dict__  # PyTorch 2.8 doesn't compile vars(module)


def _beit_qkv_bias(attn: nn.Module) -> Tensor | None:
    """The joint bias of attentions that keep those of queries and values apart and have none for keys."""
    return None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _unless_identity(module: nn.Module | None) -> nn.Module | None:
    return None if isinstance(module, nn.Identity) else module


def _layer_norm(norm: nn.Module) -> nn.LayerNorm | None:
    affine = type(norm) in (nn.LayerNorm, LayerNorm) and norm.weight is not None and norm.bias is not None
    return norm if affine else None


def _layer_scale(block: nn.Module, branch: int) -> Tensor | None:
    if hasattr(block, "ls1"):
        return getattr(getattr(block, f"ls{branch}"), "gamma", None)
    return getattr(block, f"gamma_{branch}")
