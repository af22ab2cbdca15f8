"""mlp on Triton, in its interpreter, against the torch backend and the formula."""

import importlib
import itertools
from unittest import mock

import pytest
import torch
from op_cases import FROZEN, assert_policy, assert_same_results, layouts, mlp_case, rand, results

from vapt_fast import BackendUnavailableError, functional

# By its full name: the package has a function of this name.
LAUNCHER = importlib.import_module("vapt_fast.backends.triton.mlp")

WEIGHTS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")

# (B, T, C, D, E): around the sizes of blocks of rows, of hidden features and of what is summed over, which is
# C in the forward and E in the backward.
SHAPES = [
    *itertools.product((1, 2), (1, 5), (1, 7), (3, 8), (1, 6)),
    *((1, t, 5, 9, 5) for t in (15, 16, 17, 31, 32, 33, 63, 64, 65, 197)),
    *((1, 4, c, 8, 5) for c in (15, 16, 17, 31, 32, 33, 48, 49, 192)),
    *((1, 4, 5, d, 5) for d in (15, 16, 17, 31, 32, 33, 63, 64, 65, 256)),
    *((1, 4, 5, 8, e) for e in (15, 16, 17, 31, 32, 33, 192)),
    *((b, 4, 5, 8, 5) for b in (0, 3, 9)),
    (2, 33, 34, 70, 34),
    (1, 300, 3, 70, 3),  # more rows of tiles than one group has
    (2, 0, 5, 8, 5),
]


def case(batch=2, tokens=5, dim=6, hidden=8, out=6, **options):
    torch.manual_seed(0)
    return mlp_case(batch, tokens, dim, hidden, out, **options)


def on_torch(op, tensors, options):
    return results(op, tensors, options | {"backend": "torch"})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_equals_the_torch_backend(shape):
    op, _, tensors, options = case(*shape)
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


@pytest.mark.usefixtures("poisoned")
def test_equals_the_torch_backend_without_bias():
    op, _, tensors, options = case(2, 17, 33, 35, 6, bias=False)
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dim", "hidden"), [(5, 3), (3, 17)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 4), (2, 3)])
def test_gradcheck(batch, tokens, dim, hidden, bias):
    op, _, (x,), options = case(batch, tokens, dim, hidden, dim, bias=bias)
    assert torch.autograd.gradcheck(lambda x: op(x, **options), x.requires_grad_(), fast_mode=True)


def test_no_gradient_asked_for_gives_the_same_output():
    op, _, (x,), options = case(2, 17, 33, 35, 6)
    expected = op(x.requires_grad_(), **options)
    with torch.no_grad():
        assert torch.equal(op(x, **options), expected)
    assert torch.equal(op(x.detach(), **options), expected)


# ---- precision


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_is_at_most_that_of_eager_pytorch(dtype, scale):
    def cases():
        for seed in range(20):
            torch.manual_seed(seed)
            op, formula, tensors, options = mlp_case(batch=1, tokens=9, dim=32, hidden=48, out=32)
            yield op, formula, [t * scale for t in tensors], options

    assert_policy(mlp_case, cases(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_with_several_blocks_in_every_direction(dtype):
    def cases():
        for seed in range(2):
            torch.manual_seed(seed)
            yield mlp_case(batch=1, tokens=130, dim=70, hidden=130, out=70)

    assert_policy(mlp_case, cases(), dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e3, -1e3])
def test_extreme_values_as_on_torch(value):
    op, _, (x,), options = case(2, 3, 4, 5, 4)
    x[0, 1, 2] = value
    actual, expected = results(op, [x], options), on_torch(op, [x], options)
    assert_same_results(actual, expected, 1e-10)
    assert torch.isfinite(actual[0][0][1]).all()


# ---- layouts


def test_layouts_make_no_difference():
    op, _, tensors, options = case(2, 17, 33, 35, 6)
    arguments = {"x": tensors[0]} | options
    expected = results(op, tensors, options)
    for name, tensor in arguments.items():
        for layout, same in layouts(tensor):
            changed = arguments | {name: same}
            actual = results(op, [changed.pop("x")], changed)
            # PyTorch's own products may sum in another order where weights have another layout.
            tolerance = 1e-13 if name.endswith("weight") else 0
            assert_same_results(actual, expected, tolerance, f"{name} {layout}")


def test_layouts_of_the_incoming_gradient_make_no_difference():
    op, _, (x,), options = case(2, 17, 33, 35, 6)
    y = op(x.requires_grad_(), **options)

    def grads(incoming):
        return torch.autograd.grad(y, x, incoming, retain_graph=True)

    incoming = rand(*y.shape)
    expected = grads(incoming)
    for name, same in layouts(incoming):
        assert_same_results([grads(same)], [expected], 0, name)
    ones = torch.ones((), dtype=torch.float64)
    assert_same_results([grads(ones.expand(y.shape))], [grads(torch.ones_like(y))], 0)


def test_some_rows_of_each_image():
    """As in a last block that computes the prefix tokens alone."""
    op, _, (x,), options = case(3, 9, 6, 8, 6)
    assert_same_results(results(op, [x[:, :2]], options), results(op, [x[:, :2].clone()], options), 0)


@pytest.mark.parametrize("name", ["x", "fc1_weight", "fc1_bias", "fc2_weight"])
def test_strides_too_long_for_the_kernels(name):
    """Neighbours lie 2^30 elements apart, in memory that nobody touches."""
    op, _, (x,), options = case(1, 3, 3, 3, 3)
    arguments = {key: tensor.half() for key, tensor in ({"x": x} | options).items()}
    expected = results(op, [arguments["x"]], {key: arguments[key] for key in WEIGHTS})
    tensor = arguments[name]
    memory = torch.empty(2**31 + 64, dtype=torch.float16)  # only the pages that are written take any
    strides = {1: (2**30,), 2: (2**30, 1), 3: (8, 2**30, 1)}[tensor.ndim]
    arguments[name] = memory.as_strided(tensor.shape, strides).copy_(tensor)
    actual = results(op, [arguments["x"]], {key: arguments[key] for key in WEIGHTS})
    assert_same_results(actual, expected, 0)


def test_offsets_beyond_32_bits():
    """Rows far apart, each stride as long as the kernels take it: the last rows lie beyond 2^31 elements."""
    op, _, (x,), options = case(1, 130, 2, 130, 130)
    stride = LAUNCHER.STRIDE_LIMIT - 1
    memory = torch.empty(130 * stride, dtype=torch.float16)
    arguments = {key: tensor.half() for key, tensor in ({"x": x} | options).items()}
    expected = results(op, [arguments["x"]], {key: arguments[key] for key in WEIGHTS})
    for name in ("x", "fc1_weight", "fc2_weight"):
        tensor = arguments[name]
        distant = memory.as_strided(tensor.shape, (*(0,) * (tensor.ndim - 2), stride, 1)).copy_(tensor)
        changed = arguments | {name: distant}
        with mock.patch.object(torch.UntypedStorage, "copy_"):  # the interpreter's, of all memory on itself
            actual = results(op, [changed["x"]], {key: changed[key] for key in WEIGHTS})
        assert_same_results(actual, expected, 0, name)


# ---- launches


def test_each_tile_is_computed_once():
    """Whatever the numbers of tiles, also where the last group is less high than the others."""
    for rows, hidden in itertools.product((1, 8 * 32, 9 * 32, 17 * 32), (1, 33, 129)):
        op, formula, (x,), options = case(1, rows, 1, hidden, 1)
        torch.testing.assert_close(op(x, **options), formula(x, **options), rtol=1e-10, atol=1e-10)


def test_nothing_is_kept_that_no_gradient_needs():
    _, _, (x,), options = case()
    operands = (x, *(options[name] for name in WEIGHTS))
    y, hidden = torch.ops.vapt_fast.mlp(*operands, False)
    assert hidden.shape == (0, 5, 8)
    again, hidden = torch.ops.vapt_fast.mlp(*operands, True)
    assert hidden.shape == (2, 5, 8)
    assert torch.equal(y, again)


def test_results_repeat_bit_by_bit_and_image_by_image():
    op, _, (x,), options = case(3, 17, 33, 35, 6)
    outputs, grads = results(op, [x], options)
    assert_same_results(results(op, [x], options), [outputs, grads], 0)
    activated = [launched(x) for x in (x, x[1:2])]
    assert torch.equal(activated[0][1:2], activated[1])


def launched(x):
    """The hidden features of ``x``, by our kernel alone: PyTorch's product may depend on the batch."""
    _, _, _, options = case(3, 17, 33, 35, 6)
    return torch.ops.vapt_fast.mlp(x, *(options[name] for name in WEIGHTS), True)[1]


# ---- as an op of PyTorch


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    _, _, (x,), options = case(bias=bias)
    weights = [options[name] for name in WEIGHTS]
    torch.library.opcheck(torch.ops.vapt_fast.mlp, (x.requires_grad_(), *weights, True))
    torch.library.opcheck(torch.ops.vapt_fast.mlp, (x.detach(), *weights, False))


def test_opcheck_of_the_backward():
    _, _, (x,), options = case()
    y, hidden = torch.ops.vapt_fast.mlp(x, *(options[name] for name in WEIGHTS), True)
    arguments = (torch.ones_like(y), hidden, options["fc1_weight"], options["fc2_weight"])
    torch.library.opcheck(torch.ops.vapt_fast.mlp_backward, arguments)


def test_hidden_features_are_not_differentiable():
    _, _, (x,), options = case()
    outputs = torch.ops.vapt_fast.mlp(x.requires_grad_(), *(options[name] for name in WEIGHTS), True)
    assert [output.requires_grad for output in outputs] == [True, False]


def test_a_second_derivative_raises():
    op, _, (x,), options = case()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(op(x, **options).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="mlp can't be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["x", *WEIGHTS])
def test_a_forward_derivative_raises(name):
    _, _, (x,), options = case()
    arguments = {"x": x} | options

    def function(tensor):
        return functional.mlp(**arguments | {name: tensor})

    with pytest.raises(NotImplementedError, match="mlp has no forward-mode derivative"):
        torch.func.jvp(function, (arguments[name],), (torch.ones_like(arguments[name]),))


def test_compiles_into_one_graph_for_any_batch():
    op, _, _, options = case()
    compiled = torch.compile(
        lambda x: op(x, **options, backend="triton"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (2, 3, 5):
        tensors = [rand(batch, 5, 6)]
        assert_same_results(results(lambda x: compiled(x), tensors, {}), results(op, tensors, options), 0)


@pytest.mark.parametrize("low", ["x", "fc1_weight"])
def test_dtypes_under_autocast_are_those_of_the_torch_backend(low):
    op, _, (x,), options = case(2, 17, 33, 35, 6)
    arguments = {name: tensor.float() for name, tensor in ({"x": x} | options).items()}
    arguments[low] = arguments[low].bfloat16()
    tensors, options = [arguments.pop("x")], arguments
    with torch.autocast("cpu", torch.float16):
        actual, expected = results(op, tensors, options), on_torch(op, tensors, options)
    assert_same_results(actual, expected, 0.02)
    with torch.autocast("cpu", torch.float16):
        op, _, tensors, options = case()
        assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


def test_a_backward_under_autocast_is_in_the_dtype_of_the_forward():
    op, _, (x,), options = case()
    x = x.float().requires_grad_()
    y = op(x, **{name: tensor.float() for name, tensor in options.items()})
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.autocast("cpu", torch.float16):
        (actual,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(actual, expected)


# ---- what it refuses


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_learn_are_refused(name):
    op, _, (x,), options = case()
    assert name in FROZEN
    learns = options | {name: options[name].clone().requires_grad_()}
    with pytest.raises(
        BackendUnavailableError, match=f"mlp can't run.*no gradient of {name}, which must not"
    ):
        op(x, **learns)
    with torch.no_grad():
        assert torch.equal(op(x, **learns), op(x, **options))


def test_other_dtypes_are_refused():
    op, _, (x,), options = case()
    with pytest.raises(TypeError, match=r"of one dtype.*got x torch.float16, fc1_weight torch.float64"):
        op(x.half(), **options)
    eighth = {name: value.to(torch.float8_e5m2) for name, value in options.items()}
    with pytest.raises(BackendUnavailableError, match=r"mlp can't run.*one dtype.*got torch.float8_e5m2"):
        op(x.to(torch.float8_e5m2), **eighth)
