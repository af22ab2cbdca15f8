"""The whole model on the Triton kernels, every op of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interpreter import bfloat16, recorded_launches
from kernel_cases import KERNELS
from tiny import assert_same, run, tiny_images, tiny_model
from torch import nn

from vapt_fast import BackendUnavailableError, PromptConfig, use_backend

pytestmark = pytest.mark.full

VIT = "vit_tiny_patch16_224"
DROPOUT = {"prompt_dropout": 0.3, "projector_dropout": 0.3, "channel_dropout": 0.3}
KINDS = {
    "adaptive": PromptConfig(num_prompts=3, projector_dim=4, **DROPOUT),
    "depthwise": PromptConfig(num_prompts=3, projector_dim=4, conv_shared=False, conv_padding=1),
    "bare": PromptConfig(num_prompts=2, conv_kernel=None, projector_dim=None, static_depth=0),
    "learned scale": PromptConfig(num_prompts=3, projector_scale_learnable=True, projector_activation="gelu"),
    "deep": PromptConfig(kind="deep", num_prompts=3, prompt_dropout=0.3),
    "shallow": PromptConfig(kind="shallow", num_prompts=3),
    "none": PromptConfig(num_prompts=0),
}
# What differs between families: layer scale and registers, two pooled rows, rotation, no key bias, a score
# bias, norms of queries and keys, attention pooling.
FAMILIES = [
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "vit_base_patch16_rope_mixed_224",
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_xp_224",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prompts(kind):
    model = tiny_model(VIT, prompts=KINDS[kind]).train()
    images = tiny_images(model)
    assert_same(run(model, images, "triton"), run(model, images, "reference"), 1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = tiny_model(name)
    images = tiny_images(model)
    assert_same(run(model, images, "triton"), run(model, images, "reference"), 1e-10)


def test_every_op_runs_its_kernels():
    model = tiny_model(VIT)
    with recorded_launches() as launches:
        run(model, tiny_images(model), "triton")
    launched = {launch.module.removeprefix("vapt_fast.kernels.") for launch in launches}
    ops = {op.removesuffix("_packed") for op in KERNELS}
    assert ops <= launched


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """Logits and gradients are as near to float64 as those of the reference under autocast."""
    errors = {"reference": [], "triton": []}
    for seed in range(3):
        model = tiny_model(VIT, seed)
        images = tiny_images(model, seed)
        exact = run(model, images, "reference")
        model, images = model.float(), images.float()
        for backend, found in errors.items():
            with torch.autocast("cpu", dtype), bfloat16():
                results = run(model, images, backend)
            found += [(results[name] - exact[name]).norm() / exact[name].norm() for name in exact]
    # One seed and one parameter may be lucky; over all of them the kernels must be no worse.
    reference, triton = (torch.stack(found).square().mean().sqrt() for found in errors.values())
    assert triton <= 1.2 * reference


def test_checkpointing_recomputes_on_the_backend_of_the_forward_pass():
    model = tiny_model(VIT)
    images = tiny_images(model)
    expected = run(model, images, "triton")
    model.set_grad_checkpointing()
    model.zero_grad()
    logits = model(images)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    with use_backend("torch"), recorded_launches() as launches:
        (logits * weights.cos()).sum().backward()
    assert launches
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same({"logits": logits.detach()} | grads, expected, 0)


def test_inference_mode_gives_the_same_bits():
    model = tiny_model(VIT)
    images = tiny_images(model)
    expected = model(images).detach()
    with torch.inference_mode():
        assert torch.equal(model(images), expected)
    run(model, images, "triton")  # and training goes on after it


def test_weights_that_someone_trains_are_refused_by_name():
    model = tiny_model(VIT)
    model.backbone.blocks[1].mlp.fc1.weight.requires_grad_()
    with pytest.raises(BackendUnavailableError, match=r"mlp can't run on backend 'triton': .*fc1_weight"):
        model(tiny_images(model))


def test_a_training_step_compiles_into_one_graph_for_every_batch():
    model = tiny_model(VIT)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(images):
        return model(images).square().sum()

    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for batch in (2, 3, 5):
        images = tiny_images(model, batch=batch)
        ours = torch.autograd.grad(compiled(images), list(params.values()))
    expected = torch.autograd.grad(loss(images), list(params.values()))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert len(graphs) == 1


def test_the_backward_pass_is_traced_too():
    """As inductor's: with fake tensors, without side effects, and split into forward and backward."""
    model = tiny_model(VIT)
    images = tiny_images(model)
    expected = run(model, images, "triton")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    logits = compiled(images)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights.cos()).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same({"logits": logits.detach()} | grads, expected, 1e-10)


def test_exports():
    model = tiny_model(VIT)
    images = tiny_images(model)
    exported = torch.export.export(model, (images,))
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    for op in KERNELS:
        assert any(f"vapt_fast.{op.removesuffix('_packed')}" in target for target in targets), op
    torch.testing.assert_close(exported.module()(images), model(images), rtol=1e-12, atol=1e-12)


def train_in_process(rank: int, folder: Path) -> None:
    """One of two processes: the gradient on its half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_model(VIT)
    images = tiny_images(model, batch=4)[2 * rank : 2 * rank + 2]
    with use_backend("triton"):
        network = nn.parallel.DistributedDataParallel(model)
        network(images).square().mean().backward()
    if rank == 0:
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        torch.save(grads, folder / "gradients.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """DistributedDataParallel averages the gradients of two half batches: those of the whole one."""
    torch.multiprocessing.spawn(train_in_process, (tmp_path,), nprocs=2)
    model = tiny_model(VIT)
    model(tiny_images(model, batch=4)).square().mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same(torch.load(tmp_path / "gradients.pt"), expected, 1e-12)
