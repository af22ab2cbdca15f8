"""Every timm architecture that is served: the rewritten forward pass, the literal one, and timm's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from tiny import assert_same, bare, randomize, run, tiny_backbone, tiny_images, tiny_model
from torch import Tensor, nn

from vapt_fast import AdaptiveViT, PromptConfig
from vapt_fast.backbones import FAMILIES, Family, Positions, find_family, register, timm_modules
from vapt_fast.info import forward_report

ARCHITECTURES = timm.list_models(module=timm_modules())

# One architecture for each way in which families differ.
REPRESENTATIVES = {
    "vit": "vit_tiny_patch16_224",
    "registers and layer scale": "vit_small_patch14_reg4_dinov2",
    "average pooling, prefix tokens": "beit3_base_patch16_224",
    "attention pooling, no prefix": "vit_base_patch16_siglip_224",
    "average pooling, no prefix, GeGLU": "vitamin_small_224",
    "parallel blocks": "vit_base_patch16_18x2_224",
    "post-norm blocks": "vit_base_patch16_rpn_224",
    "hybrid": "vit_tiny_r_s16_p8_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "rotary": "eva02_tiny_patch14_224",
    "rotary by block": "vit_small_patch16_rope_mixed_224",
    "grouped queries": "vit_base_patch16_sapiens2",
    "relative positions": "beit_base_patch16_224",
    "naflex": "naflexvit_base_patch16_map",
}

PROMPTS = {
    "deep": {"kind": "deep", "prompt_dropout": 0.3},
    "shallow": {"kind": "shallow", "prompt_dropout": 0.3},
    "no convolution": {"conv_kernel": None},
    "depthwise": {"conv_shared": False},
    "padding": {"conv_kernel": 3, "conv_padding": 2},
    "depthwise padding": {"conv_shared": False, "conv_kernel": 3, "conv_padding": 1},
    "own projector": {"projector_shared": False},
    "learned scale": {"projector_scale_learnable": True},
    "own projector, learned scale": {"projector_shared": False, "projector_scale_learnable": True},
    "no projector": {"projector_dim": None},
    "gelu": {"projector_activation": "gelu"},
    "sigmoid": {"projector_activation": "sigmoid"},
    "softmax": {"projector_activation": "softmax"},
    "identity": {"projector_activation": "identity"},
    "no static block": {"static_depth": 0},
    "two static blocks": {"static_depth": 2},
    "only static blocks": {"static_depth": 99},
    "one prompt": {"num_prompts": 1},
    "more prompts than tokens": {"num_prompts": 20},
}

# Options of timm that no architecture of that family has by default.
VARIANTS = [
    ("vit_tiny_patch16_224", {"qk_norm": True}),
    ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    ("vit_tiny_patch16_224", {"scale_attn_norm": True, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "pos_embed": "none"}),
    ("vit_tiny_patch16_224", {"global_pool": "max"}),
    ("vit_tiny_patch16_224", {"global_pool": "avgmax", "fc_norm": True, "reg_tokens": 2}),
    ("vit_tiny_patch16_224", {"global_pool": "map"}),
    ("vit_tiny_patch16_224", {"pre_norm": True, "init_values": 0.1, "dynamic_img_size": True}),
    ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}),
    ("vit_tiny_patch16_224", {"use_naflex": True}),
    ("vit_tiny_patch16_224", {"num_classes": 0}),
    ("vit_tiny_patch16_224", {"in_chans": 1}),
    ("deit_tiny_distilled_patch16_224", {"qk_norm": True}),
    ("eva02_tiny_patch14_224", {"global_pool": "token"}),
    ("eva02_tiny_patch14_224", {"qkv_fused": True, "qkv_bias": False}),
    ("eva02_tiny_patch14_224", {"qk_norm": True, "scale_attn_inner": True, "global_pool": "token"}),
    ("eva02_tiny_patch14_224", {"dynamic_img_size": True, "num_reg_tokens": 3}),
    ("vit_small_patch16_dinov3", {"global_pool": "token"}),
    ("vit_small_patch16_rope_mixed_224", {"use_naflex": True}),
    ("beit_base_patch16_224", {"global_pool": "token"}),
    ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}),
    ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "global_pool": "token"}),
    ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "init_values": None}),
    ("naflexvit_base_patch16_gap", {"global_pool": "token", "class_token": True, "qk_norm": True}),
    ("naflexvit_base_patch16_gap", {"rope_type": "axial"}),
    ("naflexvit_base_patch16_gap", {"rope_type": "mixed", "global_pool": "max"}),
]


def assert_backends_agree(model: AdaptiveViT, seed: int = 0) -> None:
    images = tiny_images(model)
    expected = run(model, images, "reference", seed)
    assert_same(run(model, images, "torch", seed), expected)
    for name, tensor in expected.items():
        assert tensor.abs().max() > 1e-8, f"{name} is zero: this proves nothing"


# ---- every architecture


EVERY = [
    pytest.param(name, marks=() if name in REPRESENTATIVES.values() else pytest.mark.full)
    for name in ARCHITECTURES
]


@pytest.fixture(scope="module", params=EVERY)
def model(request: pytest.FixtureRequest) -> AdaptiveViT:
    return tiny_model(request.param)


def test_backends_agree(model: AdaptiveViT) -> None:
    assert_backends_agree(model)


def test_no_prompts_is_timm(model: AdaptiveViT) -> None:
    images = tiny_images(model)
    backbone = bare(model)
    probe = AdaptiveViT(backbone, prompts=PromptConfig(num_prompts=0)).eval()
    with torch.no_grad():
        expected, prompted = backbone(images), model(images)
        assert_same({"logits": probe(images)}, {"logits": expected}, 1e-12)
    assert (prompted - expected).abs().max() > 1e-3, "the prompts have no effect"


def test_only_prompts_and_head_learn(model: AdaptiveViT) -> None:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in trainable if name.startswith(("adapters.default.head",))}
    assert heads
    prompts = {f"adapters.default.prompts.{name}" for name, _ in model.prompts.named_parameters()}
    assert trainable - heads == prompts


def test_all_architectures_are_here() -> None:
    """The modules that we take are those whose namespace holds a class that we serve."""
    modules = {timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    serving = {
        module.removeprefix("timm.models.")
        for module in modules
        if module.startswith("timm.models.")
        and any(
            isinstance(it, type) and issubclass(it, tuple(family.timm_class for family in FAMILIES))
            for it in vars(sys.modules[module]).values()
        )
    }
    assert serving == set(timm_modules())
    assert len(ARCHITECTURES) >= 285


# ---- options of the prompts and of timm


# All options with the first architecture, and a third of them with each of the others, which take turns.
COMBINATIONS = [
    pytest.param(
        *(architecture, PROMPTS[options]),
        id=f"{options}-{name}",
        marks=pytest.mark.full if i and (i + j) % 3 else (),
    )
    for i, (name, architecture) in enumerate(REPRESENTATIVES.items())
    for j, options in enumerate(PROMPTS)
]


@pytest.mark.parametrize(("architecture", "options"), COMBINATIONS)
def test_prompt_options(architecture: str, options: dict[str, Any]) -> None:
    """In training mode, with every dropout, under one seed."""
    dropouts = {"projector_dropout": 0.3, "channel_dropout": 0.3}
    config = PromptConfig(**{"num_prompts": 3, "projector_dim": 4} | dropouts | options)
    model = tiny_model(architecture, prompts=config, drop_rate=0.3).train()
    images = tiny_images(model)
    expected = run(model, images, "reference", seed=1)
    assert_same(run(model, images, "torch", seed=1), expected)
    with torch.no_grad():
        assert (model.eval()(images) - expected["logits"]).abs().max() > 1e-3, "nothing was dropped"


@pytest.mark.parametrize("kind", ["adaptive", "deep", "shallow"])
@pytest.mark.parametrize(
    "architecture",
    [
        "vit_base_patch16_siglip_gap_224",
        "vit_base_patch16_reg4_gap_256",
        "vit_small_patch16_dinov3",
        "beit_base_patch16_224",
        "naflexvit_base_patch16_gap",
        "vit_base_patch16_rpn_224",
    ],
)
def test_pooled_prompts(architecture: str, kind: str) -> None:
    config = PromptConfig(kind=kind, num_prompts=3, projector_dim=4, pool_prompts=True)
    model = tiny_model(architecture, prompts=config)
    assert_backends_agree(model)
    other = AdaptiveViT(bare(model), prompts=PromptConfig(kind=kind, num_prompts=3, projector_dim=4)).eval()
    other.double().prompts.load_state_dict(model.prompts.state_dict())
    images = tiny_images(model)
    with torch.no_grad():
        assert (other(images) - model(images)).abs().max() > 1e-3, "pooling them changes nothing"


@pytest.mark.parametrize(("architecture", "options"), VARIANTS, ids=lambda value: str(value))
def test_timm_options(architecture: str, options: dict[str, Any]) -> None:
    model = tiny_model(architecture, **options)
    test_no_prompts_is_timm(model)
    assert_backends_agree(model)


@pytest.mark.parametrize("architecture", REPRESENTATIVES.values(), ids=REPRESENTATIVES)
def test_zero_initialisation(architecture: str) -> None:
    """The first adaptive prompts are exactly 0, where their LayerNorm multiplies by 1000."""
    config = PromptConfig(num_prompts=3, projector_dim=4)
    model = AdaptiveViT(tiny_backbone(architecture), prompts=config).double().eval()
    images = tiny_images(model)
    expected = run(model, images, "reference")
    assert_same(run(model, images), expected)
    assert expected["adapters.default.prompts.blocks.1.kernel"].abs().max() == 0
    assert expected["adapters.default.prompts.blocks.1.token_projection.weight"].abs().max() > 0


# ---- the definition, by other means


@pytest.mark.parametrize(
    "architecture",
    ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224",
     "deit_tiny_distilled_patch16_224", "vit_base_patch16_18x2_224"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_prompts_stand_after_the_prefix(architecture: str, kind: str) -> None:
    """VPT put into timm's own model with hooks: prompts in before a block, out after it."""
    model = tiny_model(architecture, prompts=PromptConfig(kind=kind, num_prompts=3))
    backbone, images = bare(model), tiny_images(model)
    start = backbone.num_prefix_tokens

    def insert(table: Tensor) -> Callable[..., Any]:
        def hook(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,) = inputs
            return (torch.cat([x[:, :start], table.expand(len(x), -1, -1), x[:, start:]], dim=1),)

        return hook

    def remove(block: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        return torch.cat([x[:, :start], x[:, start + 3 :]], dim=1)

    with torch.no_grad():
        expected = model(images)
        for block, static in zip(backbone.blocks, model.prompts.blocks, strict=False):
            block.register_forward_pre_hook(insert(static.table))
        for block in backbone.blocks if kind == "deep" else backbone.blocks[-1:]:
            block.register_forward_hook(remove)
        assert_same({"logits": backbone(images)}, {"logits": expected}, 1e-12)


# ---- a family from outside the package


class OwnBlock(Block):
    """A standard block of another class."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class OwnViT(nn.Module):
    """What a model must have, and no more."""

    embed_dim, num_prefix_tokens, num_classes, in_chans, global_pool = 32, 1, 3, 3, "token"

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed((32, 48), 16, embed_dim=32)
        self.first = nn.Parameter(torch.zeros(1, 1, 32))
        self.blocks = nn.Sequential(*(OwnBlock(32, 2, mlp_layer=OwnMlp) for _ in range(3)))
        self.norm, self.head_drop, self.head = nn.LayerNorm(32), nn.Dropout(0.0), nn.Linear(32, 3)

    def tokens(self, images: Tensor) -> Tensor:
        return torch.cat([self.first.expand(len(images), -1, -1), self.patch_embed(images).sin()], dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self.tokens(images)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head_drop(x[:, 0]) if pre_logits else self.head(self.head_drop(x[:, 0]))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class OwnMlp(Mlp):
    """A layer that acts by token, of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).sin())


class OwnFamily(Family):
    timm_class = OwnViT
    examples = "none"
    blocks = (OwnBlock,)
    layers = (OwnMlp,)

    def embed(
        self, model: OwnViT, images: Tensor, embed_patches: Callable[[nn.Module, Tensor], Tensor]
    ) -> tuple[Tensor, Positions]:
        return model.tokens(images), Positions()


@pytest.fixture
def families() -> Iterator[list[Family]]:
    """The list of families, which is afterwards what it was."""
    before = list(FAMILIES)
    yield FAMILIES
    FAMILIES[:] = before


def test_own_family(families: list[Family]) -> None:
    torch.manual_seed(0)
    backbone = OwnViT().double().eval()
    randomize(backbone, 0)
    config = PromptConfig(num_prompts=3, projector_dim=4)
    with pytest.raises(NotImplementedError, match="OwnViT"):
        AdaptiveViT(backbone, prompts=config)
    register(OwnFamily)
    model = AdaptiveViT(backbone, prompts=config).double().eval()
    randomize(model.prompts, 1)
    assert_backends_agree(model)
    test_no_prompts_is_timm(model)
    assert "as it is" not in forward_report(model)


@pytest.mark.parametrize("order", [1, -1])
def test_the_nearest_family_is_found(families: list[Family], order: int) -> None:
    child = type("Child", (OwnViT,), {})
    for family in (OwnFamily, type("ChildFamily", (OwnFamily,), {"timm_class": child}))[::order]:
        register(family)
    for family in families:
        assert find_family(family.timm_class.__new__(family.timm_class)) is family


# ---- what is refused


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("swin_tiny_patch4_window7_224", "swin_transformer"),
        ("hiera_tiny_224", "hiera"),
        ("samvit_base_patch16", "vision_transformer_sam"),
        ("cait_xxs24_224", "cait"),
        ("xcit_nano_12_p16_224", "xcit"),
        ("convnext_atto", "convnext"),
        ("resnet18", "resnet"),
    ],
)
def test_refused_families(architecture: str, family: str) -> None:
    with torch.device("meta"):
        backbone = timm.create_model(architecture)
    with pytest.raises(
        NotImplementedError, match=rf"{type(backbone).__name__} \(family '{family}'\)"
    ) as refusal:
        AdaptiveViT(backbone)
    for name in ("VisionTransformer", "Eva", "Beit", "NaFlexVit"):
        assert name in str(refusal.value)


def test_refused_by_name_before_weights_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("looked for"))
    for pretrained in (False, True):
        with pytest.raises(NotImplementedError, match="ResNet"):
            AdaptiveViT("resnet18", pretrained=pretrained)


@pytest.mark.parametrize(
    "architecture", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "naflexvit_base_patch16_gap"]
)
def test_patch_dropout_is_refused(architecture: str) -> None:
    with pytest.raises(NotImplementedError, match="patch_drop_rate"):
        tiny_model(architecture, patch_drop_rate=0.1)


def test_subclasses_with_their_own_way_are_refused() -> None:
    class Custom(VisionTransformer):
        def forward_features(self, x: Tensor) -> Tensor:
            return super().forward_features(x) * 2

    with pytest.raises(NotImplementedError, match="Custom overrides forward_features"):
        AdaptiveViT(Custom(img_size=32, embed_dim=32, depth=1, num_heads=2))
