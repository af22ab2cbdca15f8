"""How the CUDA kernels are launched, on a CPU (csrc/emulation): tensors, autograd, ops of PyTorch.

What the kernels compute is tested in test_cuda_prompt_pool.py and test_cuda_prompt_attention.py.
"""

import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from kernel_cases import KERNELS, converted
from op_cases import assert_same_results, layouts, pool_case, results

from vapt_fast import AdaptiveViT, BackendUnavailableError, PromptConfig, use_backend
from vapt_fast.ops import cuda_launch

pytestmark = pytest.mark.usefixtures("on_emulation")
FROZEN = ("norm_weight", "norm_bias", "layer_scale")


def pool(dtype=torch.bfloat16, tokens=None, **sizes):
    """A case in ``dtype``, with tokens x in another one if that is given."""
    torch.manual_seed(0)
    case = pool_case(**{"prefix": 1, "dim": 24} | sizes)
    op, tensors, options = converted("prompt_pool", case, dtype)
    if tokens is not None:
        tensors[0] = tensors[0].to(tokens)
    return op, tensors, options


# ---- values and gradients


@pytest.mark.parametrize("op", [name for name, op in KERNELS.items() if op.cuda_quick])
def test_what_runs_on_a_gpu_is_taken(op, launching):
    """The cases of tests/gpu and of compute-sanitizer: none is left out there for its sizes."""
    torch.manual_seed(0)
    of = op.removesuffix("_packed")
    for sizes in KERNELS[op].cuda_quick:
        with launching() as launches:
            outputs, grads = results(*converted(op, KERNELS[op].make(**sizes), torch.bfloat16))
        assert [name for name, _ in launches] == [f"{of}_forward", f"{of}_backward"]
        assert all(t.isfinite().all() for t in (*outputs, *grads))


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("leaves", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
def test_pool_gives_the_gradients_that_are_needed(leaves, layer_scale):
    """Of the tokens, of what is added to them, of what is learned: one without the others is the same."""
    x, branch, learned = map(bool, leaves)
    op, tensors, options = pool(layer_scale=layer_scale)
    expected = results(op, tensors, options)[1]
    wanted = [x, learned, learned, learned, branch]
    given = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    outputs = op(*given, **options)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    pairs = [(o, i) for o, i in zip(outputs, incoming, strict=True) if o.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    for tensor, want, grad in zip(given, wanted, expected, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            assert torch.equal(tensor.grad, grad)


@pytest.mark.parametrize("name", FROZEN)
def test_layouts_and_dtypes_of_what_is_frozen_make_no_difference_to_pool(name):
    op, tensors, options = pool()
    expected = results(op, tensors, options)
    frozen = options[name]
    every_other = torch.stack([frozen, torch.full_like(frozen, float("nan"))], dim=1)[:, 0]
    for same in (every_other, frozen.float(), frozen.double(), *dict(layouts(frozen)).values()):
        assert_same_results(results(op, tensors, options | {name: same}), expected, 0)


@pytest.mark.parametrize(
    ("reason", "case"),
    [
        ("normed must be float16 or bfloat16, got torch.float32", {"dtype": torch.float32}),
        (".*; branch must be normed's torch.float32, got torch.bfloat16", {"tokens": torch.float32}),
        ("tokens must have 8, 16, 24, ... channels, got 20", {"dim": 20}),
        ("matrix must be float32, got torch.float64", {"matrix": torch.float64}),
    ],
    ids=str,
)
def test_what_pool_has_no_part_for_is_refused(reason, case):
    case = dict(case)
    dtype = case.pop("matrix", torch.float32)
    op, (x, matrix, *rest), options = pool(**case)
    with pytest.raises(BackendUnavailableError, match=rf"prompt_pool can't run on backend 'cuda': {reason}"):
        op(x, matrix.to(dtype), *rest, **options)


# ---- launches


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


# ---- the whole model


def test_the_model(launching):
    torch.manual_seed(0)
    model = AdaptiveViT("test_vit", prompts=PromptConfig(num_prompts=2, prompt_dropout=0.0), num_classes=3)
    for parameter in model.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = model.bfloat16().eval()
    images = torch.randn(2, 3, *model._image_size).bfloat16()
    with launching() as launches, torch.no_grad():
        ours = model(images)
    assert launches
    with torch.no_grad(), use_backend("torch"):
        theirs = model(images)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
