"""What is particular to mlp on Triton: its grouped tiles, and strides that its kernels don't take."""

import itertools

import pytest
import torch
from op_cases import assert_same_results, mlp_case, results


def case(**sizes):
    torch.manual_seed(0)
    return mlp_case(**sizes)


@pytest.mark.parametrize("value", [-float("inf"), 1e3, -1e3])
def test_extreme_values_as_on_torch(value):
    op, _, (x,), options = case()
    x[0, 1, 2] = value
    actual, expected = (results(op, [x], options | {"backend": b}) for b in ("triton", "torch"))
    assert_same_results(actual, expected, 1e-10)
    assert torch.isfinite(actual[0][0][1]).all()


def test_each_tile_is_computed_once():
    """Whatever the numbers of tiles, also where the last group is less high than the others."""
    for tokens, hidden in itertools.product((1, 8 * 32, 9 * 32, 17 * 32), (1, 33, 129)):
        op, formula, (x,), options = case(batch=1, tokens=tokens, dim=1, hidden=hidden, out=1)
        torch.testing.assert_close(op(x, **options), formula(x, **options), rtol=1e-10, atol=1e-10)


def test_some_rows_of_each_image():
    """As in a last block that computes the prefix tokens alone."""
    op, _, (x,), options = case(batch=3, tokens=9)
    assert_same_results(results(op, [x[:, :2]], options), results(op, [x[:, :2].clone()], options), 0)


@pytest.mark.parametrize("name", ["x", "fc1_weight", "fc1_bias", "fc2_weight"])
def test_strides_too_long_for_the_kernels(name):
    """Neighbours lie 2^30 elements apart, in memory that nobody touches."""
    op, _, (x,), options = case(batch=1, tokens=3, dim=3, hidden=3, out=3)
    arguments = {key: tensor.half() for key, tensor in ({"x": x} | options).items()}

    def run(x, **options):
        return results(op, [x], options)

    expected = run(**arguments)
    tensor = arguments[name]
    memory = torch.empty(2**31 + 64, dtype=torch.float16)  # only the pages that are written take any
    strides = {1: (2**30,), 2: (2**30, 1), 3: (8, 2**30, 1)}[tensor.ndim]
    arguments[name] = memory.as_strided(tensor.shape, strides).copy_(tensor)
    assert_same_results(run(**arguments), expected, 0)
