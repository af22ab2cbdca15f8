"""Batches in which each image has an adapter of its own: numbers, graphs, and nothing that waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from several import BASE, mixed_batch, one_by_one, outcome, several
from tiny import assert_same

from vapt_fast import AdapterStack, AdaptiveViT, use_backend, use_cuda_graphs

BACKENDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """The models are made on the CPU."""
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_in_one_batch(backend: str) -> None:
    model = several()
    images, names = mixed_batch(model)
    model, images = model.cuda(), images.cuda()
    with use_backend("torch"):
        expected = outcome(model, lambda: one_by_one(model, images, names))
    with use_backend(backend):
        assert_same(outcome(model, lambda: model(images, adapter_names=names)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_gpu(backend: str) -> None:
    model = several().cuda()
    images, names = mixed_batch(model)
    images = images.cuda()
    with use_backend(backend):
        for mode in ("default", "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                model(images, adapter_names=names).clamp(min=-9).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def stack_of(model: AdaptiveViT) -> AdapterStack:
    prompts = [adapter.prompts.config for adapter in model.adapters.values()]
    stack = AdapterStack(model, capacity=len(model.adapters), prompts=prompts, max_classes=7)
    for name in model.adapters:
        stack.add_adapter(name)
    return stack


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stack_in_a_graph_changes_no_bit(backend: str) -> None:
    """Also after adapters were replaced and deleted."""
    model = several().cuda()
    stack = stack_of(model)
    images, names = mixed_batch(model)
    images = images.cuda()

    def both() -> Iterator[torch.Tensor]:
        yield stack(images, names)
        with use_cuda_graphs(False):
            yield stack(images, names)

    with use_backend(backend), torch.inference_mode():
        for _ in range(5):
            assert torch.equal(*both())
        stack.add_adapter("deep", model.adapters["fourier"])
        stack.delete_adapter("sum")
        names = [BASE if name == "sum" else name for name in names]
        assert torch.equal(*both())
    assert "repeated" in stack._cuda_graphs.report()
