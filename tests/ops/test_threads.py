"""Threads, replicas, inference mode and compiled calls: each with a backend and results of its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import assert_same, run, tiny_backbone, tiny_images, tiny_model
from torch import Tensor, nn

import vapt_fast
from vapt_fast import AdaptiveViT, PromptConfig, use_backend

VIT = "vit_base_patch16_224"
ARCHITECTURES = [VIT, "beit_base_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
BACKENDS = ["torch", "reference"]
ROUNDS = 6


def in_threads(*functions: Callable) -> list:
    """Their results, run at once; they start together."""
    barrier = threading.Barrier(len(functions))

    def started(function: Callable) -> object:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(started, function) for function in functions]]


def test_threads() -> None:
    """Eight threads: four models on two backends, with gradients, numbers of prompts that differ."""
    cases = []
    for i, name in enumerate(ARCHITECTURES):
        prompts = PromptConfig(num_prompts=2 + i, projector_dim=4, projector_dropout=0.0, channel_dropout=0.0)
        for backend in BACKENDS:
            model = tiny_model(name, seed=i, prompts=prompts, init_values=0.5).train()
            cases.append((model, tiny_images(model, seed=i), backend))
    expected = [run(*case) for case in cases]

    def repeat(case: tuple) -> list[dict[str, Tensor]]:
        return [run(*case) for _ in range(ROUNDS)]

    results = in_threads(*(lambda case=case: repeat(case) for case in cases))
    for actual, alone in zip(results, expected, strict=True):
        for each in actual:
            assert_same(each, alone, 1e-12)


def test_threads_over_one_model() -> None:
    """The backends' results differ in their last bits, by which one knows which of them ran."""
    model = tiny_model("beit_base_patch16_224").float()
    images = tiny_images(model, batch=4)

    def evaluate(backend: str) -> Tensor:
        with torch.inference_mode(), use_backend(backend):
            return model(images)

    expected = {backend: evaluate(backend) for backend in BACKENDS}
    assert not torch.equal(*expected.values())
    backends = BACKENDS * 4
    results = in_threads(*(lambda b=b: [evaluate(b) for _ in range(ROUNDS)] for b in backends))
    for backend, outputs in zip(backends, results, strict=True):
        assert all(torch.equal(output, expected[backend]) for output in outputs)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}], ids=["biases", "no bias of qkv"])
def test_replicas(options: dict[str, bool]) -> None:
    """What nn.DataParallel runs: copies whose parameters are plain attributes, one in each thread."""
    model = tiny_model(VIT, prompts=PromptConfig(num_prompts=3, projector_dim=4), **options).train()
    model.prompts.eval()  # threads would draw dropouts from one generator
    model.backbone.blocks[1].requires_grad_(True)
    images = tiny_images(model, batch=4)
    expected = run(model, images)["logits"]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected).cos()
    for backend in BACKENDS:
        model.zero_grad()
        replicas = [replicate(model) for _ in range(2)]

        def call(i: int, replicas: list = replicas, backend: str = backend) -> Tensor:
            with use_backend(backend):
                return replicas[i](images.chunk(2)[i])

        logits = torch.cat(in_threads(lambda: call(0), lambda: call(1)))
        assert_same({"": logits.detach()}, {"": expected})
        (logits * weights).sum().backward()
        actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_same(actual, gradients)


def replicate(model: nn.Module) -> nn.Module:
    """A replica as torch.nn.parallel.replicate makes them, on the same device."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter) * 1)  # no leaf, as after a broadcast
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return copies[model]


# ---- inference mode


@pytest.mark.parametrize("name", [VIT, "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_program_in_inference_mode(name: str, tmp_path: Path) -> None:
    """Making, loading and evaluating a model, as a server does."""
    trained = tiny_model(name)
    images = tiny_images(trained)
    trained.save_adapter(tmp_path)
    with torch.no_grad():
        expected = {"": trained(images)}
    with torch.inference_mode():
        model = AdaptiveViT.from_adapter(tmp_path, backbone=tiny_backbone(name)).double().eval()
        model.load_adapter(tmp_path)
        for backend in BACKENDS:
            with use_backend(backend):
                assert_same({"": model(images)}, expected)
        state = {key: value * 1 for key, value in model.state_dict().items()}
        assigned = AdaptiveViT(tiny_backbone(name, seed=3), prompts=trained.config).double().eval()
        assigned.load_state_dict(state, assign=True)
        assert_same({"": assigned(images)}, expected)
        copied = copy.deepcopy(assigned)
        assert_same({"": copied(images)}, expected)
    with torch.no_grad():
        assert_same({"": model(images)}, expected)


def test_training_after_inference_mode() -> None:
    """A model that has been evaluated there trains as if it hadn't."""
    model = tiny_model(VIT).train()
    images = tiny_images(model)
    expected = run(model, images)
    with torch.inference_mode():
        model.eval()(images)
    assert_same(run(model.train(), images), expected, 0.0)


# ---- use_backend and torch.compile


@pytest.mark.full
def test_backend_belongs_to_the_thread_that_compiles() -> None:
    """Another thread's use_backend changes neither what is compiled nor what runs."""
    model = tiny_model(VIT, depth=2)
    images = tiny_images(model)
    sizes: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    def compile_and_run() -> Tensor:
        torch.compiler.reset()
        with torch.no_grad():
            return torch.compile(model, backend=count)(images)

    expected = compile_and_run()
    alone, sizes = sum(sizes), []
    with use_backend("reference"):
        compile_and_run()
    literal, sizes = sum(sizes), []
    assert literal != alone  # so that sizes tell the backends apart
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("reference"):
            inside.set()
            done.wait(120)

    def mine() -> Tensor:
        inside.wait(120)
        try:
            return compile_and_run()
        finally:
            done.set()

    _, actual = in_threads(other, mine)
    assert sum(sizes) == alone
    assert_same({"": actual}, {"": expected})


@pytest.mark.skipif(torch.__version__.startswith("2.8"), reason="it rounds otherwise in compiled code")
def test_compiled_model_follows_use_backend() -> None:
    """A compiled model compiles again for another backend, and takes the first again afterwards."""
    torch.compiler.reset()
    model = tiny_model(VIT, depth=2).float()
    images = tiny_images(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for backend in (*BACKENDS, *BACKENDS):
            with use_backend(backend):
                assert torch.equal(compiled(images), model(images))


def test_use_backend_that_overlap() -> None:
    """Blocks of two threads that end in another order leave both as they were."""
    model = tiny_model(VIT, depth=1).float()
    images = tiny_images(model)
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def resolved() -> str:
        return vapt_fast.ops.backend.resolve()

    def one() -> list[str]:
        with use_backend("reference"):
            first_in.set()
            second_in.wait(60)
            seen = [resolved()]
        first_out.set()
        return [*seen, resolved()]

    def two() -> list[str]:
        first_in.wait(60)
        with use_backend("torch"):
            second_in.set()
            first_out.wait(60)
            seen = [resolved()]
            model(images)
        return [*seen, resolved()]

    default = resolved()
    assert in_threads(one, two) == [["reference", default], ["torch", default]]
    assert resolved() == default
