"""Products with frozen weights, by whichever library computes them."""

import warnings
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vapt_fast import AdaptiveViT, use_backend
from vapt_fast.backbones.linears import Weights
from vapt_fast.ops import device

linear = import_module("vapt_fast.ops.linear")
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or device._onednn_schema() != device.ONEDNN_SCHEMA,
    reason="this PyTorch has no oneDNN, or another",
)


@pytest.fixture(autouse=True)
def preferred(monkeypatch):
    """oneDNN, whatever this processor is, for products of any size."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "SMALLEST", 0)


def used_onednn(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return any(event.key == "mkldnn::_linear_pointwise" for event in profile.key_averages())


def case(*, batch=(2, 7), inputs=24, outputs=40, bias=True, layout="contiguous"):
    torch.manual_seed(0)
    x, weight = torch.randn(*batch, inputs), torch.randn(outputs, inputs)
    if layout == "rows of a larger one":
        weight = torch.cat([torch.randn(8, inputs), weight, weight])[8 : 8 + outputs]
    elif layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "every other token":
        x = torch.randn(batch[0], 2 * batch[1], inputs)[:, ::2]
    return x, weight, torch.randn(outputs) if bias else None


CASES = {
    "plain": {},
    "a matrix": {"batch": (5,)},
    "one row": {"batch": (1, 1), "inputs": 33, "outputs": 3},
    "without bias": {"bias": False},
    "many": {"batch": (3, 2, 50), "inputs": 96, "outputs": 65},
    "rows of a larger one": {"layout": "rows of a larger one"},
    "transposed": {"layout": "transposed"},
    "every other token": {"layout": "every other token"},
}


def assert_near(given, expected):
    """As near as sums in float32 of some hundred products are."""
    torch.testing.assert_close(given.double(), expected.double(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "bias",
    [torch.arange(80.0)[::2], torch.arange(3.0)[1:2].expand(40), torch.arange(80.0).view(40, 2)[:, 1]],
    ids=["every other", "expanded", "a column"],
)
def test_strides_of_the_bias(bias):
    x, weight, _ = case()
    assert_near(linear.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    x, weight, bias = case(**CASES[name])
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = F.linear(exact, weight.double(), None if bias is None else bias.double())
    cotangent = torch.randn_like(expected)
    results = []

    def run():
        y = linear.linear(x, weight, bias)
        results.extend([y, *torch.autograd.grad(y, x, cotangent.float())])

    assert used_onednn(run)
    assert_near(results[0], expected)
    assert_near(results[1], torch.autograd.grad(expected, exact, cotangent)[0])
    with torch.no_grad():
        assert torch.equal(linear.linear(x, weight, bias), results[0])


def test_second_derivatives():
    x, weight, bias = case()
    x.requires_grad_()
    cotangent = torch.randn(2, 7, 40, requires_grad=True)
    (grad,) = torch.autograd.grad(linear.linear(x, weight, bias), x, cotangent, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), cotangent)
    assert_near(second, 2 * F.linear(grad.detach(), weight))


def test_a_cotangent_that_is_one_number():
    x, weight, bias = case()
    linear.linear(x.requires_grad_(), weight, bias).sum().backward()
    assert_near(x.grad, weight.sum(0).expand_as(x))


def test_weights_changed_before_the_backward_pass_are_noticed():
    x, weight, bias = case()
    y = linear.linear(x.requires_grad_(), weight, bias)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Subclass(torch.Tensor):
    """A tensor that may mean something else, as those of quantisation do."""


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "mkldnn" not in str(func)
        return func(*args, **kwargs or {})


def in_autocast(x, weight, bias):
    with torch.autocast("cpu", torch.bfloat16):
        return linear.linear(x, weight, bias)


def switched_off(x, weight, bias):
    with torch.backends.mkldnn.flags(enabled=False):
        return linear.linear(x, weight, bias)


def watched(x, weight, bias):
    with Watching():
        return linear.linear(x, weight, bias)


def mapped(x, weight, bias):
    return torch.vmap(linear.linear, (0, None, None))(x, weight, bias)


def with_tangents(x, weight, bias):
    return torch.func.jvp(lambda x: linear.linear(x, weight, bias), (x,), (x,))[1] + bias


def sparse(x, weight, bias):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is in beta
        return linear.linear(x, weight.to_sparse_csr(), bias)


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


class Layer(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x):
        return linear.linear(x, self.weight, self.bias)


def exported(x, weight, bias):
    program = torch.export.export(Layer(weight, bias), (x,))
    assert "onednn" not in str(program.graph)
    return program.module()(x)


OTHERWISE = {
    "float64": lambda x, weight, bias: linear.linear(x.double(), weight.double(), bias.double()),
    "bfloat16": lambda x, weight, bias: linear.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
    "a weight that learns": lambda x, weight, bias: linear.linear(x, nn.Parameter(weight), bias),
    "a bias that learns": lambda x, weight, bias: linear.linear(x, weight, nn.Parameter(bias)),
    "a subclass": lambda x, weight, bias: linear.linear(x, weight.as_subclass(Subclass), bias),
    "autocast": in_autocast,
    "switched off": switched_off,
    "a mode of dispatch": watched,
    "vmap": mapped,
    "jvp": with_tangents,
    "vmap, compiled": lambda *case: compiled(mapped)(*case),
    "jvp, compiled": lambda *case: compiled(with_tangents)(*case),
    "autocast, compiled": lambda *case: compiled(in_autocast)(*case),
    "export": exported,
    "a sparse weight": sparse,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_pytorch_decides_where_more_is_asked(name):
    x, weight, bias = case()
    results = []
    assert not used_onednn(lambda: results.append(OTHERWISE[name](x, weight, bias)))
    expected = F.linear(x.double(), weight.double(), bias.double())
    coarse = results[0].dtype == torch.bfloat16
    torch.testing.assert_close(
        results[0].double(), expected, rtol=2e-2 if coarse else 1e-5, atol=1e-1 if coarse else 2e-5
    )


def takes_compiling_for_exporting():
    return compiled(lambda x: x if torch.compiler.is_exporting() else -x)(torch.ones(())) == 1


@pytest.mark.parametrize("name", CASES)
def test_compiled_code(name):
    if takes_compiling_for_exporting():
        pytest.skip("this PyTorch does, so what is compiled is left to it")
    x, weight, bias = case(**CASES[name])
    function = compiled(Layer(weight, bias))
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for repeats in (1, 2):
        batch = torch.cat([x] * repeats).requires_grad_()
        torch._dynamo.maybe_mark_dynamic(batch, 0)
        results = []
        assert used_onednn(lambda batch=batch, results=results: results.append(function(batch)))
        assert used_onednn(results[0].sum().backward)
        assert_near(results[0], torch.cat([expected] * repeats))
        assert_near(batch.grad, weight.sum(0).expand_as(batch))
        with torch.no_grad():
            assert torch.equal(function(batch), results[0])


def test_small_weights_of_compiled_code_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", linear.FEW_TOKENS * 24 * 40 + 1)
    assert not used_onednn(lambda: compiled(linear.linear)(*case()))


def test_the_op_of_compiled_code():
    x, weight, bias = case()
    for some in ((x.requires_grad_(), weight, bias), (x.detach(), weight.t().contiguous().t(), None)):
        torch.library.opcheck(torch.ops.vapt_fast.onednn_linear.default, some)


def test_weights_that_learn_get_gradients():
    x, weight, bias = case()
    parameters = [nn.Parameter(weight), nn.Parameter(bias)]
    linear.linear(x, *parameters).sum().backward()
    assert_near(parameters[0].grad, x.sum((0, 1)).expand_as(weight))
    assert_near(parameters[1].grad, torch.full_like(bias, 14))


def test_small_products_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 2 * 7 * 24 * 40 + 1)
    assert not used_onednn(lambda: linear.linear(*case()))


def test_a_whole_model():
    torch.manual_seed(0)
    model = AdaptiveViT("vit_tiny_patch16_224", img_size=32, num_classes=3, num_prompts=2).eval()
    images = torch.randn(2, 3, 32, 32)
    results = []

    def run():
        logits = model(images)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), model.trainable_parameters())))

    assert used_onednn(run)
    with use_backend("reference"):
        assert not used_onednn(run)
    for given, expected in zip(*results, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_the_parts_of_a_block():
    x, weight, bias = case()
    for part, rows in zip(Weights(weight, bias).split(16), (slice(16), slice(16, None)), strict=True):
        results = []
        assert used_onednn(lambda part=part, results=results: results.append(part(x)))
        assert_near(results[0], F.linear(x, weight[rows], bias[rows]))


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("schema", [device.ONEDNN_SCHEMA, None])
def test_where_it_is_faster(monkeypatch, maker, capability, schema):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(device, "_processor", lambda: f"vendor_id : {maker}")
    monkeypatch.setattr(device, "_onednn_schema", lambda: schema)
    faster = device.onednn_is_faster.__wrapped__()
    assert faster == (maker == "AuthenticAMD" and capability == "AVX512" and schema is not None)
