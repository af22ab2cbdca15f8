"""What is particular to prompt_projector on Triton: prompts that are exactly 0, a scale that is a number."""

from functools import partial

import pytest
import torch
from interpreter import bfloat16
from op_cases import assert_same_results, projector_case, results

EVERYTHING = {"masked": True, "eps": 1e-6, "learned_scale": True}


def case(**sizes):
    torch.manual_seed(0)
    return projector_case(**EVERYTHING | sizes)


def test_scale_may_be_a_number():
    _, _, (*tensors, scale), options = case()
    op, formula, _, _ = case(learned_scale=False)
    learned = results(case()[0], [*tensors, scale.fill_(0.3)], options)
    actual, expected = (results(partial(f, scale=0.3), tensors, options) for f in (op, formula))
    assert_same_results(actual, expected, 1e-10)
    assert_same_results(actual, (learned[0], learned[1][:-1]), 1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_without_a_projector_a_scale_has_no_gradient(batch):
    op, _, tensors, options = case(width=None, learned_scale=False, masked=False, batch=batch)
    for size in {1, batch}:
        tensors_and_scale = [*tensors, torch.full((size,), 0.3).double()]
        actual, expected = (
            results(lambda *t, b=b, **o: op(*t[:-1], scale=t[-1], backend=b, **o), tensors_and_scale, options)
            for b in ("triton", "torch")
        )
        assert_same_results(actual, expected, 1e-10)
        assert not actual[1][-1].any()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_prompts_of_zero(dtype, activation):
    """As at initialisation: their variance is 0, so that the norm multiplies gradients by 1000."""
    op, formula, (pooled, bias, *weights), options = case(dim=32, activation=activation, affine=False)
    tensors = [torch.zeros_like(pooled), torch.zeros_like(bias), *weights]
    expected = results(formula, tensors, options)
    size = expected[1][0].abs().max().item()
    assert size > 100
    own = torch.promote_types(dtype, torch.float32)
    options = {k: v.to(own) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    actual = results(partial(op, dtype=dtype), [t.to(own) for t in tensors], options)
    assert actual[0][0].dtype == dtype
    assert not actual[0][0].any()
    # What comes in is rounded to float16 as well.
    tolerance = {8: 1e-12, 4: 1e-6, 2: 1e-3}[dtype.itemsize] * size
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


def test_norm_far_from_zero_and_constant_rows():
    op, formula, (pooled, bias, *rest), options = case(dim=64, masked=False)
    for tensors in ([pooled, bias + 1e4, *(t * 0.1 for t in rest)], [pooled.clone(), bias, *rest]):
        tensors[0][0, 1] = 7.0
        assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-9)
    op, formula, tensors, options = case(dim=64, masked=False, width=None)
    tensors[0][0, 1] = 7.0
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_prompts_have_the_dtype_that_is_asked_for(dtype):
    op, _, tensors, options = case()
    with bfloat16():
        actual, expected = (
            results(partial(op, dtype=dtype, backend=b), tensors, options) for b in ("triton", "torch")
        )
    assert actual[0][0].dtype == expected[0][0].dtype == dtype
    tolerance = {8: 1e-12, 4: 1e-5, 2: 0.02}[dtype.itemsize]
    for ours, theirs in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        size = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * size)
