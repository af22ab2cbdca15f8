"""Whole models on the GPU: all backends agree, compile, can be captured, and keep their memory."""

import pytest
import torch

from vapt_fast import AdaptiveViT, PromptConfig
from vapt_fast.benchmark import Comparison, Setting, Variant, Workload

SETTING = Setting("vit_tiny_patch16_224", batch=3, device="cuda", threads=1, image_size=64)
PRECISIONS = ["float64", "float32", "tf32", "bfloat16-autocast", "float16-autocast", "bfloat16", "float16"]


@pytest.fixture(autouse=True)
def default_device():
    """The benchmarks say themselves what is where."""
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["adaptive", "deep", "shallow"])
def test_agrees_with_the_literal_method(backend, kind, precision):
    variants = [Variant(name, kind, 5, precision) for name in ("torch", backend)]
    for row in Comparison(SETTING, variants, modes=()).measure("forward", rounds=2):
        assert row.error is None


def test_agrees_at_full_size(backend):
    setting = Setting("vit_base_patch16_224", batch=8, device="cuda", threads=1)
    variants = [Variant(backend, "adaptive", 50, precision) for precision in ("float32", "bfloat16")]
    for row in Comparison(setting, variants, modes=()).measure("forward", rounds=2):
        assert row.error is None


def gradients(model, images):
    model.zero_grad(set_to_none=True)
    logits = model(images)
    logits.float().square().sum().backward()
    return [logits.detach().clone(), *(p.grad.clone() for p in model.trainable_parameters())]


@pytest.fixture
def model(backend):
    """In eval mode: no dropout makes two runs differ."""
    torch.manual_seed(0)
    options = {"prompts": PromptConfig(num_prompts=5), "num_classes": 7, "img_size": 64}
    made = AdaptiveViT("vit_tiny_patch16_224", backend=backend, **options).eval().cuda()
    for parameter in made.prompts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def test_a_cuda_graph_of_the_whole_model(model):
    static = torch.randn(4, 3, 64, 64, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        gradients(model, static)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = gradients(model, static)
    for _ in range(100):
        static.normal_()
        graph.replay()
        replayed = [t.clone() for t in captured]
        for ours, theirs in zip(replayed, gradients(model, static), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(model, mode):
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    compiled.trainable_parameters = model.trainable_parameters
    for _ in range(4):
        images = torch.randn(4, 3, 64, 64, device="cuda")
        for ours, theirs in zip(gradients(compiled, images), gradients(model, images), strict=True):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_a_thousand_steps_keep_their_memory(backend):
    variant = Variant(backend, "adaptive", 5, "bfloat16-autocast")
    step = Workload(SETTING, variant).runner("training step")

    def used_after(steps):
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    assert used_after(50) == used_after(950)


def test_peak_memory_is_at_most_that_of_pytorch(backend):
    setting = Setting("vit_base_patch16_224", batch=16, device="cuda", threads=1)
    variants = [Variant(name, "adaptive", 50, "bfloat16") for name in ("torch", backend)]
    comparison = Comparison(setting, variants, modes=["training step"])
    plain, kernels = comparison.measure("training step", rounds=2)
    assert kernels.error is None
    assert kernels.peak_memory_mb <= 1.01 * plain.peak_memory_mb
