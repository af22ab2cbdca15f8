"""What others do to a model's modules: hooks, another forward, another module, other attributes, other modes.

Whatever it is, the literal method respects it, and the rewritten one gives the same numbers and gradients.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm.layers
import torch
from timm.models import beit, eva, vision_transformer
from tiny import Scaled, assert_alike, assert_same, randomize, run, tiny_images, tiny_model
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

from vapt_fast import AdaptiveViT, PromptConfig, use_backend
from vapt_fast.prompts import AdaptivePrompts, Projector

VIT = "vit_base_patch16_224"
EVA = "eva02_tiny_patch14_224"
BEIT = "beit_base_patch16_224"
OPTIONS = {"init_values": 0.5, "qk_norm": True}
PROMPTS = PromptConfig(num_prompts=3, projector_dim=4, projector_dropout=0.3, channel_dropout=0.3)
OWN_PROJECTOR = PromptConfig(num_prompts=3, projector_dim=4, projector_shared=False)

BLOCK_PARTS = [
    *("", "norm1", "attn", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.proj"),
    *("attn.proj_drop", "ls1", "drop_path1", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm"),
    *("mlp.fc2", "mlp.drop2", "ls2", "drop_path2"),
]
PARTS = [f"blocks.{i}.{part}".rstrip(".") for i in (1, 2) for part in BLOCK_PARTS]
PARTS += [
    "patch_embed",
    "patch_embed.proj",
    "pos_drop",
    "patch_drop",
    "norm_pre",
    "norm",
    "fc_norm",
    "head_drop",
]
PROMPT_PARTS = ["", "norm", "token_projection", "projector", "projector.down", "projector.up"]


def mixing(out: Any) -> Any:
    """A change of every token that depends on all of them: (B, T, C), (B, h, T, d) or (B, C, H, W)."""
    if isinstance(out, tuple):
        return tuple(map(mixing, out))
    return out + torch.sin(2 * out + out.mean((2, 3) if out.ndim == 4 else 1, keepdim=True))


def mixing_hook(module: nn.Module, inputs: Any, out: Any) -> Any:
    return mixing(out)


class Mixing(nn.Module):
    """A module in the place of another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return mixing(self.inner(*args, **kwargs))


class LowRank(nn.Module):
    """A Linear with a low-rank branch that learns."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        options = {"bias": False, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Linear(base.in_features, rank, **options)
        self.up = nn.Linear(rank, base.out_features, **options)
        randomize(self.down, 1)
        randomize(self.up, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.fixture(scope="module")
def original() -> AdaptiveViT:
    return tiny_model(VIT, prompts=PROMPTS, **OPTIONS).train()


@pytest.fixture
def model(original: AdaptiveViT) -> AdaptiveViT:
    return copy.deepcopy(original)


def assert_changed_alike(model: AdaptiveViT, change: Callable[[], Any]) -> None:
    """``change`` has an effect, the same by the rewritten as by the literal method."""
    images = tiny_images(model)
    before = run(model, images)["logits"]
    change()
    after = run(model, images)
    assert_alike(after, run(model, images, "reference"))
    assert (after["logits"] - before).abs().max() > 1e-6
    model.eval()
    assert_alike(run(model, images), run(model, images, "reference"))


# ---- hooks, another forward and another module in the backbone


def replace_forward(model: AdaptiveViT, part: str) -> None:
    module = model.backbone.get_submodule(part)
    forward = module.forward
    module.forward = lambda *args, **kwargs: mixing(forward(*args, **kwargs))


def replace_class(model: AdaptiveViT, part: str) -> None:
    """With one that is a kind of the first, as ``class Scaled(nn.Identity)``."""
    module = model.backbone.get_submodule(part)

    class Subclass(type(module)):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return mixing(super().forward(*args, **kwargs))

    module.__class__ = Subclass


def replace_module(model: AdaptiveViT, part: str) -> None:
    model.backbone.set_submodule(part, Mixing(model.backbone.get_submodule(part)))


def add_hook(model: AdaptiveViT, part: str) -> None:
    model.backbone.get_submodule(part).register_forward_hook(mixing_hook)


def add_pre_hook(model: AdaptiveViT, part: str) -> None:
    hook = lambda module, inputs: (mixing(inputs[0]), *inputs[1:])  # noqa: E731
    model.backbone.get_submodule(part).register_forward_pre_hook(hook)


parts = pytest.mark.parametrize("part", PARTS)


WAYS = [add_hook, add_pre_hook, replace_module, replace_forward, replace_class]


@pytest.mark.parametrize(
    ("way", "part"),
    [
        # Of two blocks, one has the change in the fast tier: they have an odd number of parts.
        pytest.param(way, part, id=f"{way.__name__}-{part}", marks=[pytest.mark.full] * ((i + j) % 2))
        for i, way in enumerate(WAYS)
        for j, part in enumerate(PARTS)
    ],
)
def test_changed_part(model: AdaptiveViT, part: str, way: Callable[[AdaptiveViT, str], None]) -> None:
    assert_changed_alike(model, lambda: way(model, part))


WHOLE = ["", "blocks", "blocks.1", "blocks.2", "norm"]
PARALLEL = "vit_base_patch16_18x2_224"


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name in (VIT, EVA, BEIT, PARALLEL) for part in WHOLE]
    + [(name, part) for name in (EVA, BEIT) for part in ("blocks.1.mlp", "blocks.2.norm1", "pos_drop")],
)
def test_hook_in_every_family(name: str, part: str) -> None:
    """Also on the backbone and its blocks as a whole."""
    model = tiny_model(name).train()
    assert_changed_alike(model, lambda: add_hook(model, part))


@parts
@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_hooks_see_what_the_literal_method_shows(model: AdaptiveViT, part: str, register: str) -> None:
    """Shapes and values, as often."""
    seen: list = []
    module = model.backbone.get_submodule(part)
    getattr(module, register)(lambda module, *values: seen.append(values[-1]))
    images = tiny_images(model)
    run(model, images)
    actual, seen = seen, []
    run(model, images, "reference")
    assert len(actual) == len(seen) == (0 if part.endswith("attn_drop") else 1)


BACKWARD_PARTS = [
    "blocks.1",
    "blocks.2",
    "blocks.1.attn",
    "blocks.1.attn.proj",
    "blocks.2.mlp",
    "blocks.2.norm1",
]


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize(
    ("name", "part"),
    [*((VIT, part) for part in [*BACKWARD_PARTS, "norm"]), (EVA, "blocks.1"), (BEIT, "blocks.1")],
)
def test_backward_hooks(name: str, part: str, register: str) -> None:
    """They may change gradients; here they double them."""
    model = tiny_model(name, prompts=PROMPTS).train()
    module = model.backbone.get_submodule(part)
    images = tiny_images(model)
    before = run(model, images)
    getattr(module, register)(lambda module, *gradients: tuple(2 * g for g in gradients[0]))
    after = run(model, images)
    assert_same(after, run(model, images, "reference"))
    name = "adapters.default.prompts.blocks.0.table"
    assert (after[name] - before[name]).abs().max() > 1e-6


# ---- patches of whole classes


@contextmanager
def patched(cls: type, forward: Callable) -> Iterator[None]:
    original = cls.forward
    cls.forward = lambda self, *args, **kwargs: forward(original(self, *args, **kwargs))
    try:
        yield
    finally:
        cls.forward = original


CLASSES = {
    "Block": (vision_transformer.Block, VIT),
    "Attention": (timm.layers.Attention, VIT),
    "Mlp": (timm.layers.Mlp, VIT),
    "Linear": (nn.Linear, VIT),
    "LayerNorm": (timm.layers.LayerNorm, VIT),
    "nn.LayerNorm": (nn.LayerNorm, VIT),
    "LayerScale": (timm.layers.LayerScale, VIT),
    "GELU": (nn.GELU, VIT),
    "Dropout": (nn.Dropout, VIT),
    "Identity": (nn.Identity, VIT),
    "EvaBlock": (eva.EvaBlock, EVA),
    "SwiGLU": (timm.layers.SwiGLU, "eva02_base_patch14_224"),
    "EvaAttention": (eva.EvaAttention, EVA),
    "Beit's Block": (beit.Block, BEIT),
    "Beit's Attention": (beit.Attention, BEIT),
    "AdaptivePrompts": (AdaptivePrompts, VIT),
    "Projector": (Projector, VIT),
}


@pytest.mark.parametrize("case", CLASSES)
def test_patched_class(case: str) -> None:
    cls, name = CLASSES[case]
    model = tiny_model(name, **(OPTIONS if name == VIT else {})).train()
    images = tiny_images(model)
    before = run(model, images)
    with patched(cls, mixing):
        after = run(model, images)
        assert_same(after, run(model, images, "reference"))
    assert (after["logits"] - before["logits"]).abs().max() > 1e-6
    assert_same(run(model, images), before, 0.0)


@pytest.mark.parametrize("cls", [timm.layers.Attention, nn.Linear, AdaptivePrompts])
def test_patched_class_is_called(model: AdaptiveViT, cls: type) -> None:
    """As often as by the literal method, as scripts count on that record what attention sees."""
    calls: list = []

    def record(out: Tensor) -> Tensor:
        calls.append(out.shape)
        return out

    images = tiny_images(model)
    with patched(cls, record):
        run(model, images)
        actual, calls = calls, []
        run(model, images, "reference")
    assert actual == calls
    assert calls


@pytest.mark.full
def test_class_patched_before_the_import() -> None:
    """The attention of Beit is replaced by a subclass, which calls what was patched."""
    script = """
from timm.models import beit
original = beit.Attention.forward
beit.Attention.forward = lambda self, x, **options: 2 * original(self, x, **options)
from tiny import assert_same, run, tiny_images, tiny_model
model = tiny_model("beit_base_patch16_224")
images = tiny_images(model)
assert_same(run(model, images), run(model, images, "reference"))
"""
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, check=True)


# ---- hooks on all modules


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_global_hook_is_called(model: AdaptiveViT, backend: str) -> None:
    """Once for every module that computes, prompts and head included."""
    called: list = []
    handle = torch_module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        run(model, tiny_images(model), backend)
    finally:
        handle.remove()
    names = {name: sum(module is it for it in called) for name, module in model.named_modules()}
    idle = {name for name, calls in names.items() if calls == 0}
    # Lists, attention's dropout (a number to timm) and the place of the head in the backbone.
    assert {name.rpartition(".")[2] for name in idle} == {"adapters", "blocks", "attn_drop", "head"}
    assert names["adapters.default.prompts.blocks.1.token_projection"] == 1


@pytest.mark.parametrize("cls", [nn.Module, nn.Linear, nn.LayerNorm, AdaptivePrompts, Projector, nn.Identity])
def test_global_hook_changes_values(model: AdaptiveViT, cls: type) -> None:
    def change(module: nn.Module, inputs: Any, out: Any) -> Any:
        return mixing(out) * 1.1 if isinstance(module, cls) and isinstance(out, Tensor) else None

    images = tiny_images(model)
    before = run(model, images)
    handle = torch_module.register_module_forward_hook(change)
    try:
        after = run(model, images)
        assert_same(after, run(model, images, "reference"))
    finally:
        handle.remove()
    assert (after["logits"] - before["logits"]).abs().max() > 1e-6
    assert_same(run(model, images), before, 0.0)


# ---- the prompts' modules


def adaptive(model: AdaptiveViT) -> AdaptivePrompts:
    return model.prompts.blocks[1]


def prompt_module(model: AdaptiveViT, part: str) -> nn.Module:
    """A part of the first adaptive prompts, the projector that they share included."""
    root = model.prompts if part.startswith("projector") and model.prompts.projector else adaptive(model)
    return root.get_submodule(part)


both_projectors = pytest.mark.parametrize("prompts", [PROMPTS, OWN_PROJECTOR], ids=["shared", "own"])


@both_projectors
@pytest.mark.parametrize("part", PROMPT_PARTS)
def test_hooks_on_prompts(prompts: PromptConfig, part: str) -> None:
    model = tiny_model(VIT, prompts=prompts).train()
    module = prompt_module(model, part)
    calls: list = []

    def hook(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        calls.append(out.shape)
        return mixing(out)

    assert_changed_alike(model, lambda: module.register_forward_hook(hook))
    assert len(calls) % 4 == 0  # two backends, two modes, as often in each
    assert calls[: len(calls) // 4] == calls[len(calls) // 4 : len(calls) // 2]


@both_projectors
@pytest.mark.parametrize("part", ["token_projection", "projector.down", "projector.up"])
@pytest.mark.parametrize(
    "change", ["low rank", "pruned", "parametrised", "weight norm", "bias", "module", "no bias"]
)
def test_changed_linear_of_prompts(prompts: PromptConfig, part: str, change: str) -> None:
    model = tiny_model(VIT, prompts=prompts).train()
    module = prompt_module(model, part)
    parent, _, name = part.rpartition(".")
    parent = prompt_module(model, parent)

    def put(replacement: nn.Module) -> None:
        setattr(parent, name, replacement)

    def linear(bias: bool) -> nn.Module:
        replacement = nn.Linear(module.in_features, module.out_features, bias=bias, dtype=torch.float64)
        randomize(replacement, 5)
        return replacement

    changes = {
        "low rank": lambda: put(LowRank(module)),
        "pruned": lambda: prune.l1_unstructured(module, "weight", amount=0.5),
        "parametrised": lambda: parametrize.register_parametrization(module, "weight", Scaled()),
        "weight norm": lambda: randomize(parametrizations.weight_norm(module), 3),
        "bias": lambda: put(linear(bias=True)),
        "no bias": lambda: put(linear(bias=False)),
        "module": lambda: put(Mixing(module)),
    }
    assert_changed_alike(model, changes[change])


@pytest.mark.parametrize("tensor", ["norm.weight", "norm.bias", "kernel", "token_projection.bias"])
@pytest.mark.parametrize("change", ["pruned", "parametrised", "parameter"])
def test_changed_tensor_of_prompts(model: AdaptiveViT, tensor: str, change: str) -> None:
    path, _, name = tensor.rpartition(".")
    module = prompt_module(model, path)
    changes = {
        "pruned": lambda: prune.random_unstructured(module, name, amount=0.7),
        "parametrised": lambda: parametrize.register_parametrization(module, name, Scaled()),
        "parameter": lambda: setattr(module, name, nn.Parameter(getattr(module, name).detach() * 1.5)),
    }
    torch.manual_seed(0)
    assert_changed_alike(model, changes[change])


PROMPT_CHANGES: dict[str, Callable[[AdaptiveViT], Any]] = {
    "norm without affine": lambda m: setattr(adaptive(m), "norm", nn.LayerNorm(32, elementwise_affine=False)),
    "norm without bias": lambda m: setattr(adaptive(m), "norm", nn.LayerNorm(32, bias=False).double()),
    "no norm": lambda m: setattr(adaptive(m), "norm", nn.Identity()),
    "other norm": lambda m: setattr(adaptive(m), "norm", nn.RMSNorm(32).double()),
    "eps": lambda m: setattr(adaptive(m).norm, "eps", 0.3),
    "activation": lambda m: setattr(m.prompts.projector, "activation", "gelu"),
    "scale": lambda m: setattr(m.prompts.projector, "scale", 0.3),
    "learned scale": lambda m: setattr(
        m.prompts.projector, "scale", nn.Parameter(torch.full((1,), 0.3, dtype=torch.float64))
    ),
    "frozen table": lambda m: m.prompts.blocks[0].table.requires_grad_(False).mul_(1.5),
    "forward": lambda m: setattr(adaptive(m), "forward", lambda x, masks, **shared: x[:, :3] * 0.3),
    "forward of the projector": lambda m: setattr(m.prompts.projector, "forward", lambda x, mask: x * 0.3),
    "table hook": lambda m: m.prompts.blocks[0].register_forward_hook(mixing_hook),
    "fixed prompts": lambda m: m.prompts.eval(),
    "one in eval mode": lambda m: adaptive(m).eval(),
}


@pytest.mark.parametrize("change", PROMPT_CHANGES)
def test_changed_prompts(model: AdaptiveViT, change: str) -> None:
    assert_changed_alike(model, lambda: PROMPT_CHANGES[change](model))


# ---- attributes, modes and parts of the backbone


def block(model: AdaptiveViT, index: int = 1) -> nn.Module:
    return model.backbone.blocks[index]


def unfused(model: AdaptiveViT, scale: float) -> None:
    for each in model.backbone.blocks:
        each.attn.fused_attn, each.attn.scale = False, scale


def more_heads(attn: nn.Module) -> None:
    attn.num_heads, attn.head_dim = 4, 8
    attn.q_norm = attn.k_norm = nn.Identity()


def drop(module: nn.Module, rate: float = 0.5) -> None:
    """A dropout at this rate, in training mode."""
    module.p = rate
    module.train()


def attention_drops(model: AdaptiveViT, index: int = 1) -> None:
    """timm's fused attention looks at the attention's own mode."""
    attn = block(model, index).attn
    attn.attn_drop.p, attn.training = 0.5, True


CHANGES: dict[str, Callable[[AdaptiveViT], Any]] = {
    "scale without fused attention": lambda m: unfused(m, 2.0),
    "heads": lambda m: more_heads(block(m).attn),
    "heads of the last block": lambda m: more_heads(block(m, 2).attn),
    "eps of norm1": lambda m: setattr(block(m).norm1, "eps", 0.3),
    "eps of the last norm2": lambda m: setattr(block(m, 2).norm2, "eps", 0.3),
    "eps of the final norm": lambda m: setattr(m.backbone.norm, "eps", 0.3),
    "eps of q_norm": lambda m: setattr(block(m).attn.q_norm, "eps", 0.3),
    "activation": lambda m: setattr(block(m).mlp, "act", nn.SiLU()),
    "GELU by tanh": lambda m: setattr(block(m).mlp.act, "approximate", "tanh"),
    "no layer scale": lambda m: setattr(block(m), "ls1", nn.Identity()),
    "Linear as layer scale": lambda m: setattr(block(m), "ls2", LowRank(nn.Linear(32, 32).double())),
    "no q_norm": lambda m: setattr(block(m).attn, "q_norm", nn.Identity()),
    "no k_norm of the last block": lambda m: setattr(block(m, 2).attn, "k_norm", nn.Identity()),
    "norm of the heads": lambda m: setattr(block(m).attn, "norm", nn.LayerNorm(32).double()),
    "norm in the MLP": lambda m: setattr(block(m).mlp, "norm", nn.LayerNorm(128).double()),
    "norm1 without affine": lambda m: setattr(block(m), "norm1", nn.LayerNorm(32, elementwise_affine=False)),
    "RMSNorm as norm2": lambda m: setattr(block(m), "norm2", timm.layers.RmsNorm(32).double()),
    "RMSNorm as final norm": lambda m: setattr(m.backbone, "norm", timm.layers.RmsNorm(32).double()),
    "no final norm": lambda m: setattr(m.backbone, "norm", nn.Identity()),
    "no block": lambda m: m.backbone.blocks.__setitem__(1, nn.Identity()),
    "fewer blocks": lambda m: setattr(m.backbone, "blocks", m.backbone.blocks[:2]),
    "blocks exchanged": lambda m: setattr(m.backbone, "blocks", nn.Sequential(*reversed(m.backbone.blocks))),
    "average pooling": lambda m: setattr(m.backbone, "global_pool", "avg"),
    "pooling": lambda m: setattr(m.backbone, "pool", lambda x, pool_type=None: x.mean(1)),
    "forward_head": lambda m: setattr(m.backbone, "forward_head", lambda x, pre_logits: x.mean(1)),
    "fc_norm": lambda m: setattr(m.backbone, "fc_norm", nn.LayerNorm(32).double()),
    "dropout of attention": attention_drops,
    "dropout of the last attention": lambda m: attention_drops(m, 2),
    "attn.proj_drop": lambda m: drop(block(m).attn.proj_drop),
    "mlp.drop1": lambda m: drop(block(m).mlp.drop1),
    "mlp.drop2 of the last block": lambda m: drop(block(m, 2).mlp.drop2),
    "drop path": lambda m: setattr(block(m), "drop_path1", timm.layers.DropPath(0.5).train()),
    "dropout as layer scale": lambda m: setattr(block(m), "ls1", nn.Dropout(0.5).train()),
    "dropout of the positions": lambda m: drop(m.backbone.pos_drop),
    "dropout before the head": lambda m: drop(m.backbone.head_drop),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_backbone(model: AdaptiveViT, change: str) -> None:
    assert_changed_alike(model, lambda: CHANGES[change](model))


@pytest.mark.parametrize("index", [0, 2])
def test_blocks_in_training_mode(index: int) -> None:
    """All their dropouts are on."""
    rates = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.5}
    model = tiny_model(VIT, prompts=PROMPTS, **rates).train()
    assert_changed_alike(model, lambda: block(model, index).train())


def test_dropouts_that_are_off(model: AdaptiveViT) -> None:
    """A rate alone, in eval mode, has no effect."""
    images = tiny_images(model)
    before = run(model, images)
    for module in model.backbone.modules():
        if isinstance(module, nn.Dropout) and module is not model.backbone.head_drop:
            module.p = 0.5
    assert_same(run(model, images), before, 0.0)


@pytest.mark.parametrize("method", ["pool", "forward_head"])
def test_backbone_that_pools_in_its_own_way(method: str) -> None:
    """A subclass of timm's; all its tokens reach its pooling."""

    def pool(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.mean(1)

    subclass = type("Own", (vision_transformer.VisionTransformer,), {method: pool})
    torch.manual_seed(0)
    backbone = subclass(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=3).double()
    randomize(backbone, 0)
    model = AdaptiveViT(backbone, prompts=PROMPTS).double().eval()
    randomize(model.prompts, 1)
    images = tiny_images(model)
    assert_same(run(model, images), run(model, images, "reference"))


@pytest.mark.parametrize("name", ["eva_giant_patch14_224", BEIT])
@pytest.mark.parametrize("separate", [True, False])
def test_bias_beside_the_separate_one(name: str, separate: bool) -> None:
    """timm adds it only where the biases are added to what qkv gives."""
    model = tiny_model(name)
    attn = model.backbone.blocks[1].attn
    attn.qkv_bias_separate = separate
    bias = nn.Parameter(torch.linspace(-1, 1, attn.qkv.out_features, dtype=torch.float64))
    attn.qkv.register_parameter("bias", bias)
    images = tiny_images(model)
    assert_alike(run(model, images), run(model, images, "reference"))


def test_heads_that_do_not_fit(model: AdaptiveViT) -> None:
    """timm refuses them, so no numbers come out."""
    model.backbone.blocks[0].attn.num_heads = 4
    for backend in ("torch", "reference"):
        with use_backend(backend), pytest.raises(RuntimeError, match="shape"):
            model(tiny_images(model))


# ---- gradients of what is frozen elsewhere

FAMILIES = {
    VIT: OPTIONS,
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {},
    "deit_tiny_distilled_patch16_224": {},
    EVA: {},
    "eva02_base_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    BEIT: {},
    "vit_base_patch16_sapiens2": {},
    "naflexvit_base_patch16_map": {},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["adaptive", "deep", "shallow"])
def test_everything_unfrozen(name: str, kind: str) -> None:
    """Every weight's gradient is the literal method's: norms, scales, positions, CLS token and all."""
    prompts = PromptConfig(kind=kind, num_prompts=3, projector_dim=4)
    model = tiny_model(name, prompts=prompts, **FAMILIES[name]).train().requires_grad_(True)
    images = tiny_images(model)
    assert_alike(run(model, images), run(model, images, "reference"))


@pytest.mark.parametrize("part", ["norm1", "ls1", "attn.qkv", "attn.q_norm", "mlp.fc2"])
def test_one_part_unfrozen(model: AdaptiveViT, part: str) -> None:
    """In the last block, whose keys and values are never made."""
    block(model, 2).get_submodule(part).requires_grad_(True)
    images = tiny_images(model)
    assert_same(run(model, images), run(model, images, "reference"))


def test_gradient_of_the_images(model: AdaptiveViT) -> None:
    gradients = []
    for backend in ("torch", "reference"):
        images = tiny_images(model).requires_grad_(True)
        run(model, images, backend)
        gradients.append({"images": images.grad})
    assert_same(*gradients)
