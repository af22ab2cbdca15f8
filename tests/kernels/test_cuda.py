"""How the CUDA kernels are launched, on a CPU (csrc/emulation): tensors, autograd, ops of PyTorch.

What the kernels compute is tested in test_cuda_prompt_attention.py.
"""

import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from kernel_cases import KERNELS, converted
from op_cases import results

from vapt_fast import AdaptiveViT, PromptConfig, use_backend
from vapt_fast.ops import cuda_launch

pytestmark = pytest.mark.usefixtures("on_emulation")


@pytest.mark.parametrize("op", ["prompt_attention", "prompt_attention_packed"])
def test_what_runs_on_a_gpu_is_taken(op, launching):
    """The cases of tests/gpu and of compute-sanitizer: none is left out there for its sizes."""
    torch.manual_seed(0)
    for sizes in KERNELS[op].cuda_quick:
        with launching() as launches:
            outputs, grads = results(*converted(op, KERNELS[op].make(**sizes), torch.bfloat16))
        assert [name for name, _ in launches] == ["prompt_attention_forward", "prompt_attention_backward"]
        assert all(t.isfinite().all() for t in (*outputs, *grads))


def test_a_view_is_copied_only_where_the_kernels_cannot_read_it():
    joint = torch.zeros(2, 7, 3 * 2 * 8, dtype=torch.bfloat16)
    q = joint.unflatten(-1, (-1, 8))[:, :, 2:4]
    assert cuda_launch.aligned(q) is q
    one = q[:1].as_strided((1, 7, 2, 8), (3, 48, 8, 1))  # the stride of a single image is never used
    assert cuda_launch.aligned(one) is one
    offset = joint.flatten()[1:-47].view(2, -1, 8)[:, :, None]
    assert cuda_launch.aligned(offset) is not offset
    for copied in (q.transpose(2, 3).contiguous().transpose(2, 3), joint[..., :45].unfold(2, 9, 9)[..., :8]):
        assert torch.equal(cuda_launch.aligned(copied), copied)
        assert cuda_launch.aligned(copied).is_contiguous()
    assert cuda_launch.rows(q) == (joint.data_ptr() + 32, 7 * 48, 48, 8)
    assert cuda_launch.rows(q[:0]) is None


def test_launches_are_under_the_device_guard_and_on_the_current_stream(monkeypatch):
    order = []

    @contextmanager
    def device_of(tensor):
        order.append(("enter", tensor))
        yield
        order.append(("leave", tensor))

    function = mock.Mock(side_effect=lambda **arguments: order.append(("launch", arguments)))
    monkeypatch.setitem(sys.modules, "vapt_fast._C", SimpleNamespace(some_op=function))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=(device, 7)))
    tensor = torch.zeros(1)
    cuda_launch.launch("some_op", tensor, size=3)
    assert order == [
        ("enter", tensor),
        ("launch", {"size": 3, "stream": (tensor.device, 7)}),
        ("leave", tensor),
    ]


def test_the_model(launching):
    torch.manual_seed(0)
    model = AdaptiveViT("test_vit", prompts=PromptConfig(num_prompts=2, prompt_dropout=0.0), num_classes=3)
    for parameter in model.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = model.bfloat16().eval()
    images = torch.randn(2, 3, *model._image_size).bfloat16()
    with launching() as launches, torch.no_grad():
        ours = model(images)
    assert {name for name, _ in launches} == {
        "prompt_attention_forward"
    }  # other ops run on PyTorch's operations
    with torch.no_grad(), use_backend("torch"):
        theirs = model(images)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
