"""Frozen weights that change after a call: the next call computes with what is there then."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from tiny import Scaled, assert_same, run, tiny_images, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from vapt_fast import AdaptiveViT, PromptConfig, use_backend

VIT = "vit_base_patch16_224"
OPTIONS = {"init_values": 0.5}
PROMPTS = PromptConfig(num_prompts=3, projector_dim=4, projector_dropout=0.3, channel_dropout=0.3)

# A weight at every level of a model.
LEVELS = [
    *("backbone.patch_embed.proj.weight", "backbone.pos_embed", "backbone.cls_token"),
    *("backbone.blocks.0.norm1.weight", "backbone.blocks.1.norm1.bias", "backbone.blocks.1.attn.qkv.weight"),
    *("backbone.blocks.0.attn.qkv.bias", "backbone.blocks.1.attn.proj.weight", "backbone.blocks.1.ls1.gamma"),
    *(
        "backbone.blocks.1.norm2.weight",
        "backbone.blocks.1.mlp.fc1.weight",
        "backbone.blocks.0.mlp.fc2.weight",
    ),
    *("backbone.blocks.2.norm1.bias", "backbone.blocks.2.attn.qkv.weight", "backbone.blocks.2.attn.qkv.bias"),
    *(
        "backbone.blocks.2.attn.proj.weight",
        "backbone.blocks.2.mlp.fc1.weight",
        "backbone.blocks.2.ls2.gamma",
    ),
    *("backbone.norm.weight", "adapters.default.head.weight"),
]
QKV = "backbone.blocks.1.attn.qkv.weight"


def other(weight: Tensor) -> Tensor:
    """Another weight of the same size."""
    return weight.detach().flip(0) * 1.5 + 0.1


def owner(model: AdaptiveViT, key: str) -> tuple[nn.Module, str]:
    """The module that has a weight, and its name there."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), name


def in_place(model: AdaptiveViT, key: str) -> None:
    with torch.no_grad():
        model.get_parameter(key).copy_(other(model.get_parameter(key)))


def data_in_place(model: AdaptiveViT, key: str) -> None:
    model.get_parameter(key).data.mul_(1.5)


def data_swapped(model: AdaptiveViT, key: str) -> None:
    """The second storage may get the address of the first."""
    for _ in range(2):
        model.get_parameter(key).data = other(model.get_parameter(key))


def another_parameter(model: AdaptiveViT, key: str) -> None:
    setattr(*owner(model, key), nn.Parameter(other(model.get_parameter(key)), requires_grad=False))


def tensors_swapped(model: AdaptiveViT, key: str) -> None:
    weight = model.get_parameter(key)
    torch.utils.swap_tensors(weight, nn.Parameter(other(weight), weight.requires_grad))


def another_module(model: AdaptiveViT, key: str) -> None:
    module, name = owner(model, key)
    replacement = copy.deepcopy(module)
    getattr(replacement, name).data.mul_(1.5)
    model.set_submodule(key.rpartition(".")[0], replacement)


def loaded(model: AdaptiveViT, key: str) -> None:
    state = model.state_dict()
    model.load_state_dict(state | {key: other(state[key])})


def pruned(model: AdaptiveViT, key: str) -> None:
    prune.l1_unstructured(*owner(model, key), amount=0.5)


def pruned_and_changed(model: AdaptiveViT, key: str) -> None:
    """The mask is applied by a hook, in the module's next call."""
    pruned(model, key)
    model.get_parameter(f"{key}_orig").data.mul_(1.5)


def parametrised(model: AdaptiveViT, key: str) -> None:
    parametrize.register_parametrization(*owner(model, key), Scaled())


def parametrised_for_good(model: AdaptiveViT, key: str) -> None:
    parametrised(model, key)
    parametrize.remove_parametrizations(*owner(model, key))


def another_dtype(model: AdaptiveViT, key: str) -> None:
    """To half precision and back, which rounds."""
    owner(model, key)[0].to(torch.bfloat16).to(torch.float64)


def averaged(model: AdaptiveViT, key: str) -> AdaptiveViT:
    average = ModelEmaV3(model, decay=0.5)
    average(tiny_images(model))
    in_place(model, key)
    average.update(model)
    return average.module


def copied(model: AdaptiveViT, key: str) -> AdaptiveViT:
    model = copy.deepcopy(model)
    in_place(model, key)
    return model


WAYS: list[Callable[..., Any]] = [
    *(in_place, data_in_place, data_swapped, another_parameter, tensors_swapped, another_module, loaded),
    *(pruned, pruned_and_changed, parametrised, parametrised_for_good, another_dtype, averaged, copied),
]


@pytest.fixture(scope="module")
def original() -> AdaptiveViT:
    return tiny_model(VIT, prompts=PROMPTS, **OPTIONS)


@pytest.fixture
def model(original: AdaptiveViT) -> AdaptiveViT:
    return copy.deepcopy(original)


def logits(model: AdaptiveViT, images: Tensor, backend: str = "torch") -> dict[str, Tensor]:
    with torch.no_grad(), use_backend(backend):
        return {"logits": model(images)}


def assert_changed(
    function: Callable[..., Any], model: AdaptiveViT, change: Callable[[], Any], **options: Any
) -> None:
    """``change``, which may return another model, shows in the next call of ``function``."""
    images = tiny_images(model)
    training = model.training
    before = function(model, images)
    model = (change() or model).train(training)
    after = function(model, images)
    assert_same(after, function(model, images, "reference"), **options)
    assert (after["logits"] - before["logits"]).abs().max() > 1e-6


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("key", LEVELS)
def test_eval(model: AdaptiveViT, key: str, way: Callable) -> None:
    assert_changed(logits, model, lambda: way(model, key))


# Each way at a level that differs from the next one's, and one way at every level.
SOME = [(way, LEVELS[(5 * i + i // 4) % len(LEVELS)]) for i, way in enumerate(WAYS)]
SOME += [(data_in_place, key) for key in LEVELS]


@pytest.mark.parametrize(("way", "key"), SOME, ids=lambda value: getattr(value, "__name__", value))
def test_training(model: AdaptiveViT, key: str, way: Callable) -> None:
    assert_changed(run, model.train(), lambda: way(model, key))


@pytest.mark.parametrize("key", LEVELS)
def test_unfrozen_weight(model: AdaptiveViT, key: str) -> None:
    """One frozen weight that learns has the literal method's gradient."""
    weight = model.train().get_parameter(key).requires_grad_(True)
    images = tiny_images(model)
    assert_same(run(model, images), run(model, images, "reference"))
    assert weight.grad.abs().max() > 1e-6 or key.endswith("1.norm1.bias")  # which prompts and tokens share


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_call_with_other_weights(model: AdaptiveViT, backend: str) -> None:
    """torch.func.functional_call lends weights for one call."""
    images = tiny_images(model)
    before = logits(model, images, backend)
    for key in LEVELS:
        lent = {key: other(model.get_parameter(key))}
        with torch.no_grad(), use_backend(backend):
            during = {"logits": torch.func.functional_call(model, lent, (images,))}
        assert_same(logits(model, images, backend), before, 0.0)
        assert_same(during, logits(copied(model, key), images, "reference"))


# ---- compiled models


def called(model: AdaptiveViT, images: Tensor, backend: str | None = None) -> dict[str, Tensor]:
    """The logits of the compiled model, or with a backend those of the model itself."""
    if backend is not None:
        return logits(model, images, backend)
    with torch.no_grad():
        return {"logits": model.compiled(images)}


@pytest.fixture(scope="module")
def compiled() -> AdaptiveViT:
    """Compiled once for all changes in place."""
    torch.compiler.reset()
    model = tiny_model(VIT, prompts=PROMPTS, **OPTIONS)
    object.__setattr__(model, "compiled", torch.compile(model, backend="eager", fullgraph=True))
    return model


@pytest.mark.parametrize("way", [in_place, data_in_place, loaded])
def test_compiled_in_place(compiled: AdaptiveViT, way: Callable) -> None:
    """Nothing is compiled again."""
    state = copy.deepcopy(compiled.state_dict())
    for key in LEVELS:
        assert_changed(called, compiled, lambda key=key: way(compiled, key))
        compiled.load_state_dict(state)


@pytest.mark.parametrize(
    ("way", "key"),
    [
        *((another_parameter, QKV), (parametrised, "backbone.blocks.1.ls1.gamma")),
        *(
            pytest.param(way, key, marks=pytest.mark.full)
            for way, key in ((data_swapped, QKV), (pruned, QKV), (another_module, LEVELS[3]))
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_compiled(way: Callable, key: str) -> None:
    torch.compiler.reset()
    model = tiny_model(VIT, prompts=PROMPTS, depth=2, **OPTIONS)
    object.__setattr__(model, "compiled", torch.compile(model, backend="eager"))
    assert_changed(called, model, lambda: way(model, key))


def test_compiled_training() -> None:
    torch.compiler.reset()
    model = tiny_model(VIT, depth=2, prompts=PROMPTS, **OPTIONS).train()
    # Compiled and eager dropouts draw differently.
    for module in model.prompts.modules():
        module.training = False
    function = torch.compile(model, backend="aot_eager")

    def gradients(model: AdaptiveViT, images: Tensor, backend: str | None = None) -> dict[str, Tensor]:
        model.zero_grad()
        with use_backend(backend or "auto"):
            output = (function if backend is None else model)(images)
        output.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return {"logits": output.detach()} | gradients

    images = tiny_images(model)
    for key in (LEVELS[0], LEVELS[3], QKV, "backbone.blocks.1.mlp.fc1.weight", "backbone.norm.weight"):
        before = gradients(model, images)
        data_in_place(model, key)
        after = gradients(model, images)
        assert_same(after, gradients(model, images, "reference"))
        assert (after["logits"] - before["logits"]).abs().max() > 1e-6


# ---- quantised weights


def quantised(model: AdaptiveViT) -> AdaptiveViT:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and in use
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantised_by_torchao(model: AdaptiveViT) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("quantise", [quantised, quantised_by_torchao])
def test_quantised(quantise: Callable) -> None:
    """It may scale by the largest of its inputs, so it must get those of the literal method."""
    model = tiny_model(VIT, prompts=PROMPTS).float()
    assert_changed(logits, model, lambda: quantise(model), tolerance=1e-5)


# ---- memory


def tensors() -> dict[int, Tensor]:
    gc.collect()
    return {id(it): it for it in gc.get_objects() if issubclass(type(it), Tensor)}


@pytest.mark.parametrize("name", [VIT, "eva02_tiny_patch14_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("mode", ["eval", "no_grad", "training", "unfrozen", "checkpointing"])
def test_nothing_is_kept(name: str, mode: str) -> None:
    """Between two calls there is nothing but parameters, their gradients and what the caller holds."""
    model = tiny_model(name).train(mode not in ("eval", "no_grad"))
    model.set_grad_checkpointing(mode == "checkpointing")
    if mode == "unfrozen":
        model.requires_grad_(True)
    images = tiny_images(model)
    run(model, images)  # so that the gradients are there
    model.zero_grad(set_to_none=False)
    before = tensors()
    with torch.set_grad_enabled(mode != "no_grad"):
        output = model(images)
    if mode in ("training", "unfrozen", "checkpointing"):
        output.sum().backward()
    del output
    left = [tensor for key, tensor in tensors().items() if key not in before]
    assert [tuple(tensor.shape) for tensor in left] == []
