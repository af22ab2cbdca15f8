"""Frozen weights that change after a call: the next call computes with what is there then."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from timm.utils import ModelEmaV3
from tiny import assert_same, run, tiny_images, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, vector_to_parameters

from vapt_fast import AdaptiveViT, PromptConfig, use_backend

VIT = "vit_base_patch16_224"
OPTIONS = {"init_values": 0.5}
PROMPTS = PromptConfig(num_prompts=3, projector_dim=4, projector_dropout=0.3, channel_dropout=0.3)

# A weight at every level of a model: the module that has it, and its name there.
LEVELS = {
    "patch embedding": ("backbone.patch_embed.proj", "weight"),
    "position embedding": ("backbone", "pos_embed"),
    "CLS token": ("backbone", "cls_token"),
    "norm1": ("backbone.blocks.0.norm1", "weight"),
    "bias of norm1": ("backbone.blocks.1.norm1", "bias"),
    "qkv": ("backbone.blocks.1.attn.qkv", "weight"),
    "bias of qkv": ("backbone.blocks.0.attn.qkv", "bias"),
    "proj": ("backbone.blocks.1.attn.proj", "weight"),
    "layer scale": ("backbone.blocks.1.ls1", "gamma"),
    "norm2": ("backbone.blocks.1.norm2", "weight"),
    "fc1": ("backbone.blocks.1.mlp.fc1", "weight"),
    "fc2": ("backbone.blocks.0.mlp.fc2", "weight"),
    "last norm1": ("backbone.blocks.2.norm1", "bias"),
    "last qkv": ("backbone.blocks.2.attn.qkv", "weight"),
    "last bias of qkv": ("backbone.blocks.2.attn.qkv", "bias"),
    "last proj": ("backbone.blocks.2.attn.proj", "weight"),
    "last fc1": ("backbone.blocks.2.mlp.fc1", "weight"),
    "last layer scale": ("backbone.blocks.2.ls2", "gamma"),
    "final norm": ("backbone.norm", "weight"),
    "head": ("adapters.default.head", "weight"),
}


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def other(weight: Tensor) -> Tensor:
    """Another weight of the same size."""
    return weight.detach().flip(0) * 1.5 + 0.1


def get(model: nn.Module, path: str, name: str) -> Tensor:
    return getattr(model.get_submodule(path), name)


def in_place(model: AdaptiveViT, path: str, name: str) -> None:
    with torch.no_grad():
        get(model, path, name).copy_(other(get(model, path, name)))


def data_in_place(model: AdaptiveViT, path: str, name: str) -> None:
    get(model, path, name).data.mul_(1.5)


def numpy_alias(model: AdaptiveViT, path: str, name: str) -> None:
    get(model, path, name).detach().numpy()[:] *= 1.5


def data_swapped(model: AdaptiveViT, path: str, name: str) -> None:
    weight = get(model, path, name)
    weight.data = other(weight)


def data_swapped_twice(model: AdaptiveViT, path: str, name: str) -> None:
    """The second storage may get the address of the first."""
    for _ in range(2):
        data_swapped(model, path, name)


def another_parameter(model: AdaptiveViT, path: str, name: str) -> None:
    weight = nn.Parameter(other(get(model, path, name)), requires_grad=False)
    setattr(model.get_submodule(path), name, weight)


def tensors_swapped(model: AdaptiveViT, path: str, name: str) -> None:
    weight = get(model, path, name)
    torch.utils.swap_tensors(weight, nn.Parameter(other(weight), weight.requires_grad))


def another_module(model: AdaptiveViT, path: str, name: str) -> None:
    replacement = copy.deepcopy(model.get_submodule(path))
    with torch.no_grad():
        getattr(replacement, name).mul_(1.5)
    model.set_submodule(path, replacement)


def merged(model: AdaptiveViT, path: str, name: str) -> None:
    """What merging a low-rank layer does."""
    weight = get(model, path, name)
    flat = weight.data.view(weight.shape[0], -1)
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(flat.shape[0], 1, generator=generator, dtype=flat.dtype)
    down = torch.randn(1, flat.shape[1], generator=generator, dtype=flat.dtype)
    flat += up @ down / 4


def loaded(model: AdaptiveViT, path: str, name: str) -> None:
    key = f"{path}.{name}"
    model.load_state_dict(model.state_dict() | {key: other(model.state_dict()[key])})


def assigned(model: AdaptiveViT, path: str, name: str) -> None:
    key = f"{path}.{name}"
    model.load_state_dict(model.state_dict() | {key: other(model.state_dict()[key])}, assign=True)


def from_a_vector(model: AdaptiveViT, path: str, name: str) -> None:
    weight = get(model, path, name)
    vector_to_parameters(other(weight).flatten(), [weight])


def pruned(model: AdaptiveViT, path: str, name: str) -> None:
    prune.l1_unstructured(model.get_submodule(path), name, amount=0.5)


def pruned_for_good(model: AdaptiveViT, path: str, name: str) -> None:
    pruned(model, path, name)
    prune.remove(model.get_submodule(path), name)


def pruned_and_changed(model: AdaptiveViT, path: str, name: str) -> None:
    """The mask is applied by a hook, in the module's next call."""
    pruned(model, path, name)
    get(model, path, f"{name}_orig").data.mul_(1.5)


def parametrised(model: AdaptiveViT, path: str, name: str) -> None:
    parametrize.register_parametrization(model.get_submodule(path), name, Doubled())


def parametrised_for_good(model: AdaptiveViT, path: str, name: str) -> None:
    parametrised(model, path, name)
    parametrize.remove_parametrizations(model.get_submodule(path), name)


def another_dtype(model: AdaptiveViT, path: str, name: str) -> None:
    """To half precision and back, which rounds."""
    model.get_submodule(path).to(torch.bfloat16).to(torch.float64)


def averaged(model: AdaptiveViT, path: str, name: str) -> AdaptiveViT:
    average = ModelEmaV3(model, decay=0.5)
    average(tiny_images(model))
    in_place(model, path, name)
    average.update(model)
    return average.module


def copied(model: AdaptiveViT, path: str, name: str) -> AdaptiveViT:
    model = copy.deepcopy(model)
    in_place(model, path, name)
    return model


def optimised(model: AdaptiveViT, path: str, name: str) -> None:
    weight = get(model, path, name).requires_grad_(True)
    with torch.enable_grad():
        model(tiny_images(model)).square().sum().backward()
    torch.optim.SGD([weight], lr=1.0).step()
    weight.requires_grad_(False)
    weight.grad = None


WAYS: list[Callable] = [
    *(in_place, data_in_place, numpy_alias, data_swapped, data_swapped_twice, another_parameter),
    *(tensors_swapped, another_module, merged, loaded, assigned, from_a_vector, pruned, pruned_for_good),
    pruned_and_changed,
    *(parametrised, parametrised_for_good, another_dtype, averaged, copied, optimised),
]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@pytest.fixture(scope="module")
def original() -> AdaptiveViT:
    return tiny_model(VIT, prompts=PROMPTS, **OPTIONS)


@pytest.fixture
def model(original: AdaptiveViT) -> AdaptiveViT:
    return copy.deepcopy(original)


def logits(model: AdaptiveViT, images: Tensor, backend: str = "torch") -> dict[str, Tensor]:
    with torch.no_grad(), use_backend(backend):
        return {"logits": model(images)}


def assert_other(actual: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert (actual["logits"] - before["logits"]).abs().max() > 1e-6


@ways
@pytest.mark.parametrize("level", LEVELS)
def test_eval(model: AdaptiveViT, level: str, way: Callable) -> None:
    images = tiny_images(model)
    before = logits(model, images)
    model = way(model, *LEVELS[level]) or model
    after = logits(model, images)
    assert_same(after, logits(model, images, "reference"))
    assert_other(after, before)


# Each way at a level that differs from the next one's.
SOME = [(way, list(LEVELS)[5 * i % len(LEVELS) + i // 4]) for i, way in enumerate(WAYS)]


@pytest.mark.parametrize(("way", "level"), SOME, ids=lambda value: getattr(value, "__name__", value))
def test_training(model: AdaptiveViT, level: str, way: Callable) -> None:
    images = tiny_images(model.train())
    before = run(model, images)
    model = way(model, *LEVELS[level]) or model
    model.train()
    after = run(model, images)
    assert_same(after, run(model, images, "reference"))
    assert_other(after, before)


@pytest.mark.parametrize("level", LEVELS)
def test_training_in_place(model: AdaptiveViT, level: str) -> None:
    images = tiny_images(model.train())
    before = run(model, images)
    data_in_place(model, *LEVELS[level])
    after = run(model, images)
    assert_same(after, run(model, images, "reference"))
    assert_other(after, before)


@pytest.mark.parametrize("level", LEVELS)
def test_unfrozen_weight(model: AdaptiveViT, level: str) -> None:
    """One frozen weight that learns has the literal method's gradient."""
    weight = get(model.train(), *LEVELS[level]).requires_grad_(True)
    images = tiny_images(model)
    assert_same(run(model, images), run(model, images, "reference"))
    assert weight.grad.abs().max() > 1e-6 or level == "bias of norm1"  # which prompts and tokens share


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_call_with_other_weights(model: AdaptiveViT, backend: str) -> None:
    """torch.func.functional_call lends weights for one call."""
    images = tiny_images(model)
    before = logits(model, images, backend)
    for path, name in LEVELS.values():
        key = f"{path}.{name}"
        lent = {key: other(model.state_dict()[key])}
        with torch.no_grad(), use_backend(backend):
            during = {"logits": torch.func.functional_call(model, lent, (images,))}
        assert_same(logits(model, images, backend), before, 0.0)
        changed = copy.deepcopy(model)
        in_place(changed, path, name)
        assert_same(during, logits(changed, images, "reference"))


# ---- compiled models


@pytest.fixture(scope="module")
def compiled() -> tuple[AdaptiveViT, Callable]:
    torch.compiler.reset()
    model = tiny_model(VIT, prompts=PROMPTS, **OPTIONS)
    return model, torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize("way", [in_place, data_in_place, numpy_alias, merged, loaded, from_a_vector])
def test_compiled_in_place(compiled: tuple, way: Callable) -> None:
    """Nothing is compiled again."""
    model, function = compiled
    images = tiny_images(model)
    state = copy.deepcopy(model.state_dict())
    for level in LEVELS.values():
        with torch.no_grad():
            before = {"logits": function(images)}
            way(model, *level)
            after = {"logits": function(images)}
        assert_same(after, logits(model, images, "reference"))
        assert_other(after, before)
        model.load_state_dict(state)


STRUCTURAL = [
    (data_swapped_twice, "qkv"),
    (another_parameter, "qkv"),
    (another_module, "norm1"),
    (pruned, "qkv"),
    (parametrised, "layer scale"),
]


@pytest.mark.parametrize(("way", "level"), STRUCTURAL, ids=lambda value: getattr(value, "__name__", value))
def test_compiled(way: Callable, level: str) -> None:
    torch.compiler.reset()
    model = tiny_model(VIT, prompts=PROMPTS, depth=2, **OPTIONS)
    function = torch.compile(model, backend="eager")
    images = tiny_images(model)
    with torch.no_grad():
        before = {"logits": function(images)}
        way(model, *LEVELS[level])
        after = {"logits": function(images)}
    assert_same(after, logits(model, images, "reference"))
    assert_other(after, before)


def test_compiled_training() -> None:
    torch.compiler.reset()
    model = tiny_model(VIT, depth=2, prompts=PROMPTS, **OPTIONS).train()
    # Compiled and eager dropouts draw differently.
    for module in model.prompts.modules():
        module.training = False
    function = torch.compile(model, backend="aot_eager")
    images = tiny_images(model)

    def gradients(call: Callable) -> dict[str, Tensor]:
        model.zero_grad()
        call(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients(function)
    for level in ("patch embedding", "norm1", "qkv", "fc1", "final norm"):
        data_in_place(model, *LEVELS[level])
        after = gradients(function)
        with use_backend("reference"):
            assert_same(after, gradients(model))
        assert any((after[name] - before[name]).abs().max() > 1e-6 for name in after)
        before = after


# ---- quantised weights


def test_dynamic_quantisation() -> None:
    """A quantised layer scales by the largest of its inputs, so it must get those of the literal method."""
    model = tiny_model(VIT, prompts=PROMPTS).float()
    images = tiny_images(model)
    before = logits(model, images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and in use
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    after = logits(quantised, images)
    assert_same(after, logits(quantised, images, "reference"), 1e-5)
    assert_other(after, before)


def test_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = tiny_model(VIT, prompts=PROMPTS).float()
    images = tiny_images(model)
    before = logits(model, images)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    after = logits(model, images)
    assert_same(after, logits(model, images, "reference"), 1e-5)
    assert_other(after, before)


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
