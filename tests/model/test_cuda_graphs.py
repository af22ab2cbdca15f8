"""CUDA graphs of a model: whatever is done, the numbers are those without graphs, bit for bit.

On a CPU a stand-in records PyTorch's operations and repeats them on the same memory; on a GPU the graphs are
CUDA's own.
"""

from __future__ import annotations

import copy
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replaying import ReplayingRecorder, replaying_on_cpu
from timm.utils import ModelEmaV3
from tiny import Scaled, tiny_images, tiny_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from vapt_fast import AdaptiveViT, CudaGraphError, PromptConfig, use_backend, use_cuda_graphs
from vapt_fast.cuda_graphs import graphs as graphs_module
from vapt_fast.cuda_graphs.captured import CapturedCall

VIT = "vit_base_patch16_224"
PROMPTS = PromptConfig(num_prompts=3, projector_dim=4, projector_dropout=0.3, channel_dropout=0.3)
CALLS = graphs_module.UNCAPTURED_CALLS + 1  # until one is captured

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with replaying_on_cpu() if request.param == "cpu" else nullcontext():
        yield request.param


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[AdaptiveViT]:
    """One entry for each forward pass that was repeated."""
    counted: list[Any] = []
    repeat = CapturedCall.repeat_forward

    def count(call: CapturedCall, *args: Any) -> Tensor:
        counted.append(call)
        return repeat(call, *args)

    monkeypatch.setattr(CapturedCall, "repeat_forward", count)
    return counted


_BASE: dict[str, AdaptiveViT] = {}


def make(device: str = "cpu", prompts: PromptConfig = PROMPTS) -> AdaptiveViT:
    """A model in training mode."""
    key = repr(prompts)
    if key not in _BASE:
        _BASE[key] = tiny_model(VIT, prompts=prompts, init_values=0.5).train()
    return copy.deepcopy(_BASE[key]).to(device)


def batch(model: AdaptiveViT, seed: int = 0, size: int = 2) -> Tensor:
    return tiny_images(model, seed, size).to(next(model.parameters()).device)


def loss_of(logits: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 1, logits.numel()).to(logits).view_as(logits).cos()).square().sum()


def gradients(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        if parameter.grad is not None:
            yield parameter.grad.clone()


def step(model: AdaptiveViT, seed: int = 0, size: int = 2) -> Iterator[Tensor]:
    """The logits and gradients of one training step, whose dropouts are drawn with ``seed``."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(batch(model, seed, size))
    if logits.requires_grad:
        loss_of(logits).backward()
    yield logits.detach()
    yield from gradients(model)


def warm(model: AdaptiveViT, **options: Any) -> Iterator[Tensor]:
    """As many steps as make the next one a replay."""
    for seed in range(CALLS):
        yield from step(model, seed, **options)


def assert_equal(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 0.0) -> None:
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == other.dtype
        assert one.requires_grad == other.requires_grad
        assert one.shape == other.shape
        assert not one.isnan().any()
        error = (one - other).norm().item() / max(1.0, other.norm().item())
        assert error <= tolerance, f"tensor {i} is off by {error:.1e}"


# ---- situations: each yields what must not depend on graphs

SITUATIONS: dict[str, Callable[[AdaptiveViT], Iterator[Tensor]]] = {}
Situation = Callable[[AdaptiveViT], Iterator[Tensor]]


def situation(function: Situation) -> Situation:
    SITUATIONS[function.__name__] = function
    return function


def trainable(model: AdaptiveViT) -> list[nn.Parameter]:
    return list(model.trainable_parameters())


@situation
def training(model: AdaptiveViT) -> Iterator[Tensor]:
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    for seed in range(CALLS + 3):
        yield from step(model, seed)
        optimizer.step()
    yield from (p.detach() for p in trainable(model))


@situation
def accumulation_of_gradients(model: AdaptiveViT) -> Iterator[Tensor]:
    yield from warm(model)
    for set_to_none in (True, False):
        for count in (1, 2, 3):
            model.zero_grad(set_to_none=set_to_none)
            kept = []
            for seed in range(count):
                torch.manual_seed(seed)
                loss_of(model(batch(model, seed))).backward()
                kept.append([p.grad for p in trainable(model)])  # the same tensors, if they are added up
            yield from gradients(model)
            yield from (grad.clone() for grads in kept for grad in grads)


@situation
def gradients_kept_by_the_user(model: AdaptiveViT) -> Iterator[Tensor]:
    kept = []
    for seed in range(CALLS + 2):
        for parameter in trainable(model):
            parameter.grad = None
        torch.manual_seed(seed)
        loss_of(model(batch(model, seed))).backward()
        kept += [p.grad for p in trainable(model)]
    yield from kept


@situation
def outputs_kept_by_the_user(model: AdaptiveViT) -> Iterator[Tensor]:
    kept = []
    for seed in range(CALLS + 3):
        torch.manual_seed(seed)
        logits = model(batch(model, seed))
        loss_of(logits).backward()
        kept.append(logits.detach())
    with torch.no_grad():
        kept += [model.eval()(batch(model, seed)) for seed in range(CALLS + 3)]
    yield from kept


@situation
def two_forwards_before_a_backward(model: AdaptiveViT) -> Iterator[Tensor]:
    yield from warm(model)
    for order in ((0, 1), (1, 0)):
        model.zero_grad()
        torch.manual_seed(0)
        losses = [loss_of(model(batch(model, seed))) for seed in (5, 6)]
        for index in order:
            losses[index].backward()
            yield from gradients(model)
    yield from step(model, 7)


@situation
def evaluation_between_forward_and_backward(model: AdaptiveViT) -> Iterator[Tensor]:
    with torch.no_grad():
        for seed in range(CALLS):
            torch.manual_seed(seed)
            yield model(batch(model, seed))
    yield from warm(model)
    model.zero_grad()
    loss = loss_of(model(batch(model, 5)))
    with torch.no_grad():
        yield model(batch(model, 6))
    loss.backward()
    yield from gradients(model)


@situation
def outputs_thrown_away(model: AdaptiveViT) -> Iterator[Tensor]:
    """No backward pass ever comes; the next call must not wait for it."""
    yield from warm(model)
    for seed in range(3):
        torch.manual_seed(seed)
        yield model(batch(model, seed)).detach()
    yield from step(model, 7)


@situation
def retained_graph(model: AdaptiveViT) -> Iterator[Tensor]:
    yield from warm(model)
    model.zero_grad()
    torch.manual_seed(0)
    loss = loss_of(model(batch(model, 5)))
    loss.backward(retain_graph=True)
    yield from gradients(model)
    torch.manual_seed(1)
    other = loss_of(model(batch(model, 6)))
    loss.backward()
    yield from gradients(model)
    other.backward()
    yield from gradients(model)


@situation
def gradients_of_some(model: AdaptiveViT) -> Iterator[Tensor]:
    yield from warm(model)
    some = trainable(model)[:2]
    for seed in (5, 6):
        torch.manual_seed(seed)
        yield from torch.autograd.grad(loss_of(model(batch(model, seed))), some)


def twice_differentiable(run: Situation) -> Situation:
    """Neither fused attention nor our pooling has a second derivative."""

    @wraps(run)
    def function(model: AdaptiveViT) -> Iterator[Tensor]:
        with sdpa_kernel(SDPBackend.MATH), use_backend("reference"):
            yield from list(run(model))

    return function


@situation
@twice_differentiable
def second_derivatives(model: AdaptiveViT) -> Iterator[Tensor]:
    yield from warm(model)
    for seed in (5, 6):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = loss_of(model(batch(model, seed)))
        yield torch.rand(1)
        grads = torch.autograd.grad(loss, trainable(model), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        yield from gradients(model)
        yield torch.rand(1)


@situation
@twice_differentiable
def gradients_of_images(model: AdaptiveViT) -> Iterator[Tensor]:
    for seed in range(CALLS + 2):
        torch.manual_seed(seed)
        images = batch(model, seed).requires_grad_()
        loss = loss_of(model(images * 1.0))
        (grad,) = torch.autograd.grad(loss, images, create_graph=seed > CALLS)
        yield grad.detach()
        if grad.requires_grad:
            yield from torch.autograd.grad(grad.square().sum(), images)


@situation
def last_batches_of_epochs(model: AdaptiveViT) -> Iterator[Tensor]:
    for epoch in range(CALLS + 1):
        for seed, size in enumerate((3, 3, 1)):
            yield from step(model, 10 * epoch + seed, size)


@situation
def more_shapes_than_graphs(model: AdaptiveViT) -> Iterator[Tensor]:
    for size in (1, 2, 3, 4, 5, 6, 1, 2):
        yield from warm(model, size=size)


@situation
def training_and_evaluation(model: AdaptiveViT) -> Iterator[Tensor]:
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for epoch in range(3):
        model.train()
        for seed in range(3):
            yield from step(model, 10 * epoch + seed)
            optimizer.step()
        model.eval()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for seed in range(2):
                    yield model(batch(model, seed)).clone()


@situation
def dropouts_of_the_same_seed(model: AdaptiveViT) -> Iterator[Tensor]:
    torch.manual_seed(0)
    for _ in range(CALLS + 3):
        logits = model(batch(model))
        loss_of(logits).backward()
        yield logits.detach()
    yield torch.rand(1)
    yield torch.rand(1, device=next(model.parameters()).device)


@situation
def autocast(model: AdaptiveViT) -> Iterator[Tensor]:
    """Weights that change between two calls within one context: no cast of an old one is used."""
    model.float()
    device_type = next(model.parameters()).device.type
    for enabled in (True, False, True):
        for seed in range(CALLS + 1):
            model.zero_grad()
            torch.manual_seed(seed)
            with torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled):
                logits = model(batch(model, seed))
            loss_of(logits).backward()
            yield logits.detach()
            yield from gradients(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)


@situation
def a_gradient_scaler(model: AdaptiveViT) -> Iterator[Tensor]:
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, init_scale=8.0)
    model.float()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for seed in range(CALLS + 2):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        scaler.scale(loss_of(model(batch(model, seed)))).backward()
        scaler.step(optimizer)
        scaler.update()
        yield from (p.detach().clone() for p in trainable(model))


@situation
def averages_of_parameters(model: AdaptiveViT) -> Iterator[Tensor]:
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for seed in range(CALLS + 2):
        yield from step(model, seed)
        optimizer.step()
        ema.update(model)
        with torch.no_grad():
            yield ema.module.eval()(batch(model, seed))


@situation
def two_models_on_one_backbone(model: AdaptiveViT) -> Iterator[Tensor]:
    other = AdaptiveViT(model.backbone, prompts=PROMPTS, num_classes=3).double().train()
    other.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})
    for seed in range(CALLS + 2):
        losses = []
        for part in (model, other):
            torch.manual_seed(seed)
            part.zero_grad()
            losses.append(loss_of(part(batch(model, seed))))
        for loss in losses:
            loss.backward()
        yield from gradients(model)
        yield from gradients(other)


@situation
def two_adapters(model: AdaptiveViT) -> Iterator[Tensor]:
    """Switching changes no more than an attribute of the model itself."""
    other = copy.deepcopy(model.adapters["default"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.adapters["other"] = other
    for name in ("default", "other", "default"):
        model.active_adapter = name
        yield from warm(model)


@situation
def with_attributes_of_the_user(model: AdaptiveViT) -> Iterator[Tensor]:
    """Objects that can't be copied, and the model itself."""
    model.lock, model.owner = threading.Lock(), {"model": [lambda: model]}
    yield from warm(model)


def after_a_change(change: Callable[[AdaptiveViT], Any]) -> Situation:
    """Steps, a change of the model, steps until the changed model is captured, too."""

    def function(model: AdaptiveViT) -> Iterator[Tensor]:
        yield from warm(model)
        with torch.no_grad():
            change(model)
        yield from warm(model)
        yield from step(model, 8)
        model.eval()
        for seed in range(CALLS + 1):
            yield from step(model, seed)

    return function


def flipped(parameter: Tensor) -> Tensor:
    return parameter.detach().flip(0) * 1.5 + 0.1


QKV, DOWN = "backbone.blocks.1.attn.qkv.weight", "adapters.default.prompts.projector.down.weight"


def in_place(model: AdaptiveViT, name: str) -> None:
    model.get_parameter(name).copy_(flipped(model.get_parameter(name)))


def other_storage(model: AdaptiveViT, name: str) -> None:
    old = model.get_parameter(name)
    old_data = old.data
    old.data = flipped(old)
    old_data.fill_(torch.nan)


def other_parameter(model: AdaptiveViT, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    setattr(model.get_submodule(path), leaf, nn.Parameter(flipped(old), requires_grad=old.requires_grad))
    old.fill_(torch.nan)


def transposed(model: AdaptiveViT) -> None:
    """The same storage and shape, read in another order."""
    weight = model.backbone.blocks[1].attn.proj.weight
    weight.data = weight.data.t()


def of_a_class_of_its_own(model: AdaptiveViT) -> None:
    model.head.weight = type("Own", (nn.Parameter,), {})(model.head.weight.data)


def without_effect(model: AdaptiveViT) -> None:
    model.head.register_parameter("unused", nn.Parameter(torch.ones(2).to(model.head.weight)))


def gathering_hook(model: AdaptiveViT) -> None:
    """A hook as FSDP has on the model itself, which may give it other parameters in each call."""
    hook = type("Hook", (), {"__module__": "torch.distributed.fsdp", "__call__": lambda self, *args: None})()
    model.register_forward_pre_hook(hook)


def counting(model: AdaptiveViT) -> None:
    """A module that changes itself in each call, of a class that is known not to."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        self.count += 1
        return nn.LayerNorm.forward(self, x) * self.count

    forward.__module__ = "timm.layers.norm"
    model.backbone.norm.count = 1
    cls = type(model.backbone.norm)
    model.backbone.norm.__class__ = type(
        "Counting", (cls,), {"forward": forward, "__module__": cls.__module__}
    )


def same_memory(model: AdaptiveViT) -> None:
    """Another parameter, whose gradient is not the old one's, at the same address."""
    projector = model.prompts.projector
    projector.down.weight = nn.Parameter(projector.down.weight.data)


def freed_storage(model: AdaptiveViT, name: str) -> None:
    """The new storage may well get the address of the old one."""
    parameter = model.get_parameter(name)
    new = flipped(parameter).t().contiguous().t()
    parameter.data = torch.empty(0).to(parameter)
    parameter.data = new.clone()


def forward_of_the_class(model: AdaptiveViT) -> None:
    cls = type(
        "Doubling",
        (type(model.backbone.norm),),
        {"forward": lambda self, x: 2 * nn.LayerNorm.forward(self, x)},
    )
    model.backbone.norm.__class__ = cls


def forward_of_the_module(model: AdaptiveViT) -> None:
    norm = model.backbone.norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def other_dropout(model: AdaptiveViT) -> None:
    for block in model.prompts.blocks:
        block.config = replace(block.config, projector_dropout=0.9)


class Lora(nn.Module):
    """A layer of somebody else, with a switch that is no attribute of a module."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(base.weight.detach()[:2].clone())
        self.up = nn.Parameter(torch.full((base.out_features, 2), 0.1).to(base.weight))
        self.switch = {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        self.switch["scale"] += 0.25
        return self.base(x) + self.switch["scale"] * x @ self.down.t() @ self.up.t()


def lora(model: AdaptiveViT) -> None:
    model.backbone.blocks[1].mlp.fc1 = Lora(model.backbone.blocks[1].mlp.fc1)


def hook_that_counts(model: AdaptiveViT) -> None:
    """A hook whose effect changes from call to call."""
    calls: list[int] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        return out * (1 + 0.1 * len(calls))

    model.backbone.blocks[1].register_forward_hook(hook)


def hook_before(model: AdaptiveViT) -> None:
    calls: list[int] = []

    def hook(module: nn.Module, args: Any) -> Any:
        calls.append(1)
        return (args[0] * (1 + 0.1 * len(calls)), *args[1:])

    model.backbone.blocks[2].norm1.register_forward_pre_hook(hook)


def hook_on_gradients(model: AdaptiveViT) -> None:
    calls: list[int] = []

    def hook(module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> Any:
        calls.append(1)
        return tuple(grad * (1 + 0.1 * len(calls)) for grad in grad_inputs)

    model.backbone.blocks[1].mlp.register_full_backward_hook(hook)


def hook_on_a_parameter(model: AdaptiveViT) -> None:
    calls: list[int] = []

    def hook(grad: Tensor) -> Tensor:
        calls.append(1)
        return grad * len(calls)

    model.get_parameter(DOWN).register_hook(hook)


def hook_on_the_model(model: AdaptiveViT) -> None:
    calls: list[int] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        return out * len(calls)

    model.register_forward_hook(hook)


def batch_norm(model: AdaptiveViT) -> None:
    features = model.head.in_features
    model.head = nn.Sequential(nn.BatchNorm1d(features), nn.Dropout(0.3), nn.Linear(features, 3)).to(
        next(model.parameters())
    )


def pruned(model: AdaptiveViT) -> None:
    with torch.enable_grad():
        prune.l1_unstructured(model.backbone.blocks[1].mlp.fc1, "weight", 0.5)


def parametrised(model: AdaptiveViT) -> None:
    parametrize.register_parametrization(model.backbone.blocks[1].mlp.fc1, "weight", Scaled())


def loaded(model: AdaptiveViT) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def assigned(model: AdaptiveViT) -> None:
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    old = [p.data for p in model.parameters()]
    model.load_state_dict(state, assign=True)
    for data in old:
        data.fill_(torch.nan)


CHANGES: dict[str, Callable[[AdaptiveViT], Any]] = {
    "a frozen weight in place": partial(in_place, name=QKV),
    "a learned weight in place": partial(in_place, name=DOWN),
    "a frozen weight in another storage": partial(other_storage, name=QKV),
    "a learned weight in another storage": partial(other_storage, name=DOWN),
    "a transposed weight": transposed,
    "a parameter of another class": of_a_class_of_its_own,
    "a parameter without effect": without_effect,
    "a hook that gathers parameters": gathering_hook,
    "a module that counts its calls": counting,
    "another parameter of the same memory": same_memory,
    "a storage that is freed": partial(freed_storage, name=QKV),
    "another frozen parameter": partial(other_parameter, name=QKV),
    "another learned parameter": partial(other_parameter, name=DOWN),
    "a state dict": loaded,
    "a state dict, assigned": assigned,
    "float32": lambda model: model.float(),
    "float32 and back": lambda model: model.float().double(),
    "another head": lambda model: setattr(model, "head", copy.deepcopy(model.head).requires_grad_()),
    "another number of classes": lambda model: model.reset_classifier(5),
    "fewer blocks": lambda model: model.prune_intermediate_layers(2),
    "another image size": lambda model: model.set_input_size((48, 48)),
    "frozen prompts": lambda model: model.prompts.requires_grad_(False),
    "a frozen adapter": lambda model: model.adapters.requires_grad_(False),
    "a learned backbone": lambda model: model.backbone.requires_grad_(True),
    "another rate of dropout": other_dropout,
    "a number of a module": lambda model: setattr(model.backbone.blocks[1].attn, "scale", 0.7),
    "an epsilon": lambda model: setattr(model.backbone.blocks[0].norm1, "eps", 0.5),
    "another module": lambda model: setattr(model.backbone.blocks[1].mlp, "act", nn.ReLU()),
    "gradient checkpointing": lambda model: model.set_grad_checkpointing(),
    "a class with another forward": forward_of_the_class,
    "a module with another forward": forward_of_the_module,
    "LoRA": lora,
    "a hook": hook_that_counts,
    "a hook before a module": hook_before,
    "a hook on gradients": hook_on_gradients,
    "a hook on a parameter": hook_on_a_parameter,
    "a hook on the model": hook_on_the_model,
    "a batch norm": batch_norm,
    "pruning": pruned,
    "a parametrisation": parametrised,
}
# After these no call can be captured.
UNCAPTURABLE = {
    *("gradient checkpointing", "a class with another forward", "a module with another forward", "LoRA"),
    *("a parameter of another class", "a hook that gathers parameters", "a module that counts its calls"),
    *("a hook", "a hook before a module", "a hook on gradients", "pruning", "a parametrisation"),
}
SITUATIONS |= {f"after {name}": after_a_change(change) for name, change in CHANGES.items()}


@pytest.mark.parametrize("name", SITUATIONS)
def test_gives_the_numbers_without_graphs(
    name: str, device: str, replays: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SITUATIONS[name]
    with use_cuda_graphs(None), use_backend("torch"):
        actual = list(run(make(device)))
    assert replays
    used = len(replays)
    with use_cuda_graphs(False), use_backend("torch"):
        expected = list(run(make(device)))
    assert len(replays) == used
    # Gradients that are differentiated again are added up in another order.
    assert_equal(actual, expected, 1e-12 if name in ("second_derivatives", "gradients_of_images") else 0.0)


@pytest.mark.parametrize("change", CHANGES)
def test_captures_a_changed_model_where_that_is_safe(change: str, device: str, replays: list[Any]) -> None:
    model = make(device)
    with use_backend("torch"):
        list(warm(model))
        with torch.no_grad():
            CHANGES[change](model)
        replays.clear()
        list(warm(model))
    assert bool(replays) == (change not in UNCAPTURABLE)


# ---- calls that graphs can't serve


def checkpointed(model: AdaptiveViT, images: Tensor) -> Tensor:
    return checkpoint(model, images, use_reentrant=False)


def reentrant(model: AdaptiveViT, images: Tensor) -> Tensor:
    return checkpoint(model, images.requires_grad_(), use_reentrant=True)


def with_saved_tensors_elsewhere(model: AdaptiveViT, images: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda saved: saved):
        return model(images)


def functional(model: AdaptiveViT, images: Tensor) -> Tensor:
    parameters = {name: p * 1.5 for name, p in model.named_parameters()}
    return torch.func.functional_call(model, parameters, (images,))


def functional_again(model: AdaptiveViT, images: Tensor) -> Tensor:
    """The same tensors in place of the parameters, as often as makes a graph."""
    parameters = {name: p * 1.5 for name, p in model.named_parameters()}
    outputs = [torch.func.functional_call(model, parameters, (images,)) for _ in range(CALLS)]
    return sum(outputs[1:], outputs[0]) + torch.func.functional_call(model, parameters, (images,))


def transformed(model: AdaptiveViT, images: Tensor) -> Tensor:
    return torch.func.grad(lambda x: loss_of(model(x)))(images)


def forward_mode(model: AdaptiveViT, images: Tensor) -> Tensor:
    return torch.func.jvp(model, (images,), (images,))[1]


def with_hooks_on_all(model: AdaptiveViT, images: Tensor) -> Tensor:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 1.01 if isinstance(out, Tensor) else out
    )
    try:
        return model(images)
    finally:
        handle.remove()


class Tripling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 3 if func is F.layer_norm else out


def with_a_function_mode(model: AdaptiveViT, images: Tensor) -> Tensor:
    with Tripling():
        return model(images)


def no_images(model: AdaptiveViT, images: Tensor) -> Tensor:
    return model(images[:0])


CALLERS: list[Callable[[AdaptiveViT, Tensor], Tensor]] = [
    *(checkpointed, reentrant, with_saved_tensors_elsewhere, functional, functional_again),
    *(transformed, forward_mode),
    *(with_hooks_on_all, with_a_function_mode, no_images),
]


@pytest.mark.parametrize("call", CALLERS)
def test_other_calls_between_captured_ones(
    call: Callable[[AdaptiveViT, Tensor], Tensor], device: str, replays: list[Any]
) -> None:
    def run(model: AdaptiveViT) -> Iterator[Tensor]:
        model.eval()
        yield from warm(model)
        for seed in range(2):
            torch.manual_seed(seed)
            model.zero_grad()
            out = call(model, batch(model, seed))
            yield model(batch(model, 9)).detach()
            if out.requires_grad:
                loss_of(out).backward()
            yield out.detach()
            yield from gradients(model)
            yield from step(model, seed)

    with (
        use_backend("reference" if call in (transformed, forward_mode) else "torch"),
        sdpa_kernel(SDPBackend.MATH),
    ):
        actual = list(run(make(device)))
        # Parameters that take the place of the model's own for a while make its graphs stale.
        assert len(replays) >= (1 if call in (functional, functional_again) else 3)
        with use_cuda_graphs(False):
            expected = list(run(make(device)))
    # Several gradients of one parameter are added up in another order.
    assert_equal(actual, expected, 1e-12 if call is functional_again else 0.0)


def test_other_settings_of_pytorch_are_other_calls(device: str, replays: list[Any]) -> None:
    model = make(device).eval()
    with torch.no_grad(), use_backend("torch"):
        for _ in range(CALLS):
            model(batch(model))
        assert len(replays) == 1
        with sdpa_kernel(SDPBackend.MATH):
            model(batch(model))
        with use_backend("reference"):
            model(batch(model))
        model(batch(model).to(memory_format=torch.channels_last))
        assert len(replays) == 1
        model(batch(model))
    assert len(replays) == 2


def test_a_weight_changed_before_the_backward_pass_is_refused_as_by_autograd(device: str) -> None:
    model = make(device)
    list(warm(model))
    loss = loss_of(model(batch(model)))
    with torch.no_grad():
        model.get_parameter(QKV).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "change", [partial(other_storage, name=QKV), partial(other_storage, name=DOWN), lambda m: m.float()]
)
def test_a_weight_moved_before_the_backward_pass_is_refused(change: Callable[..., Any], device: str) -> None:
    model = make(device)
    list(warm(model))
    loss = loss_of(model(batch(model)))
    change(model)
    with pytest.raises(RuntimeError, match="moved or frozen between"):
        loss.backward()


def test_a_second_backward_pass_is_refused_as_by_autograd(device: str) -> None:
    model = make(device)
    list(warm(model))
    loss = loss_of(model(batch(model)))
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("kind", ["deep", "shallow", "fourier", "kv", "adaptive"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_every_kind_of_prompts(kind: str, backend: str, device: str, replays: list[Any]) -> None:
    prompts = (
        PromptConfig(kind=kind, num_prompts=3, projector_dim=4)
        if kind == "adaptive"
        else PromptConfig(kind=kind, num_prompts=3)
    )
    with use_backend(backend):
        actual = list(training(make(device, prompts)))
        assert replays
        with use_cuda_graphs(False):
            expected = list(training(make(device, prompts)))
    assert_equal(actual, expected)


# ---- choice, memory, failure


def test_can_be_turned_off(device: str, replays: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(model: AdaptiveViT) -> bool:
        replays.clear()
        list(warm(model))
        return bool(replays)

    model = make(device)
    assert runs(model)
    model.cuda_graphs = False
    assert not runs(model)
    with use_cuda_graphs(None):
        assert runs(model)
    model.cuda_graphs = None
    monkeypatch.setenv("VAPT_FAST_CUDA_GRAPHS", "0")
    assert not runs(model)
    with use_cuda_graphs(True):
        assert runs(model)
    monkeypatch.setenv("VAPT_FAST_CUDA_GRAPHS", "yes")
    with pytest.raises(ValueError, match="VAPT_FAST_CUDA_GRAPHS must be 0 or 1, got 'yes'"):
        runs(model)


def test_the_choice_is_checked() -> None:
    with pytest.raises(TypeError, match="cuda_graphs must be True, False or None"):
        AdaptiveViT("test_vit", num_prompts=1, cuda_graphs="yes")
    with pytest.raises(TypeError, match="cuda_graphs must be"), use_cuda_graphs(1):
        pass
    assert AdaptiveViT("test_vit", num_prompts=1, cuda_graphs=True).cuda_graphs is True


def test_true_captures_at_once(device: str, replays: list[Any]) -> None:
    model = make(device)
    with use_cuda_graphs(True):
        list(step(model))
    assert len(replays) == 1


def test_true_says_every_reason_why_it_cannot(device: str) -> None:
    model = make(device)
    with use_cuda_graphs(True):
        lora(model)
        hook_that_counts(model)
        with pytest.raises(CudaGraphError, match=r"blocks.1 has hooks; .*mlp.fc1 is a Lora"):
            model(batch(model))
        model = make(device)
        model.set_grad_checkpointing()
        with pytest.raises(CudaGraphError, match="gradient checkpointing is on"):
            model(batch(model))
        model = make(device)
        counting(model)
        with (
            pytest.warns(RuntimeWarning, match="without a CUDA graph"),
            pytest.raises(CudaGraphError, match="the model changes its own attributes"),
        ):
            model(batch(model))
        model = make(device)
        with pytest.raises(CudaGraphError, match="there are no images"):
            model(batch(model)[:0])
        with pytest.raises(CudaGraphError, match="a replica of DataParallel"):
            model._replicate_for_data_parallel()(batch(model))
        out = model(batch(model))
        with pytest.raises(CudaGraphError, match="an earlier output still waits"):
            model(batch(model))
        del out
        model(batch(model))


def test_true_says_that_a_cpu_has_none() -> None:
    model = make()
    with use_cuda_graphs(True), pytest.raises(CudaGraphError, match="images are on cpu"):
        model(batch(model))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not permitted")]
)
def test_goes_on_without_a_graph_where_capturing_fails(
    error: Exception, replays: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReplayingRecorder, "failure", error)
    with replaying_on_cpu():
        with pytest.warns(
            RuntimeWarning, match=f"without a CUDA graph, because capturing one failed: {error}"
        ):
            actual = list(training(make()))
        assert not replays
        with use_cuda_graphs(True), pytest.raises(CudaGraphError, match=f"failed: {error}"):
            list(step(make()))
    with use_cuda_graphs(False):
        expected = list(training(make()))
    assert_equal(actual, expected)


def test_graphs_are_few(device: str) -> None:
    model = make(device)
    for size in range(1, graphs_module.MAX_GRAPHS + 4):
        list(warm(model, size=size))
    report = model.cuda_graph_report()
    assert report.count(": captured") == graphs_module.MAX_GRAPHS
    assert f"{graphs_module.MAX_GRAPHS + 3}x3x32x48 float64, with gradients: captured" in report
    assert "MiB, repeated 1 times" in report


def test_a_model_that_keeps_changing_is_left_alone(
    device: str, replays: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "FREE_CAPTURES", 2)
    model = make(device)
    for _ in range(2):
        list(warm(model))
        other_storage(model, QKV)
    with pytest.warns(RuntimeWarning, match="keeps changing"):
        list(warm(model))
    assert len(replays) == 2


def test_a_model_that_changes_now_and_then_is_captured_again(
    device: str, replays: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "FREE_CAPTURES", 2)
    model = make(device)
    for _ in range(4):
        for seed in range(CALLS + graphs_module.WORTHWHILE):
            list(step(model, seed))
        other_storage(model, QKV)
    assert len(replays) == 4 * (1 + graphs_module.WORTHWHILE)


def test_adapters_in_turn_keep_their_graphs(device: str, replays: list[Any]) -> None:
    """Whatever string object names them."""

    def in_turn(model: AdaptiveViT) -> Iterator[Tensor]:
        for seed in range(CALLS):
            for letter in "ab":
                model.set_adapter(f"task {letter}")
                yield from step(model, seed)

    def model() -> AdaptiveViT:
        made = make(device)
        for scale, name in enumerate(("task a", "task b"), start=1):
            made.adapters[name] = copy.deepcopy(made.adapters["default"])
            with torch.no_grad():
                for parameter in made.adapters[name].parameters():
                    parameter.mul_(scale)
        return made

    with use_cuda_graphs(False):
        expected = list(in_turn(model()))
    assert not replays
    assert_equal(in_turn(model()), expected)
    assert len(replays) == 2


@pytest.mark.parametrize("change", ["deleted", "moved", "cleared by a new storage"])
def test_memory_is_freed(change: str, device: str) -> None:
    model = make(device)
    list(warm(model))
    with torch.no_grad():
        for _ in range(CALLS):
            model.eval()(batch(model))
    model.train()
    calls = [weakref.ref(known.call) for known in model._cuda_graphs._known.values()]
    assert [call() is None for call in calls] == [False, False]
    if change == "deleted":
        del model
    elif change == "moved":
        model.float()
    else:
        other_storage(model, QKV)
        list(step(model))
    assert [call() is None for call in calls] == [True, True]  # without the garbage collector


def test_copies_have_graphs_of_their_own(device: str, replays: list[Any]) -> None:
    model = make(device)
    list(warm(model))
    replays.clear()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        list(step(other))
        assert not replays


def test_threads(device: str, replays: list[Any]) -> None:
    """Each has images of its own and gets logits of its own, while one of them trains."""
    model = make(device).eval()
    with use_cuda_graphs(False), torch.no_grad():
        expected = [model(batch(model, seed)) for seed in range(4)]
    list(warm(model))
    wrong: list[str] = []

    def infer(seed: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(batch(model, seed)), expected[seed]):
                    wrong.append(f"thread {seed}")

    def train() -> None:
        for _ in range(20):
            loss_of(model(batch(model, 0))).backward()
            model.zero_grad()

    threads = [threading.Thread(target=infer, args=(seed,)) for seed in range(4)]
    threads.append(threading.Thread(target=train))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(replays) > 20


def test_a_call_of_another_thread_while_one_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    images = batch(model, 1)
    with use_cuda_graphs(False), torch.no_grad():
        expected = model(images)
    record, outputs = ReplayingRecorder.record, []

    def call() -> None:
        with torch.no_grad():
            outputs.extend(model(images) for _ in range(CALLS + 1))

    def meanwhile(self: ReplayingRecorder, function: Callable[[], Any]) -> Any:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()
        return record(self, function)

    monkeypatch.setattr(ReplayingRecorder, "record", meanwhile)
    with replaying_on_cpu():
        list(warm(model))
    assert_equal(outputs, [expected] * len(outputs))
    assert len(outputs) == 2 * (CALLS + 1)  # the forward pass and the backward pass


def test_another_forward_of_a_class(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(make(device).backbone.norm)
    forward = cls.forward

    def run(model: AdaptiveViT) -> Iterator[Tensor]:
        yield from warm(model)
        with monkeypatch.context() as context:
            context.setattr(cls, "forward", lambda self, x: 2 * forward(self, x))
            yield from warm(model)
        yield from warm(model)

    actual = list(run(make(device)))
    with use_cuda_graphs(False):
        expected = list(run(make(device)))
    assert_equal(actual, expected)


def test_streams(replays: list[Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model = make("cuda").eval()
    images = [batch(model, seed) for seed in range(4)]
    with torch.no_grad():
        with use_cuda_graphs(False):
            expected = [model(x) for x in images]
        for _ in range(CALLS):
            model(images[0])
        streams = [torch.cuda.Stream() for _ in images]
        torch.cuda.synchronize()
        outputs = []
        for _ in range(10):
            for stream, x in zip(streams, images, strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(model(x))
        torch.cuda.synchronize()
    assert_equal(outputs, expected * 10)
    assert len(replays) > 40


# ---- random sequences

ACTIONS: list[Callable[[AdaptiveViT, random.Random], Iterator[Tensor]]] = []


def action(function: Any) -> Any:
    ACTIONS.append(function)
    return function


@action
def one_step(model: AdaptiveViT, rng: random.Random) -> Iterator[Tensor]:
    yield from step(model, rng.randrange(100), rng.choice((1, 2, 2, 2)))


@action
def several_steps(model: AdaptiveViT, rng: random.Random) -> Iterator[Tensor]:
    yield from warm(model)


@action
def accumulate(model: AdaptiveViT, rng: random.Random) -> Iterator[Tensor]:
    model.zero_grad(set_to_none=rng.random() < 0.5)
    for _ in range(rng.randrange(1, 4)):
        loss_of(model(batch(model, rng.randrange(100)))).backward()
    yield from gradients(model)


@action
def in_flight(model: AdaptiveViT, rng: random.Random) -> Iterator[Tensor]:
    model.zero_grad()
    losses = [loss_of(model(batch(model, rng.randrange(100), rng.choice((1, 2, 2))))) for _ in range(3)]
    rng.shuffle(losses)
    for loss in losses[: rng.randrange(1, 4)]:
        loss.backward(retain_graph=rng.random() < 0.3)
    yield from gradients(model)


@action
def update(model: AdaptiveViT, rng: random.Random) -> Iterator[Tensor]:
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign() * 0.01)
    yield from (p.detach().clone() for p in model.trainable_parameters())


@action
def evaluate(model: AdaptiveViT, rng: random.Random) -> Iterator[Tensor]:
    with rng.choice((torch.no_grad, torch.inference_mode))():
        for _ in range(rng.randrange(1, 4)):
            yield model(batch(model, rng.randrange(100), rng.choice((1, 2, 2)))).clone()


@action
def switch_mode(model: AdaptiveViT, rng: random.Random) -> Iterator[Tensor]:
    model.train(not model.training)
    yield from ()


@action
def freeze(model: AdaptiveViT, rng: random.Random) -> Iterator[Tensor]:
    part = rng.choice([model.prompts.projector, model.prompts.blocks[0], model.head])
    part.requires_grad_(not next(part.parameters()).requires_grad)
    yield from ()


@action
def replace_weights(model: AdaptiveViT, rng: random.Random) -> Iterator[Tensor]:
    name = rng.choice([QKV, DOWN, "backbone.norm.weight"])
    with torch.no_grad():
        rng.choice([in_place, other_storage, other_parameter])(model, name)
    yield from ()


def random_sequence(model: AdaptiveViT, seed: int) -> Iterator[Tensor]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    yield from warm(model)
    for _ in range(8):
        yield from rng.choice(ACTIONS)(model, rng)


@pytest.mark.parametrize(
    "seeds", [range(10), pytest.param(range(10, 200), marks=pytest.mark.full)], ids=["10", "190"]
)
def test_random_sequences(seeds: range, device: str, replays: list[Any]) -> None:
    for seed in seeds:
        actual = list(random_sequence(make(device), seed))
        used = len(replays)
        with use_cuda_graphs(False):
            expected = list(random_sequence(make(device), seed))
        assert len(replays) == used
        assert_equal(actual, expected)
    assert len(replays) > 3 * len(seeds)
