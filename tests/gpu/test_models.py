"""Whole models on the GPU: all backends agree, compile, can be captured, and keep their memory."""

import copy

import pytest
import torch

from vapt_fast import AdaptiveViT, PromptConfig, use_backend, use_cuda_graphs
from vapt_fast.benchmark import Comparison, Setting, Variant, Workload

SETTING = Setting("vit_tiny_patch16_224", batch=3, device="cuda", threads=1, image_size=64)
WIDE = ["float64", "float32", "tf32"]
SIXTEEN_BIT = ["bfloat16-autocast", "float16-autocast", "bfloat16", "float16"]


@pytest.fixture(autouse=True)
def default_device():
    """The benchmarks say themselves what is where."""
    with torch.device("cpu"):
        yield


def assert_agrees_or_refuses(setting, variant):
    """The CUDA kernels take 16 bits and refuse all else."""
    (row,) = Comparison(setting, [variant], modes=()).measure("forward", rounds=2)
    if variant.backend == "cuda" and variant.precision in WIDE:
        assert row.error.startswith("BackendUnavailableError")
        assert not row.wrong
    else:
        assert row.error is None


@pytest.mark.parametrize("precision", [*WIDE, *SIXTEEN_BIT])
@pytest.mark.parametrize("kind", ["adaptive", "deep", "shallow"])
def test_agrees_with_the_literal_method(backend, kind, precision):
    assert_agrees_or_refuses(SETTING, Variant(backend, kind, 5, precision))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_agrees_at_full_size(backend, precision):
    setting = Setting("vit_base_patch16_224", batch=8, device="cuda", threads=1)
    assert_agrees_or_refuses(setting, Variant(backend, "adaptive", 50, precision))


def gradients(model, images):
    model.zero_grad(set_to_none=True)
    logits = model(images)
    logits.float().square().sum().backward()
    return [logits.detach().clone(), *(p.grad.clone() for p in model.trainable_parameters())]


@pytest.fixture
def model(backend):
    """In eval mode: no dropout makes two runs differ. In bfloat16, which every backend takes."""
    torch.manual_seed(0)
    options = {"prompts": PromptConfig(num_prompts=5), "num_classes": 7, "img_size": 64}
    made = AdaptiveViT("vit_tiny_patch16_224", backend=backend, **options).eval().cuda()
    for parameter in made.prompts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made.bfloat16().prompts.float()
    return made


def random_images():
    return torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.bfloat16)


def test_a_cuda_graph_of_the_whole_model(model):
    static = random_images()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        gradients(model, static)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = gradients(model, static)
    for _ in range(20):
        static.normal_()
        graph.replay()
        replayed = [t.clone() for t in captured]
        for ours, theirs in zip(replayed, gradients(model, static), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(model, mode):
    """What a compiler makes of it is as far from float32 as the model is, up to a factor of 2."""
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    compiled.trainable_parameters = model.trainable_parameters
    literal = copy.deepcopy(model).float()
    eps = torch.finfo(torch.bfloat16).eps
    for _ in range(4):
        images = random_images()
        with use_backend("reference"):
            exact = gradients(literal, images.float())
        both = gradients(compiled, images), gradients(model, images)
        for ours, theirs, right in zip(*both, exact, strict=True):
            errors = [(t - right).norm() / right.norm() for t in (ours, theirs)]
            assert errors[0] <= 2 * (errors[1] + eps)


def test_its_own_cuda_graphs_change_no_bit(model):
    """They are used from the third call on."""
    for _ in range(6):
        images = random_images()
        actual = gradients(model, images)
        with use_cuda_graphs(False):
            expected = gradients(model, images)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)
    with use_cuda_graphs(True):  # they can serve it
        gradients(model, images)


def test_many_steps_keep_their_memory(backend):
    variant = Variant(backend, "adaptive", 5, "bfloat16-autocast")
    step = Workload(SETTING, variant).runner("training step")

    def used_after(steps):
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    assert used_after(20) == used_after(200)


def test_peak_memory_is_at_most_that_of_pytorch(backend):
    setting = Setting("vit_base_patch16_224", batch=16, device="cuda", threads=1)
    variants = [Variant(name, "adaptive", 50, "bfloat16") for name in ("torch", backend)]
    comparison = Comparison(setting, variants, modes=["training step"])
    plain, kernels = comparison.measure("training step", rounds=2)
    assert kernels.error is None
    assert kernels.peak_memory_mb <= 1.01 * plain.peak_memory_mb
