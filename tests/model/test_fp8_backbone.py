"""A backbone in FP8: what changes, what does not, how far the gradients are off, and what it works with."""

from __future__ import annotations

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from replaying import replaying_on_cpu
from timm.models.vision_transformer import ParallelScalingBlock
from tiny import Scaled, assert_same, run, tiny_backbone, tiny_images, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from vapt_fast import AdaptiveViT, PromptConfig, adapters, use_backend
from vapt_fast.backbones.linears import Fp8GradientsLinear, Fp8Linear
from vapt_fast.config import KINDS
from vapt_fast.cuda_graphs.graphs import UNCAPTURED_CALLS
from vapt_fast.export import ExportError, export_model
from vapt_fast.info import forward_report

VIT = "vit_tiny_patch16_224"
PRECISIONS = ["fp8", "fp8-gradients"]
IN_FP8 = "FP8 in attn.qkv, attn.proj, mlp.fc1, mlp.fc2"


def prompts(kind: str = "adaptive") -> PromptConfig:
    return PromptConfig(kind=kind, num_prompts=3, projector_dim=4, prompt_dropout=0.1)


def model_of(precision: str | None = "fp8", **options: object) -> AdaptiveViT:
    model = tiny_model(VIT, prompts=prompts(), **options)
    model.backbone_precision = precision
    return model


def classes_of(model: AdaptiveViT) -> list[type]:
    return [type(module) for module in model.modules() if isinstance(module, nn.Linear)]


# ---- how close it is


def random_model(seed: int) -> AdaptiveViT:
    """Twelve blocks as timm initialises them, and prompts that have learned something."""
    torch.manual_seed(seed)
    model = AdaptiveViT(VIT, num_prompts=5, num_classes=10, img_size=64).eval()
    with torch.no_grad():
        for name, parameter in model.named_adapter_parameters():
            if name != "head.bias":
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def gradients_by_kind(model: AdaptiveViT, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradients of what all blocks have in common, each in one vector."""
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    found = defaultdict(list)
    for name, parameter in model.named_adapter_parameters():
        assert parameter.grad is not None
        found[re.sub(r"\.\d+\.", ".*.", name)].append(parameter.grad.flatten())
    return {name: torch.cat(gradients) for name, gradients in found.items()}


@pytest.mark.parametrize(("precision", "least"), [("fp8", 0.99), ("fp8-gradients", 0.98)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_point_where_they_did(precision: str, least: float, seed: int) -> None:
    model = random_model(seed)
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    expected = gradients_by_kind(model, images, labels)
    model.backbone_precision = precision
    found = gradients_by_kind(model, images, labels)
    assert len(expected) == 10
    for name, gradient in expected.items():
        assert torch.cosine_similarity(found[name], gradient, 0) >= least, name
        assert not torch.allclose(found[name], gradient, rtol=1e-3), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rewrites_are_exact_in_fp8_too(kind: str, precision: str) -> None:
    """A token's scale is its own: the numbers of the literal method, if blocks make all keys and values."""
    options = {"global_pool": "avg", "class_token": False}
    model = tiny_model(VIT, prompts=prompts(kind), **options).train()
    images = tiny_images(model)
    before = run(model, images)
    model.backbone_precision = precision
    found = run(model, images)
    assert_same(found, run(model, images, "reference"))
    assert (found["logits"] - before["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "beit_base_patch16_224",
        "eva02_base_patch16_clip_224",
        "naflexvit_base_patch16_gap",
        "vit_5b_patch16_sapiens2",
        "vit_pe_core_base_patch16_224",
    ],
)
def test_every_family(name: str) -> None:
    """Exact rewrites again; and what is said to be in FP8 is called, by the literal method too."""
    model = tiny_model(name)
    model.backbone_precision = "fp8"
    images, called = tiny_images(model), set()
    found = run(model, images)
    assert_same(found, run(model, images, "reference"))
    linears = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(linears) >= 9
    for linear in linears:
        linear.register_forward_hook(lambda module, *_: called.add(module))
    for backend in ("torch", "reference"):  # hooks change nothing
        assert_same(run(model, images, backend), found)
        assert called == set(linears)
        called.clear()


def test_the_last_block_may_keep_more_bits() -> None:
    """Of one token, it makes no keys and values, so nothing of them is rounded."""
    model = model_of(depth=1)
    images, errors = tiny_images(model), []
    with torch.no_grad():
        for backend in ("torch", "reference"):
            model.backbone_precision = None
            exact = model(images)
            with use_backend(backend):
                model.backbone_precision = "fp8"
                errors.append((model(images) - exact).norm() / exact.norm())
    assert 0 < errors[0] <= errors[1] < 0.1


# ---- what it changes


def test_only_the_products_change_and_may_change_back() -> None:
    model = model_of(None)
    images, state = tiny_images(model), {name: t.clone() for name, t in model.state_dict().items()}
    before, plain = run(model, images), classes_of(model)
    for precision, cls in (("fp8", Fp8Linear), ("fp8-gradients", Fp8GradientsLinear)):
        model.backbone_precision = precision
        assert model.backbone_precision == precision
        assert classes_of(model).count(cls) == 4 * 3
        assert classes_of(model).count(nn.Linear) == len(plain) - 4 * 3
        assert not torch.equal(run(model, images)["logits"], before["logits"])
        assert_same(model.state_dict(), state, 0)
        copied = copy.deepcopy(model)
        assert_same(run(copied, images), run(model, images), 0)
    model.backbone_precision = None
    assert classes_of(model) == plain
    assert_same(run(model, images), before, 0)


def test_the_backbone_that_was_given_stays_as_it_was() -> None:
    backbone = tiny_backbone(VIT)
    model = AdaptiveViT(backbone, num_prompts=3, backbone_precision="fp8")
    assert not any(isinstance(module, Fp8Linear) for module in backbone.modules())
    other = AdaptiveViT(model.backbone, num_prompts=3, num_classes=3)
    assert (other.backbone_precision, model.backbone_precision) == (None, "fp8")
    named = timm.create_model(f"vapt_{VIT}", depth=1, backbone_precision="fp8")
    assert named.backbone_precision == "fp8"


def test_nothing_outlives_a_call() -> None:
    """Weights that change in place are quantised anew, the scales of their rows too."""
    model, other = model_of(), model_of()
    images = tiny_images(model)
    model(images)
    for changed in (model, other):
        with torch.no_grad():
            changed.backbone.blocks[1].attn.qkv.weight[5] *= 100
            changed.backbone.blocks[0].mlp.fc2.weight.data.mul_(0.5)
    assert_same(run(model, images), run(other, images), 0)


@pytest.mark.parametrize(
    ("backbone", "options", "said"),
    [
        (VIT, {}, f"blocks 1 to 2: rewritten; {IN_FP8}; prompts pooled"),
        (VIT, {"mlp_ratio": 1.25}, "mlp.fc2 not: its sizes, 40 and 32, are not both multiples of 16"),
        ("eva02_tiny_patch14_224", {}, "attn.qkv not: timm's attention reads its weight"),
    ],
)
def test_the_report_says_which_products_and_why_not(backbone: str, options: dict, said: str) -> None:
    model = AdaptiveViT(tiny_backbone(backbone, **options), num_prompts=3)
    assert "FP8" not in forward_report(model)
    model.backbone_precision = "fp8"
    assert said in forward_report(model)


def test_a_module_put_in_the_place_of_another_is_as_it_is() -> None:
    model = model_of()
    mlp, images, seen = model.backbone.blocks[1].mlp, tiny_images(model), []
    mlp.fc1 = copy.deepcopy(mlp.fc1)
    mlp.fc1.__class__ = nn.Linear
    model.backbone.blocks[1].attn.proj.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    run(model, images)
    ((x, y),) = seen
    proj = model.backbone.blocks[1].attn.proj
    assert 0 < (y - F.linear(x, proj.weight, proj.bias)).norm() < 0.1 * y.norm()
    assert "FP8 in attn.qkv, attn.proj, mlp.fc2" in forward_report(model)


def pruned(linear: nn.Linear) -> None:
    prune.l1_unstructured(linear, "weight", 0.3)


def parametrised(linear: nn.Linear) -> None:
    parametrize.register_parametrization(linear, "weight", Scaled())


@pytest.mark.parametrize("change", [pruned, parametrised])
def test_weights_that_are_computed(change: Callable[[nn.Linear], None]) -> None:
    model = model_of(global_pool="avg", class_token=False)
    images, before = tiny_images(model), run(model, tiny_images(model))["logits"]
    for name in ("attn.qkv", "mlp.fc1"):
        change(model.backbone.blocks[1].get_submodule(name))
    found = run(model, images)
    assert_same(found, run(model, images, "reference"))
    assert (found["logits"] - before).abs().max() > 1e-3
    if change is parametrised:
        with pytest.raises(ValueError, match=r"any more[\s\S]*attn\.qkv is a ParametrizedFp8L"):
            model.backbone_precision = None
        assert model.backbone_precision == "fp8"


def test_what_learns_keeps_its_precision() -> None:
    model = model_of(None)
    model.backbone.blocks[1].mlp.fc1.weight.requires_grad_()
    model.backbone_precision = "fp8"
    assert "FP8 in attn.qkv, attn.proj, mlp.fc2" in forward_report(model)


@pytest.mark.parametrize(
    ("precision", "options", "error", "message"),
    [
        ("fp16", {}, ValueError, r"backbone_precision must be one of .*fp8-gradients.*got 'fp16'"),
        (True, {}, TypeError, "backbone_precision"),
        ("fp8", {"block_fn": ParallelScalingBlock}, ValueError, "ParallelScalingBlock, not one of timm's st"),
        (
            "fp8",
            {"embed_dim": 24},
            ValueError,
            "attn.qkv: its sizes, 24 and 72, are not both multiples of 16",
        ),
    ],
)
def test_what_can_not_be(precision: object, options: dict, error: type[Exception], message: str) -> None:
    backbone = tiny_backbone(VIT, **options)
    with pytest.raises(error, match=message):
        AdaptiveViT(backbone, num_prompts=3, backbone_precision=precision)
    model = AdaptiveViT(backbone, num_prompts=3)
    with pytest.raises(error, match=message):
        model.backbone_precision = precision
    assert model.backbone_precision is None


# ---- what it works with


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp8", "fp8-gradients"])
def test_compiled(precision: str) -> None:
    torch.compiler.reset()
    model = model_of(precision, depth=2).train()
    images, expected = tiny_images(model), copy.deepcopy(model)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same(run(model, images), run(expected, images), 1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpointing_and_inference_mode(precision: str) -> None:
    model = model_of(precision)
    images = tiny_images(model)
    expected = run(model, images)
    with torch.inference_mode():
        assert torch.equal(model(images), expected["logits"])
    model.set_grad_checkpointing(True)
    assert_same(run(model, images), expected, 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_graphs(precision: str) -> None:
    """Replays quantise the weights of their time; another precision is captured anew."""
    model = model_of(None).train()
    images, plain = tiny_images(model), copy.deepcopy(model)
    with replaying_on_cpu():
        for p in (None, precision):
            for changed in (model, plain):
                changed.backbone_precision = p
            for seed in range(UNCAPTURED_CALLS + 3):
                for changed in (model, plain):
                    with torch.no_grad():
                        changed.backbone.blocks[1].mlp.fc1.weight[3] *= 1.5
                plain.cuda_graphs = False
                assert_same(run(model, images, seed=seed), run(plain, images, seed=seed), 0)
            assert "captured" in model.cuda_graph_report()


# ---- adapters and runs


@pytest.mark.parametrize("trained", [None, "fp8"])
def test_an_adapter_says_its_precision_and_loads_in_another(
    trained: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(trained).float()
    model.save_adapter(tmp_path)
    assert adapters.read_config(tmp_path)["backbone"]["precision"] == trained
    for precision in (None, "fp8"):
        backbone = tiny_backbone(VIT).float()
        with caplog.at_level(logging.INFO, logger="vapt_fast"):
            loaded = AdaptiveViT.from_adapter(tmp_path, backbone=backbone, backbone_precision=precision)
        assert loaded.backbone_precision == precision
        model.backbone_precision = precision
        images = tiny_images(model)
        assert_same({"": loaded(images)}, {"": model(images)}, 0)
    assert f"trained with backbone_precision={trained!r}" in caplog.text


def test_an_exported_model_is_in_the_precision_of_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="got backbone_precision='fp8'"):
        export_model(model_of().float(), tmp_path)
