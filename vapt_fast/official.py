"""State dicts under the names of the methods' public implementation, to and from AdaptiveViT.

Block i of the backbone is ``transformer.encoder.layer.{i}``. The learned table of block 0 is
``transformer.prompt_embeddings`` (1, P, C); those of the blocks after it are the rows of
``transformer.deep_prompt_embeddings`` (count, P, C). Of the j-th adaptive block, j from 0,
``transformer.deep_prompt_norm.{j}`` is the LayerNorm and ``transformer.deep_prompt_downsample.{j}`` holds the
convolution, ``.conv.kernel``, and the token projection, ``.linear``; without a convolution it is the token
projection itself. ``transformer.deep_prompt_embeddings_mlp`` is the projector of all blocks; where each block
has its own, ``.{j}`` follows. No name or shape tells the activation and the dropout rates. The names of the
prompts are those of each kind's ``official_names``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .arguments import integer, listing, size_pair
from .config import PromptConfig
from .model import DEFAULT_ADAPTER, AdaptiveViT
from .modules import class_of
from .prompts import AdaptivePrompts, StaticPrompts
from .source import misfits

__all__ = ["from_official", "to_official"]

NORM_EPS = 1e-6
ADAPTER = f"adapters.{DEFAULT_ADAPTER}."

PATCHES = "transformer.embeddings.patch_embeddings"
POSITIONS = "transformer.embeddings.position_embeddings"
LAYER = "transformer.encoder.layer"

# timm's names of modules with weight and bias, and the public ones
MODULES = {"patch_embed.proj": PATCHES, "norm": "transformer.encoder.encoder_norm"}
BLOCK_MODULES = {
    "norm1": "attention_norm",
    "attn.proj": "attn.out",
    "norm2": "ffn_norm",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
}


def from_official(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    prompts: PromptConfig,
    img_size: int | tuple[int, int] | None = None,
) -> AdaptiveViT:
    """The AdaptiveViT with the weights of a state dict of the public implementation.

    The backbone is timm's VisionTransformer with a class token, LayerNorm eps 1e-6 and exact GELU. Its
    dimensions come from the tensors' shapes. Tensors are copied and keep their dtypes.

    Args:
        state_dict: all tensors of the model: backbone, prompts and head.
        num_heads: h, which no shape tells.
        prompts: the options the model was trained with. Those that shapes tell are checked.
        img_size: (height, width) of the images in pixels, or one side of square ones. None for square
            images, whose size then follows from the position embeddings.

    Raises:
        TypeError: a value in ``state_dict`` is not a tensor.
        ValueError: missing, unexpected or wrongly shaped tensors, or options that contradict them; all listed
            at once.
    """
    wrong = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"state_dict must hold tensors only, got something else under {wrong}")
    model = AdaptiveViT(_build_backbone(state_dict, num_heads, img_size), prompts=prompts)
    _raise_any([*_contradictions(state_dict, model), *_misfits(state_dict, model)])
    # With assign, a parameter becomes the tensor given for it and so takes over its dtype.
    model.load_state_dict(_from_official_names(state_dict, model), assign=True)
    return model


def to_official(model: AdaptiveViT) -> dict[str, Tensor]:
    """The state dict of ``model`` under the public implementation's names, as copies of the tensors.

    Raises:
        ValueError: the model has what these names can't tell, such as another kind of backbone than
            ``from_official`` makes; lists every reason.
    """
    _raise_any(_inexpressible(model))
    own = model.state_dict()
    state = {official: own[name].clone() for name, official in _renamed(model).items()}
    for name, parts in _fused(model).items():
        rows = own[name].chunk(len(parts))
        state |= {part: value.clone() for part, value in zip(parts, rows, strict=True)}
    for official, names in _stacked(model).items():
        state[official] = torch.stack([own[name] for name in names])
    return state


def _from_official_names(state: Mapping[str, Tensor], model: AdaptiveViT) -> dict[str, Tensor]:
    """The inverse of ``to_official``: copies of the tensors under the names of ``model``'s state dict."""
    own = {name: state[official].clone() for name, official in _renamed(model).items()}
    own |= {name: torch.cat([state[part] for part in parts]) for name, parts in _fused(model).items()}
    for official, names in _stacked(model).items():
        own |= {name: table.clone() for name, table in zip(names, state[official], strict=True)}
    return own


# ---- names


def _renamed(model: AdaptiveViT) -> dict[str, str]:
    """Our names of the tensors that are the same on both sides, and the public names."""
    modules = {f"backbone.{ours}": theirs for ours, theirs in MODULES.items()} | {f"{ADAPTER}head": "head"}
    for i in range(len(model.backbone.blocks)):
        for ours, theirs in BLOCK_MODULES.items():
            modules[f"backbone.blocks.{i}.{ours}"] = f"{LAYER}.{i}.{theirs}"
    names = {
        "backbone.cls_token": "transformer.embeddings.cls_token",
        "backbone.pos_embed": POSITIONS,
    }
    for ours, theirs in modules.items():
        names |= {f"{ours}.weight": f"{theirs}.weight", f"{ours}.bias": f"{theirs}.bias"}
    for ours, public in model.prompts.official_names().items():
        if isinstance(public, str):
            names[f"{ADAPTER}prompts.{ours}"] = public
    return names


def _fused(model: AdaptiveViT) -> dict[str, list[str]]:
    """Our names of the joint projections of queries, keys and values, and the public names of their parts."""
    return {
        f"backbone.blocks.{i}.attn.qkv.{leaf}": [
            f"{LAYER}.{i}.attn.{part}.{leaf}" for part in ("query", "key", "value")
        ]
        for i in range(len(model.backbone.blocks))
        for leaf in ("weight", "bias")
    }


def _stacked(model: AdaptiveViT) -> dict[str, list[str]]:
    """The public names of the joint tables of prompts, and our names of their parts."""
    stacked: dict[str, list[str]] = {}
    for ours, public in model.prompts.official_names().items():  # in the order of their rows
        if not isinstance(public, str):
            stacked.setdefault(public[0], []).append(f"{ADAPTER}prompts.{ours}")
    return stacked


# ---- reading shapes


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many members of the module list ``prefix`` the names speak of."""
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in matches if match})


def _find_grid(
    num_patches: int, patch_size: tuple[int, int], img_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    if img_size is None:
        grid = (math.isqrt(max(num_patches, 0)),) * 2
        origin = "a square grid of patches; for other images pass img_size=(height, width)"
    else:
        height, width = size_pair("img_size", img_size)
        grid = (height // patch_size[0], width // patch_size[1])
        origin = f"{grid[0]}x{grid[1]} patches, from img_size={img_size} and patches of {patch_size}"
    _raise_any([f"{POSITIONS}: {num_patches} patches, expected {origin}"] * (math.prod(grid) != num_patches))
    return grid


def _build_backbone(
    state: Mapping[str, Tensor], num_heads: int, img_size: int | tuple[int, int] | None
) -> VisionTransformer:
    """A backbone of the dimensions that the tensors have."""
    sources = {
        f"{PATCHES}.weight": "(C, channels, height, width)",
        POSITIONS: "(1, 1 + N, C)",
        f"{LAYER}.0.ffn.fc1.weight": "(mlp, C)",
        "head.weight": "(classes, C)",
    }
    shapes = {name: tuple(state[name].shape) for name in sources if name in state}
    _raise_any(
        f"{name}: expected shape {expected}, got {shapes.get(name, 'no such tensor')}"
        for name, expected in sources.items()
        if len(shapes.get(name, ())) != expected.count(",") + 1
    )
    (dim, in_chans, *patch), (_, num_tokens, _), (mlp_dim, _), (num_classes, _) = map(
        shapes.__getitem__, sources
    )
    patch_size = patch[0], patch[1]
    grid = _find_grid(num_tokens - 1, patch_size, img_size)
    num_heads = integer("num_heads", num_heads)
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the {dim} channels of the tensors, got {num_heads}")
    return VisionTransformer(
        img_size=(grid[0] * patch_size[0], grid[1] * patch_size[1]),
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        global_pool="token",
        embed_dim=dim,
        depth=_count(state, LAYER),
        num_heads=num_heads,
        mlp_ratio=(mlp_dim + 0.5) / dim,  # timm rounds mlp_ratio * dim down
        qkv_bias=True,
        class_token=True,
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
        act_layer=nn.GELU,
        weight_init="skip",  # every weight is about to be replaced
    )


# ---- checks


def _contradictions(state: Mapping[str, Tensor], model: AdaptiveViT) -> Iterator[str]:
    """Where the tensors tell other options than those of ``model``."""
    prompts, classes = model.config, (StaticPrompts, AdaptivePrompts)
    expected = [sum(isinstance(block, cls) for block in model.prompts.blocks) for cls in classes]
    found = [cls.official_count(state) for cls in classes]
    if found != expected:
        yield (
            f"prompts.kind={prompts.kind!r} with num_prompts={prompts.num_prompts} and "
            f"static_depth={prompts.static_depth} makes {expected[0]} static tables and {expected[1]} "
            f"adaptive blocks of {len(model.backbone.blocks)}, the tensors have {found[0]} and {found[1]}"
        )
    told = StaticPrompts.official_options(state)
    if found[1] and expected[1]:
        told |= AdaptivePrompts.official_options(state, model.grid)
    for option, value in told.items():
        given = getattr(prompts, option)
        if given != value:
            yield f"prompts.{option} is {given!r}, the tensors tell {value!r}"


def _misfits(state: Mapping[str, Tensor], model: AdaptiveViT) -> Iterator[str]:
    """Missing, unexpected and unfit tensors of a state dict meant for ``model``."""
    yield from misfits(state, to_official(model))
    for name, value in state.items():
        if not value.is_floating_point():
            yield f"{name}: dtype {value.dtype}, expected floating-point numbers"
    for parts in _fused(model).values():
        dtypes = {state[part].dtype for part in parts if part in state}
        if len(dtypes) > 1:
            yield f"{', '.join(parts)}: must have one dtype, got {sorted(map(str, dtypes))}"


def _inexpressible(model: AdaptiveViT) -> Iterator[str]:
    """What of ``model`` the public implementation's state dicts can't tell."""
    backbone = model.backbone
    if class_of(backbone) is not VisionTransformer:
        yield f"backbone: {class_of(backbone).__name__}, expected timm's VisionTransformer"
        return
    if backbone.global_pool != "token":
        yield f"backbone.global_pool: {backbone.global_pool!r}, expected 'token'"
    if backbone.no_embed_class:
        yield "backbone.pos_embed: has no row for the class token, expected one"
    for name, module in backbone.named_modules():
        if isinstance(module, nn.LayerNorm) and module.eps != NORM_EPS:
            yield f"backbone.{name}: eps {module.eps}, expected {NORM_EPS}"
    for i, block in enumerate(backbone.blocks):
        if type(block) is not Block:
            yield f"backbone.blocks.{i}: {type(block).__name__}, expected timm's Block"
        elif not isinstance(block.mlp.act, nn.GELU) or block.mlp.act.approximate != "none":
            yield f"backbone.blocks.{i}.mlp.act: {block.mlp.act}, expected the exact GELU"
    if not isinstance(model.config.num_prompts, int):
        yield f"prompts.num_prompts: {model.config.num_prompts}, expected one number for all blocks"
        return
    own = model.state_dict().keys()
    known = (
        _renamed(model).keys()
        | _fused(model).keys()
        | {n for names in _stacked(model).values() for n in names}
    )
    yield from (f"{name}: has no public name" for name in sorted(own - known))
    yield from (f"{name}: missing, but has a public name" for name in sorted(known - own))


def _raise_any(problems: Iterator[str] | list[str]) -> None:
    problems = list(problems)
    if problems:
        raise ValueError(listing("state dict and model do not fit the public implementation", problems))
