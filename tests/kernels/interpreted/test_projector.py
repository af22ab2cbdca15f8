"""What is particular to prompt_projector on Triton: prompts of 0, a number as scale, rows in registers."""

from functools import partial
from unittest import mock

import pytest
import torch
from interpreter import bfloat16
from kernel_cases import KERNELS, random_cases
from kernel_checks import check_far_offsets, check_values
from op_cases import assert_same_results, projector_case, results

from vapt_fast.ops.prompt_projector import tuning
from vapt_fast.ops.triton_launch import Config

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


# ---- rows in registers, which only the table of what was measured can choose


def in_registers(rows, check, *arguments):
    """Run a check with so many rows a program, in several blocks of channels, whatever the dtype."""
    default = tuning.config

    def config(kernel, dtype, width, dim, activation):
        if kernel == "bwd_weights" or activation == "softmax":
            return default(kernel, dtype, width, dim, activation)
        return Config({"BLOCK_ROWS": rows, "BLOCK_R": 4, "BLOCK_C": 16}, num_warps=1)

    with mock.patch.object(tuning, "config", config):
        check("prompt_projector", *arguments)


OWN = KERNELS["prompt_projector"]
BLOCKS = {"batch": 2, "prompts": 3, "dim": 40, "masked": True, "eps": 0.1, "learned_scale": True}
CASES = [*OWN.quick, BLOCKS, OWN.quick[0] | {"batch": 0}, *random_cases("prompt_projector", 6)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_rows_in_registers_equal_the_formula(sizes, rows):
    in_registers(rows, check_values, sizes)


@pytest.mark.parametrize("far", OWN.far, ids=str)
def test_offsets_of_rows_in_registers(far):
    in_registers(3, check_far_offsets, *far)


@pytest.mark.parametrize(("activation", "rows"), [("relu", 2), ("softmax", 16)])
def test_rows_stay_in_registers_where_the_table_says_so(activation, rows, monkeypatch):
    """Not of softmax, which sees several features at once."""

    def chosen():
        tuning.config.cache_clear()
        return tuning.config("fwd", torch.bfloat16, 8, 768, activation).blocks["BLOCK_ROWS"]

    assert chosen() == 16
    with monkeypatch.context() as patch:
        patch.setattr(
            tuning, "tuned", lambda *_, **__: Config({"BLOCK_ROWS": 2, "BLOCK_R": 2, "BLOCK_C": 128}, 1)
        )
        assert chosen() == rows
    tuning.config.cache_clear()
