"""Products in FP8: the definition, row by row, and the gradients of the unquantised product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vapt_fast.ops.device import fp8_unsupported_reasons
from vapt_fast.ops.fp8_linear import op as fp8
from vapt_fast.ops.fp8_linear.op import LARGEST, Quantised, fp8_linear, quantise

BFLOAT16 = 2**-8  # the largest relative error of rounding to it
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(quantised: Quantised) -> Tensor:
    return quantised.values.double() * quantised.scale.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_a_row_keeps_three_bits_and_its_largest_value(dtype: torch.dtype, magnitude: float) -> None:
    rows = (normal(7, 64) * magnitude).to(dtype)
    quantised = quantise(rows)
    assert quantised.values.dtype == torch.float8_e4m3fn
    assert quantised.scale.dtype == torch.float32
    largest, found = rows.double().abs().amax(1, keepdim=True), exact(quantised)
    assert (quantised.values.double().abs().amax(1) == LARGEST).all()
    smallest = quantised.scale.double() * 2**-6  # below it, e4m3 has steps of one size
    assert ((found - rows.double()).abs() <= (2**-4 + 1e-6) * rows.double().abs().maximum(smallest)).all()
    torch.testing.assert_close(found.abs().amax(1, keepdim=True), largest, rtol=1e-6, atol=0)


def test_rows_are_independent_and_odd_ones_stay_what_they_are() -> None:
    rows = normal(5, 16, dtype=torch.float32)
    rows[1] = 0
    rows[2, 3] = float("nan")
    rows[3, 4] = float("inf")
    together = quantise(rows)
    for i, row in enumerate(rows):
        alone = quantise(row[None])
        assert torch.equal(together.values[i].view(torch.uint8), alone.values[0].view(torch.uint8))
    assert (exact(together)[1] == 0).all()
    assert exact(together)[2].isnan().any()
    y = fp8_linear(rows, normal(16, 16, dtype=torch.float32), None, quantise(normal(16, 16)))
    assert y[[0, 1, 4]].isfinite().all()
    assert not y[2].isfinite().any()
    assert not y[3].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 32), (1, 32), (2, 0, 32)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_product_is_that_of_the_rounded_factors(
    dtype: torch.dtype, shape: tuple[int, ...], biased: bool
) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(48, 32, seed=1, dtype=dtype)
    bias = normal(48, seed=2, dtype=dtype) if biased else None
    y = fp8_linear(x, weight, bias, quantise(weight))
    assert y.dtype == dtype
    terms = exact(quantise(x.flatten(0, -2))), exact(quantise(weight)).t()
    expected = (terms[0] @ terms[1]).view(*shape[:-1], 48) + (0 if bias is None else bias.double())
    size = (terms[0].abs() @ terms[1].abs()).view(*shape[:-1], 48) + (0 if bias is None else bias.abs())
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= 2 * BFLOAT16 * size).all()
    if x.numel():
        assert not torch.equal(y, F.linear(x, weight, bias))


def test_the_product_of_tensor_cores_is_the_same() -> None:
    """torch._scaled_mm as it is called on a GPU, where this PyTorch has it on a CPU."""
    a, b = quantise(normal(21, 64)), quantise(normal(48, 64, seed=1))
    bias = normal(48, seed=2, dtype=torch.bfloat16)
    try:
        y = fp8._scaled_mm(a, b, bias)
    except RuntimeError:
        pytest.skip("torch._scaled_mm has no scales by row on a CPU here")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, fp8._product(a, b, bias), rtol=2 * BFLOAT16, atol=2 * BFLOAT16)


@pytest.mark.parametrize("fp8_gradients", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
def test_gradients(fp8_gradients: bool, gelu: bool) -> None:
    """Of weight and bias as ever, of x by the weight as it is, or rounded by row of its transpose."""
    tensors = [normal(2, 5, 32), normal(48, 32, seed=1), normal(48, seed=2)]
    x, weight, bias = (t.requires_grad_() for t in tensors)
    grad = normal(2, 5, 48, seed=3)
    read = F.gelu(x) if gelu else x
    y = fp8_linear(x, weight, bias, quantise(weight), gelu=gelu, fp8_gradients=fp8_gradients)
    assert torch.equal(y, fp8_linear(read, weight, bias, quantise(weight)))
    found = torch.autograd.grad(y, tensors, grad)
    expected = list(torch.autograd.grad(F.linear(read, weight, bias), tensors, grad, retain_graph=True))
    if fp8_gradients:
        terms = exact(quantise(grad.flatten(0, 1))), exact(quantise(weight.t()))
        rounded = (terms[0] @ terms[1].t()).view_as(x)
        if gelu:
            (rounded,) = torch.autograd.grad(read, x, rounded)
        assert not torch.allclose(rounded, expected[0], rtol=1e-3)
        torch.testing.assert_close(found[0], rounded, rtol=2 * BFLOAT16, atol=0.05)
        found, expected = found[1:], expected[1:]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fp8_gradients", [False, True])
def test_autocast(fp8_gradients: bool) -> None:
    """It casts as before an nn.Linear, and what is computed within is not cast again."""
    tensors = [normal(3, 5, 32), normal(48, 32, seed=1), normal(48, seed=2)]
    x, weight, bias = (t.float().requires_grad_() for t in tensors)
    half = [t.detach().to(torch.bfloat16).requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(x, weight, bias, quantise(half[1]), fp8_gradients=fp8_gradients)
        found = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    expected = fp8_linear(*half, quantise(half[1]), fp8_gradients=fp8_gradients)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(expected.square().sum(), half)
    for one, other in zip(found, gradients, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())


def test_devices_without_fp8_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, said in (((8, 0), ["cuda:0 has compute capability 8.0, they need 8.9"]), ((9, 0), [])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert fp8_unsupported_reasons(torch.device("cuda:0")) == said
    monkeypatch.setattr(fp8, "fp8_unsupported_reasons", lambda device: [f"they need a GPU, got {device}"])
    with pytest.raises(NotImplementedError, match=r"got cpu; set model\.backbone_precision = None"):
        fp8_linear(normal(2, 16), normal(16, 16), None, quantise(normal(16, 16)))
