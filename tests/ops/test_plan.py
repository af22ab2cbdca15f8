"""What an op finds out about its arguments is asked once for all calls alike, and for no others."""

import pytest
import torch
from op_cases import (
    add_norm_case,
    assert_same_results,
    attention_case,
    mlp_case,
    packed_case,
    pool_case,
    projector_case,
    results,
)

from vapt_fast import BackendUnavailableError, use_backend
from vapt_fast.functional import add_norm, prompt_pool
from vapt_fast.ops.base import Op
from vapt_fast.ops.plan import PLANS

CASES = {
    "add_norm": add_norm_case,
    "prompt_pool": pool_case,
    "prompt_projector": projector_case,
    "prompt_attention": attention_case,
    "prompt_attention_packed": packed_case,
    "mlp": mlp_case,
}


def make(op):
    torch.manual_seed(0)
    function, _, tensors, options = CASES[op]()
    return function, tensors, options


@pytest.fixture
def chosen(monkeypatch):
    """The names of the ops that an implementation was chosen for, in order."""
    names, choose = [], Op.choose
    monkeypatch.setattr(Op, "choose", lambda op, *args: (names.append(op.name), choose(op, *args))[1])
    return names


@pytest.mark.parametrize("op", CASES)
def test_calls_alike_are_checked_once(op, chosen):
    function, tensors, options = make(op)
    first = results(function, tensors, options)
    second = results(function, [t + 1 for t in tensors], options)
    assert chosen == [op]
    assert not any(map(torch.equal, first[0], second[0]))
    with torch.no_grad():
        function(*tensors, **options)
    assert chosen == [op] * 2
    function(*tensors, **options, backend="torch")
    assert chosen == [op] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", CASES)
def test_casts_are_those_of_the_first_call(op, dtype, chosen):
    """Under autocast, and without it before and after."""
    function, tensors, options = make(op)
    tensors = [tensor.to(dtype) for tensor in tensors]
    options = {name: v.to(dtype) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    plain = results(function, tensors, options)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (results(function, tensors, options) for _ in range(2))
    again = results(function, tensors, options)
    assert chosen == [op] * 2
    assert_same_results(second, first, 0)
    assert_same_results(again, plain, 0)


def wrong(tensor):
    yield torch.cat([tensor, tensor], dim=-1)
    yield tensor.long()
    yield tensor.detach().numpy()
    yield tensor.to("meta")


@pytest.mark.parametrize("op", CASES)
def test_a_wrong_call_after_a_right_one_is_refused(op):
    function, tensors, options = make(op)
    function(*tensors, **options)
    for index, tensor in enumerate(tensors):
        for other in wrong(tensor):
            with pytest.raises((TypeError, ValueError)):
                function(*tensors[:index], other, *tensors[index + 1 :], **options)
    for name, value in options.items():
        for other in wrong(value) if isinstance(value, torch.Tensor) else ("1", [1], float("nan")):
            with pytest.raises((TypeError, ValueError)):
                function(*tensors, **options | {name: other})


def test_equal_numbers_of_other_types_are_other_calls():
    x = torch.rand(1, 3, 4)
    expected = add_norm(x, None, eps=1)[1]
    with pytest.raises(TypeError, match="eps"):
        add_norm(x, None, eps=True)
    assert torch.equal(add_norm(x, None, eps=1.0)[1], expected)


def test_a_number_that_is_a_tensor_is_read_in_each_call():
    x, matrices = torch.rand(1, 4, 2), {n: torch.rand(3, 4 - n) for n in (1, 2)}
    number, weight, bias = torch.tensor(1), torch.ones(2), torch.zeros(2)
    for prefix in (1, 2):
        number.fill_(prefix)
        actual = prompt_pool(x, matrices[prefix], weight, bias, num_prefix=number)
        expected = prompt_pool(x, matrices[prefix], weight, bias, num_prefix=prefix)
        assert all(map(torch.equal, actual, expected))


def test_a_frozen_tensor_that_learns_is_noticed(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight, bias = torch.rand(1, 3, 4), torch.ones(4), torch.zeros(4)
    with use_backend("triton"):
        add_norm(x, None, weight, bias)
        weight.requires_grad_()
        with pytest.raises(BackendUnavailableError, match="must not require one"):
            add_norm(x, None, weight, bias)
        with torch.no_grad():
            add_norm(x, None, weight, bias)


def test_plans_of_ever_new_shapes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("vapt_fast.ops.plan._MOST_PLANS", 3)
    for size in range(1, 10):
        add_norm(torch.zeros(1, size, 4), None)
        assert 1 <= len(PLANS) <= 3
