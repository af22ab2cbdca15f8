"""torch.compile: one graph, any batch, and the numbers of the literal method."""

import copy
from contextlib import contextmanager

import pytest
import torch
from tiny import assert_same, run, tiny_images, tiny_model

from vapt_fast import PromptConfig, use_backend
from vapt_fast.config import KINDS

VIT = "vit_tiny_patch16_224"
# The kind of which most is traced comes first; the others take their minutes later.
EACH_KIND = [kind if kind == "adaptive" else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS]
BATCHES = (2, 3, 5)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


def assert_compiles(kind, training, *, mark=False, ours="torch", **options):
    """Compiled, a model gives the literal method's logits and gradients, from one graph for all batches."""
    config = PromptConfig(kind=kind, num_prompts=3, projector_dim=4, prompt_dropout=0.1)
    model = tiny_model(VIT, prompts=config, depth=2).train(training)
    expected_model = copy.deepcopy(model)
    model.compile(fullgraph=True, **options)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for batch in BATCHES:
        images = tiny_images(model, batch=batch)
        expected = run(expected_model, images, "reference", seed=batch)
        if mark:
            torch._dynamo.mark_dynamic(images, 0)  # an error if the graph is for one batch alone
        assert_same(run(model, images, ours, seed=batch), expected)
    assert counters["unique_graphs"] - before == 1
    if not training:
        with torch.no_grad(), use_backend(ours):
            assert_same({"": model(images)}, {"": expected["logits"]})


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", EACH_KIND)
def test_any_batch(kind, training):
    assert_compiles(kind, training, mark=True, backend="aot_eager")


def test_compile_does_not_start_again_and_again():
    model = tiny_model(VIT, depth=2).float()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    with torch.no_grad():
        for batch in (2, 3, 4, 5, 7, 8, 16):
            images = tiny_images(model, batch=batch)
            assert_same({"": compiled(images)}, {"": model(images)}, 1e-5)
    assert counters["unique_graphs"] - before <= 2  # the first size, then any size


@pytest.mark.full
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_literal_method_too(kind, training):
    assert_compiles(kind, training, dynamic=True, backend="aot_eager", ours="reference")


@contextmanager
def default_device():
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


def device():
    return torch.device("cpu")


@pytest.mark.full
@pytest.mark.parametrize("context", [default_device, device])
@pytest.mark.parametrize("kind", KINDS)
def test_under_a_device(kind, context):
    """Under one, PyTorch 2.8 to 2.11 can't trace Tensor.unflatten, only torch.unflatten."""
    with context():
        assert_compiles(kind, training=True, dynamic=True, backend="aot_eager")


@pytest.mark.full  # its compiler takes a minute
@pytest.mark.parametrize(("kind", "training"), [*((kind, True) for kind in KINDS), ("adaptive", False)])
def test_reduce_overhead(kind, training):
    with torch._inductor.config.patch(fallback_random=True):  # the dropouts' numbers are eager PyTorch's
        assert_compiles(kind, training, mark=True, mode="reduce-overhead")
