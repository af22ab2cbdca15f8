"""What the checks of the kernels' ops are worth: ops that are broken on purpose have to fail them."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

NAMES = (f"vapt_fast_broken::op{i}" for i in itertools.count())


def double(x):
    return 2 * x


def like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def wrong_gradient(ctx, grad):
    return grad


def right_gradient(ctx, grad):
    return 2 * grad


def make(compute=double, fake=like, backward=right_gradient):
    """An op of one (rows, columns) tensor that doubles it; the defaults are right."""

    def implementation(x: Tensor) -> Tensor:
        return compute(x)

    op = torch.library.custom_op(next(NAMES), implementation, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(backward)
    return op


def matrix(rows=3, columns=4):
    torch.manual_seed(0)
    return torch.randn(rows, columns, dtype=torch.float64, requires_grad=True)


def test_a_right_op_passes():
    op = make()
    for shape in ((3, 4), (1, 7)):
        opcheck(op, (matrix(*shape),))
    assert torch.autograd.gradcheck(op, (matrix(),))


def transposed(x):
    return (2 * x).t().contiguous().t()


def mutating(x):
    with torch.no_grad():
        x.mul_(2)
    return x.clone()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compute": transposed}, "[Ss]tride"),
        ({"fake": lambda x: like(x).float()}, "[Dd]type"),
        ({"compute": lambda x: (2 * x).float()}, "[Dd]type"),
        ({"fake": lambda x: torch.empty_like(x[:1])}, "[Ss]hape"),
        ({"compute": mutating}, "mutate"),
        ({"compute": lambda x: x}, "alias"),
        ({"compute": lambda x: x[:, :]}, "alias"),
    ],
    ids=["stride", "dtype of the fake", "dtype", "shape", "mutation", "the input", "a view of the input"],
)
def test_opcheck_notices(wrong, message):
    if message == "[Ss]tride" and torch.__version__ < (2, 14):
        pytest.skip("opcheck doesn't compare strides yet")
    with pytest.raises(Exception, match=message):
        opcheck(make(**wrong), (matrix(),))


def test_only_gradcheck_notices_a_wrong_gradient():
    op = make(backward=wrong_gradient)
    opcheck(op, (matrix(),))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(op, (matrix(),))


def test_only_other_sizes_give_away_a_fake_of_one_size():
    op = make(fake=lambda x: x.new_empty(3, 4))
    opcheck(op, (matrix(3, 4),))
    with pytest.raises(Exception, match=r"[Ss]hape"):
        opcheck(op, (matrix(5, 2),))
