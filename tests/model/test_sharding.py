"""Several processes (DDP), weights sharded over them (FSDP2) or waiting elsewhere (accelerate's offloading).

Hooks gather them around each module's call, whatever the units are: outputs and gradients are those of one
process that has everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import assert_same, run, tiny_backbone, tiny_images, tiny_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from vapt_fast import AdapterError, AdaptiveViT, PromptConfig, use_backend
from vapt_fast.prompts import AdaptivePrompts, StaticPrompts

OPTIONS = {"projector_dim": 4, "projector_dropout": 0.0, "channel_dropout": 0.0}
MODELS = {
    "vit": ("vit_base_patch16_224", PromptConfig(num_prompts=4, **OPTIONS)),
    "deep": ("vit_base_patch16_224", PromptConfig(kind="deep", num_prompts=4)),
    "shallow": ("vit_base_patch16_224", PromptConfig(kind="shallow", num_prompts=4)),
    "own projectors": (
        "vit_base_patch16_224",
        PromptConfig(num_prompts=4, projector_shared=False, **OPTIONS),
    ),
    "beit": ("beit_base_patch16_224", PromptConfig(num_prompts=4, **OPTIONS)),
    "rotary": ("eva02_base_patch14_224", PromptConfig(num_prompts=4, **OPTIONS)),
}


def of_class(*classes: type) -> Callable[[AdaptiveViT], list[nn.Module]]:
    return lambda model: [module for module in model.modules() if isinstance(module, classes)]


# Modules that are sharded each by itself, besides the model as a whole.
UNITS: dict[str, Callable[[AdaptiveViT], list[nn.Module]]] = {
    "root": lambda model: [],
    "blocks": lambda model: list(model.backbone.blocks),
    "every Linear": of_class(nn.Linear),
    "every norm": of_class(nn.LayerNorm),
    "attention": lambda model: [block.attn for block in model.backbone.blocks],
    "MLP": lambda model: [block.mlp for block in model.backbone.blocks],
    "prompts": lambda model: [model.prompts],
    "prompts by block": of_class(AdaptivePrompts, StaticPrompts),
    "backbone": lambda model: [model.backbone],
    "head": lambda model: [model.head],
    "all of these": lambda model: [
        *of_class(nn.Linear)(model), *model.backbone.blocks, model.prompts, model.backbone
    ],
}  # fmt: skip
CASES = [("vit", units) for units in UNITS] + [
    *(("deep", "prompts by block"), ("own projectors", "every Linear"), ("beit", "attention")),
    *(("beit", "blocks"), ("rotary", "every Linear"), ("rotary", "backbone")),
    *((name, "DDP") for name in ("vit", "deep", "shallow", "untrained")),
]


def make(name: str) -> tuple[AdaptiveViT, Tensor]:
    if name == "untrained":
        torch.manual_seed(0)
        model = AdaptiveViT(tiny_backbone("vit_base_patch16_224"), prompts=MODELS["vit"][1]).double().train()
    else:
        architecture, prompts = MODELS[name]
        model = tiny_model(architecture, prompts=prompts).train()
    model.backbone.blocks[1].requires_grad_(True)  # some of the backbone learns too
    return model, tiny_images(model, batch=4)


def loss(logits: Tensor) -> Tensor:
    return logits.square().mean()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def refusal_of_sharded_weights(mesh: dist.DeviceMesh, folder: Path) -> str:
    model = tiny_model("vit_base_patch16_224")
    fully_shard(model, mesh=mesh)
    with pytest.raises(AdapterError) as raised:
        model.save_adapter(folder / "adapter")
    return str(raised.value)


def in_process(rank: int, folder: Path) -> None:
    """One of two processes, with half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    results = {"refusal": refusal_of_sharded_weights(mesh, folder)}
    for name, units in CASES:
        model, images = make(name)
        network: nn.Module = model
        if units == "DDP":
            network = nn.parallel.DistributedDataParallel(model)
        else:
            for unit in UNITS[units](model):
                fully_shard(unit, mesh=mesh)
            fully_shard(model, mesh=mesh)
        outputs = []
        for _ in range(2):  # DDP notices in the second step what had no gradient in the first
            model.zero_grad()
            logits = network(images.chunk(2)[rank])
            outputs.append(logits.detach())
            loss(logits).backward()
        gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad(), use_backend("reference"):
            outputs.append(network(images.chunk(2)[rank]))
        results[name, units] = outputs, gradients
    torch.save(results, folder / f"results{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict]]:
    folder = tmp_path_factory.mktemp("sharding")
    torch.multiprocessing.spawn(in_process, (folder,), nprocs=2)
    return [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_distributed(results: list[dict], case: tuple[str, str]) -> None:
    model, images = make(case[0])
    logits = model(images)
    loss(logits).backward()
    for rank, half in enumerate(logits.detach().chunk(2)):
        outputs, gradients = results[rank][case]
        for output in outputs:
            assert_same({"logits": output}, {"logits": half}, 1e-12)
        expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_same(gradients, expected, 1e-12)


def test_sharded_weights_are_not_saved(results: list[dict]) -> None:
    for of_rank in results:
        assert "is sharded (DTensor)" in of_rank["refusal"]


# ---- accelerate


SEPARATE_BIAS = ("beit_base_patch16_224", "eva02_tiny_patch14_224")


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_base_patch14_224", *SEPARATE_BIAS])
@pytest.mark.parametrize("part", ["model", "backbone", "blocks", "prompts"])
def test_cpu_offload(name: str, part: str) -> None:
    """Between two calls the weights are on the meta device."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = tiny_model(name, prompts=PromptConfig(num_prompts=3, projector_dim=4)).eval()
    images = tiny_images(model)
    options = {"preload_module_classes": ["Block", "EvaBlock"]} if name in SEPARATE_BIAS else {}
    with torch.no_grad():
        expected = model(images)
        module = {"model": model, "blocks": model.backbone.blocks}.get(part) or getattr(model, part)
        accelerate.cpu_offload(module, torch.device("cpu"), **options)
        assert any(parameter.is_meta for parameter in model.parameters())
        for backend in ("torch", "reference", "torch"):
            with use_backend(backend):
                assert_same({"logits": model(images)}, {"logits": expected})
        assert any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", SEPARATE_BIAS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_cpu_offload_out_of_reach(name: str, backend: str) -> None:
    """timm reads the weight of qkv in the call of the attention: better no numbers than wrong ones."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = tiny_model(name)
    images = tiny_images(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with torch.no_grad(), use_backend(backend), pytest.raises(RuntimeError, match="preload_module_classes"):
        model(images)


def test_offloaded_weights_are_not_saved(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = tiny_model("vit_base_patch16_224")
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(AdapterError, match="as accelerate offloads it"):
        model.save_adapter(tmp_path)


def test_align_devices() -> None:
    """accelerate's hooks that only move tensors, in training."""
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    model = tiny_model("vit_base_patch16_224").train()
    images = tiny_images(model)
    expected = run(model, images, "reference")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(torch.device("cpu"), io_same_device=True))
    assert_same(run(model, images), expected)
