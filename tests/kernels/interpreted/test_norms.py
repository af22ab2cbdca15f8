"""What is particular to add_norm and prompt_pool on Triton: a sum, its norm and its rounding."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import bfloat16
from op_cases import add_norm_case, assert_policy, assert_same_results, far_from_zero, pool_case, results

from vapt_fast import functional

norms = pytest.mark.parametrize(
    ("make", "sizes"), [(add_norm_case, {}), (pool_case, {"patches": 16})], ids=["add_norm", "prompt_pool"]
)


@norms
def test_norm_far_from_zero_and_constant_rows(make, sizes):
    op, formula, tensors, options = far_from_zero(0, make, **sizes)
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-9)
    assert_policy(make, (far_from_zero(seed, make, **sizes) for seed in range(8)), torch.float32)


@pytest.mark.parametrize("sizes", [{"dim": 600}, {"dim": 130, "patches": 65, "rows": 100}], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str
)
def test_error_with_several_blocks_in_every_direction(dtype, sizes):
    make = pool_case if "rows" in sizes else add_norm_case

    def cases():
        for seed in range(3):
            torch.manual_seed(seed)
            yield make(batch=1, **sizes)

    with bfloat16():
        assert_policy(make, cases(), dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, -1], ids=["x", "branch"])
@norms
def test_nan_and_inf_stay_where_they_are_on_torch(make, sizes, position, value):
    """In the outputs and in the gradients, of several blocks."""
    torch.manual_seed(0)
    op, _, tensors, options = make(dim=300, **sizes)
    tensors[position][0, 3, 0] = value
    actual, expected = (results(op, tensors, options | {"backend": b}) for b in ("triton", "torch"))
    for ours, theirs in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_under_autocast_the_sum_stays_wide_and_the_norm_is_rounded_once(dtype, backend):
    torch.manual_seed(0)
    op, _, (x, branch), options = add_norm_case(dim=300)
    options = {k: v.float() if torch.is_tensor(v) else v for k, v in options.items()}
    wide = op(x.float(), branch.to(dtype), **options, backend="torch")
    with bfloat16(), torch.autocast("cpu", dtype):
        total, normed = op(x.float(), branch.to(dtype), **options, backend=backend)
    torch.testing.assert_close(total, wide[0], rtol=1e-6, atol=1e-6)
    # A value that float32 puts next to a tie may be rounded to either side of it.
    assert (normed != wide[1].to(dtype)).float().mean() < 0.01
    torch.testing.assert_close(normed, wide[1].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_normalised_is_the_sum_as_it_is_returned(backend):
    """Where float16 has steps of 2, in which branch alone would be much finer."""
    torch.manual_seed(0)
    branch = torch.randn(2, 3, 64).half()
    x = torch.full_like(branch, 2500)
    total, normed = functional.add_norm(x, branch, eps=1e-6, backend=backend)
    expected = F.layer_norm(total.double(), (64,), eps=1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-3, atol=1e-3)


def test_equal_gradients_are_one_tensor():
    for layer_scale in (False, True):
        op, _, tensors, options = add_norm_case(layer_scale=layer_scale)
        _, (of_x, of_branch) = results(op, tensors, options)
        assert (of_x.data_ptr() == of_branch.data_ptr()) is not layer_scale
