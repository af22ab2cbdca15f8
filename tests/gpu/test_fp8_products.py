"""FP8 on a GPU: tensor cores and the quantising kernel against their definitions, and a model in graphs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vapt_fast import AdaptiveViT, use_backend, use_cuda_graphs
from vapt_fast.ops.device import fp8_unsupported_reasons
from vapt_fast.ops.fp8_linear import fp8_linear, quantise
from vapt_fast.ops.fp8_linear.op import quantise_by_torch


@pytest.fixture(autouse=True)
def capable() -> None:
    if reasons := fp8_unsupported_reasons(torch.device("cuda")):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (37, 768), (12608, 768), (768, 3072)], ids=str)
def test_the_kernel_rounds_as_torch_does(
    shape: tuple[int, int], transposed: bool, gelu: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows = torch.randn(shape).to(dtype)
    rows = rows.t().contiguous().t() if transposed else rows
    found, expected = quantise(rows, gelu=gelu), quantise_by_torch(rows.float(), gelu=gelu)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0)
    values, others = found.values.float(), expected.values.float()
    assert (values != others).float().mean() < 0.01  # next to a tie
    torch.testing.assert_close(values, others, rtol=2**-3, atol=2**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", [(1, 16, 16), (37, 768, 2304), (50, 3072, 768), (12608, 768, 768)], ids=str)
def test_tensor_cores(size: tuple[int, int, int], biased: bool, dtype: torch.dtype) -> None:
    """Accumulated in float32 or the like: the CPU's result up to a rounding to bfloat16."""
    torch.manual_seed(0)
    m, k, n = size
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    bias = torch.randn(n).to(dtype) if biased else None
    found = fp8_linear(x, weight, bias, quantise(weight))
    on_cpu = [None if t is None else t.cpu() for t in (x, weight, bias)]
    with use_backend("torch"):
        expected = fp8_linear(*on_cpu, quantise(on_cpu[1]))
    assert found.dtype == dtype
    error = (found.cpu().double() - expected.double()).norm() / expected.double().norm()
    assert error < 2**-7


def step(model: AdaptiveViT, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits = model(images)
    F.cross_entropy(logits.float(), torch.arange(len(images)) % 7).backward()
    return [logits.detach().clone(), *(p.grad.clone() for p in model.trainable_parameters())]


@pytest.mark.parametrize("precision", ["fp8", "fp8-gradients"])
def test_a_model_in_graphs(precision: str) -> None:
    """Bit for bit what it computes without, also after its weights have changed in place."""
    torch.manual_seed(0)
    options = {"num_prompts": 5, "num_classes": 7, "img_size": 64, "backbone_precision": precision}
    model = AdaptiveViT("vit_tiny_patch16_224", **options).eval().to(torch.bfloat16)
    model.prompts.float()
    plain, images = copy.deepcopy(model), torch.randn(4, 3, 64, 64, dtype=torch.bfloat16)
    for _ in range(6):
        for changed in (model, plain):
            with torch.no_grad():
                changed.backbone.blocks[1].attn.qkv.weight[3] *= 1.5
        found = step(model, images)
        with use_cuda_graphs(False):
            expected = step(plain, images)
        assert all(map(torch.equal, found, expected))
    assert "repeated" in model.cuda_graph_report()
    plain.backbone_precision = None
    exact = step(plain, images)
    assert torch.cosine_similarity(found[0].flatten(), exact[0].flatten(), 0) > 0.98
