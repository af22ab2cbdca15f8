"""The ops as torch.library has them, and that calls in eager mode go around it."""

from unittest import mock

import pytest
import torch
from kernel_cases import KERNELS
from op_cases import assert_same_results, results
from torch.utils.flop_counter import FlopCounterMode

from vapt_fast.ops.base import OPS, Op

CASES = [
    pytest.param(name, sizes, id=f"{name}-{i}", marks=pytest.mark.full if i else ())
    for name, kernels in KERNELS.items()
    for i, sizes in enumerate(kernels.quick)
]


def recorded(name, sizes):
    """The op's Arguments, and the arguments of its backward, of a case."""
    torch.manual_seed(0)
    op, _, tensors, options = KERNELS[name].make(**sizes)
    seen, backward = [], []
    with mock.patch.object(Op, "forward", record(Op.forward, seen)):
        outputs = op(*(t.requires_grad_() for t in tensors), **options)
    outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.requires_grad]
    with mock.patch.object(Op, "backward", record(Op.backward, backward)):
        torch.autograd.backward(outputs, [torch.rand_like(t) for t in outputs])
    return seen[-1], backward[-1]


def record(method, calls):
    def call(self, *args):
        calls.append((self, *args))
        return method(self, *args)

    return call


def plain(values):
    return [v.detach() if isinstance(v, torch.Tensor) else v for v in values]


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_opcheck(name, sizes):
    (op, implementation, args), (_, _, saved, grad_results, needed) = recorded(name, sizes)
    leaves = [
        v.requires_grad_() if f in needed else v for f, v in zip(args._fields, plain(args), strict=True)
    ]
    torch.library.opcheck(op.library_op, (*leaves, implementation))
    backward_op = getattr(torch.ops.vapt_fast, f"{op.name}_backward").default
    flags = [field in needed for field in args._fields]
    given = (*plain(grad_results), *plain(saved), flags, implementation)
    torch.library.opcheck(backward_op, given)


@pytest.mark.parametrize("name", KERNELS)
def test_eager_calls_are_no_ops_of_torch_library(name):
    op, _, tensors, options = KERNELS[name].make(**KERNELS[name].quick[0])
    with mock.patch.object(OPS[name], "library_op", side_effect=AssertionError("called")):
        expected = results(op, tensors, options)
    with mock.patch.object(OPS[name], "library_op", wraps=OPS[name].library_op) as library_op:
        with FlopCounterMode(display=False):  # which sees every call of an op
            actual = results(op, tensors, options)
        assert library_op.call_count == 1
    assert_same_results(actual, expected, 0)


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_kept_is_not_differentiable(name):
    (op, implementation, args), _ = recorded(name, KERNELS[name].quick[0])
    outputs = op.library_op(*args, implementation)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    assert not any(t.requires_grad for t in outputs[op.num_results :])
