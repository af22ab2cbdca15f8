"""prompt_pool on Triton, in its interpreter, against the torch backend and the formula."""

import importlib
import itertools
from unittest import mock

import pytest
import torch
from interpreter import recorded_launches
from op_cases import assert_policy, assert_same_results, far_from_zero, layouts, pool_case, rand, results
from torch.autograd import forward_ad

from vapt_fast import BackendUnavailableError

# By their full names: the package has functions of these names.
LAUNCHERS = [
    importlib.import_module(f"vapt_fast.backends.triton.{name}")
    for name in ("_launch", "add_norm", "prompt_pool")
]

# (B, S, N, C, R): every number of patches, width and number of rows that occurs, and block sizes +- 1.
SHAPES = [
    *itertools.product((1, 2), (0, 5), (1, 16), (5, 64), (1, 10)),
    *((1, 1, n, 8, 3) for n in (31, 32, 33, 49, 63, 64, 65, 196, 256, 729)),
    *((1, 1, 4, c, 3) for c in (63, 65, 192, 255, 256, 257, 384, 768, 1024, 1280)),
    *((1, 0, 4, 8, r) for r in (15, 16, 17, 31, 32, 33, 50, 100, 400)),
    *((b, 1, 4, 8, 3) for b in (0, 3, 4, 5, 9)),
    *((2, s, 4, 8, 3) for s in (4, 10)),
    *((b, 1, 4, 8, 0) for b in (0, 2)),
    (2, 1, 49, 70, 20),
]


# Without a branch to add, with one, and with one that has a layer_scale; without and with an affine of the norm.
RESIDUALS = [
    {"branch": branch, "layer_scale": layer_scale, "affine": affine}
    for affine in (False, True)
    for branch, layer_scale in ((False, False), (True, False), (True, True))
]


def case(batch, prefix, patches, dim, rows, **residual):
    torch.manual_seed(0)
    return pool_case(batch=batch, prefix=prefix, patches=patches, dim=dim, rows=rows, **residual)


def op_case(batch, prefix, patches, dim, rows, **residual):
    """The arguments of vapt_fast::prompt_pool, all of which could need a gradient but what is frozen."""
    _, _, tensors, options = case(batch, prefix, patches, dim, rows, **residual)
    x, matrix, weight, bias, *branch = (t.requires_grad_() for t in tensors)
    branch = branch[0] if branch else None
    frozen = (options.get(name) for name in ("layer_scale", "norm_weight", "norm_bias"))
    numbers = (options["num_prefix"], options["eps"], options["prompt_eps"])
    return x, branch, *frozen, matrix, weight, bias, x.dtype, *numbers


def on_torch(op, tensors, options):
    return results(op, tensors, options | {"backend": "torch"})


@pytest.mark.parametrize(
    ("shape", "residual"),
    [(shape, RESIDUALS[i % 6]) for i, shape in enumerate(SHAPES)]
    + [(shape, residual) for shape in SHAPES[::6] for residual in RESIDUALS],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_equals_the_torch_backend(shape, residual):
    op, _, tensors, options = case(*shape, **residual)
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("residual", RESIDUALS, ids=str)
def test_gradcheck(residual, prefix, rows):
    op, _, tensors, options = case(2, prefix, 4, 5, rows, **residual)
    options |= {"eps": 0.05, "prompt_eps": 0.5}  # far apart, so that an error in s would show
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *a: op(*a, **options), leaves, fast_mode=True)


# ---- precision


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_eager_pytorch(dtype, scale):
    def cases():
        for seed in range(20):
            torch.manual_seed(seed)
            op, formula, tensors, options = pool_case(batch=1, dim=32)
            yield op, formula, [t * scale for t in tensors], options

    assert_policy(pool_case, cases(), dtype)


@pytest.mark.parametrize("rows", [50, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_with_several_blocks_in_every_direction(dtype, rows):
    sizes = {"batch": 1, "prefix": 1, "patches": 65, "dim": 130, "rows": rows}

    def cases():
        for seed in range(2):
            torch.manual_seed(seed)
            yield pool_case(**sizes)

    assert_policy(pool_case, cases(), dtype)


def test_norm_far_from_zero_and_constant_rows():
    op, formula, tensors, options = far_from_zero(0, pool_case, patches=16)
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-9)
    assert_policy(pool_case, (far_from_zero(seed, pool_case, patches=16) for seed in range(8)), torch.float32)


def test_dtypes_are_those_of_the_torch_backend():
    op, _, tensors, options = case(2, 1, 4, 8, 3)
    x, matrix, weight, bias, branch = (t.float() for t in tensors)
    low = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for dtype, branch_dtype, autocast in itertools.product(low, low, (False, True)):
        for affine_dtype in (torch.float16, torch.float32):
            arguments = [x.to(dtype), matrix, weight.to(affine_dtype), bias.to(affine_dtype)]
            arguments += [branch.to(branch_dtype)]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                actual, expected = results(op, arguments, options), on_torch(op, arguments, options)
            for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
                assert ours.dtype == theirs.dtype
            total, normed, pooled = actual[0]
            assert total.dtype == torch.promote_types(dtype, branch_dtype)
            narrows = autocast and total.dtype != torch.float64
            assert normed.dtype == (torch.bfloat16 if narrows else total.dtype)
            assert pooled.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 3])
def test_nan_and_inf_propagate_as_on_torch(value, token):
    op, _, tensors, options = case(2, 1, 33, 70, 3)
    tensors[0][0, token, 0] = value
    actual, expected = results(op, tensors, options), on_torch(op, tensors, options)
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))


# ---- layouts


def test_layouts_make_no_difference():
    op, _, tensors, options = case(2, 2, 9, 6, 3)
    expected = results(op, tensors, options)
    for position, tensor in enumerate(tensors):
        for name, same in layouts(tensor):
            actual = results(op, [*tensors[:position], same, *tensors[position + 1 :]], options)
            assert_same_results(actual, expected, 0, f"argument {position} {name}")
    for option in ("layer_scale", "norm_weight", "norm_bias"):
        for name, same in layouts(options[option]):
            actual = results(op, tensors, options | {option: same})
            assert_same_results(actual, expected, 0, f"{option} {name}")


def test_layouts_of_incoming_gradients_make_no_difference():
    op, _, tensors, options = case(2, 2, 9, 6, 3)
    leaves = [t.requires_grad_() for t in tensors]
    outputs = op(*leaves, **options)
    incoming = [rand(*output.shape) for output in outputs]
    expected = torch.autograd.grad(outputs, leaves, incoming, retain_graph=True)
    for position, grad in enumerate(incoming):
        for name, same in layouts(grad):
            given = [*incoming[:position], same, *incoming[position + 1 :]]
            actual = torch.autograd.grad(outputs, leaves, given, retain_graph=True)
            assert_same_results([actual], [expected], 0, f"gradient {position} {name}")


def test_expanded_tensors():
    """A stride of 0: in the incoming gradients, as sum() makes it, and in every argument."""
    shapes = (2, 1, 4, 6, 3)
    op, _, tensors, options = case(*shapes)
    tensors = [t[:1].expand(t.shape) if t.ndim > 1 else t[0].expand(t.shape) for t in tensors]
    grads = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = op(*leaves, **options, backend=backend)
        grads.append(torch.autograd.grad(sum(output.sum() for output in outputs), leaves))
    assert_same_results([grads[0]], [grads[1]], 1e-10)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_32_bits(dim):
    """Two neighbours in ``dim`` lie more than 2^31 elements apart, in memory that nobody touches."""
    op, _, tensors, options = case(2, 1, 2, 2, 3, branch=False)
    x, *rest = (t.float() for t in tensors)
    stride = (2**31 + 64) // (x.shape[dim] - 1)
    strides = [1 if d == dim else 8**d for d in range(3)]
    strides[dim] = stride
    far = torch.empty(2**31 + 1024).as_strided(x.shape, strides).copy_(x)
    with mock.patch.object(torch.UntypedStorage, "copy_"):  # the interpreter's, of the whole memory on itself
        actual = results(op, [far, *rest], options)
    assert_same_results(actual, results(op, [x, *rest], options), 0)


# ---- launches


def test_nothing_is_launched_for_what_needs_no_gradient():
    op, _, (x, matrix, weight, bias, branch), options = case(1, 1, 2, 4, 2)
    with recorded_launches() as launches:
        op(x, matrix.requires_grad_(), weight, bias, branch, **options)[-1].sum().backward()
    assert "tokens_backward" not in dict(launches)
    for leaf in (x, branch):
        leaf.requires_grad_()
        with recorded_launches() as launches:
            op(x, matrix.detach(), weight, bias, branch, **options)[-1].sum().backward()
        assert list(dict(launches)) == ["forward", "pool", "tokens_backward"]
        leaf.requires_grad_(False)


def test_results_repeat_bit_by_bit():
    op, _, tensors, options = case(9, 1, 4, 8, 3)
    assert_same_results(results(op, tensors, options), results(op, tensors, options), 0)


# ---- as an op of PyTorch


@pytest.mark.parametrize("residual", RESIDUALS, ids=str)
def test_opcheck(residual):
    torch.library.opcheck(torch.ops.vapt_fast.prompt_pool, op_case(2, 1, 4, 6, 3, **residual))


@pytest.mark.parametrize("wanted", list(itertools.product((None, torch.float64), repeat=2)), ids=str)
def test_opcheck_of_the_backward(wanted):
    arguments = op_case(2, 1, 4, 6, 3)
    with torch.no_grad():
        total, normed, pooled, raw, mean, rstd = torch.ops.vapt_fast.prompt_pool(*arguments)
    _, _, layer_scale, norm_weight, _, matrix, weight, bias, *numbers = (
        value.detach() if torch.is_tensor(value) else value for value in arguments
    )
    given = (
        total,
        normed,
        pooled,
        total,
        layer_scale,
        norm_weight,
        matrix,
        weight,
        mean,
        rstd,
        *numbers,
        *wanted,
    )
    torch.library.opcheck(torch.ops.vapt_fast.prompt_pool_backward_tokens, given)
    given = (pooled, total, matrix, weight, bias, raw, mean, rstd, *numbers)
    torch.library.opcheck(torch.ops.vapt_fast.prompt_pool_backward_learned, given)


def test_statistics_are_not_differentiable():
    outputs = torch.ops.vapt_fast.prompt_pool(*op_case(2, 1, 4, 6, 3))
    assert [output.requires_grad for output in outputs] == [True, True, True, False, False, False]


def test_a_second_derivative_raises():
    op, _, tensors, options = case(2, 1, 4, 6, 3)
    x, *rest = (t.requires_grad_() for t in tensors)
    (grad,) = torch.autograd.grad(op(x, *rest, **options)[-1].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="prompt_pool can't be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("position", range(5))
def test_a_forward_derivative_raises(position):
    op, _, tensors, options = case(2, 1, 4, 6, 3)

    def function(tensor):
        return op(*tensors[:position], tensor, *tensors[position + 1 :], **options)

    tangent = torch.ones_like(tensors[position])
    with pytest.raises(NotImplementedError, match="prompt_pool has no forward-mode derivative"):
        torch.func.jvp(function, (tensors[position],), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="prompt_pool"):
        function(forward_ad.make_dual(tensors[position], tangent))


def test_compiles_into_one_graph_for_any_batch():
    op, _, _, options = case(1, 1, 4, 6, 3)
    compiled = torch.compile(
        lambda *a: op(*a, **options, backend="triton"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (2, 3, 5):
        tensors = case(batch, 1, 4, 6, 3)[2]
        assert_same_results(results(lambda *a: compiled(*a), tensors, {}), results(op, tensors, options), 0)


# ---- what it refuses


def test_other_dtypes_are_refused():
    op, _, (x, matrix, *affine), options = case(1, 1, 4, 6, 3, branch=False)
    with pytest.raises(
        BackendUnavailableError, match=r"prompt_pool can't run.*matrix must be float32 or float64"
    ):
        op(x, matrix.half(), *affine, **options)
    with pytest.raises(
        BackendUnavailableError, match=r"x must be float16, bfloat16, float32 or float64, got"
    ):
        op(x.to(torch.float8_e4m3fn), matrix, *affine, **options)


@pytest.mark.parametrize("name", ["layer_scale", "norm_weight", "norm_bias"])
def test_what_belongs_to_the_backbone_and_learns_is_refused(name):
    op, _, tensors, options = case(1, 1, 4, 6, 3)
    options[name].requires_grad_()
    with pytest.raises(BackendUnavailableError, match=f"no gradient of {name}, which must not require one"):
        op(*tensors, **options)
    with torch.no_grad():
        assert_same_results([op(*tensors, **options)], [op(*tensors, **options, backend="torch")], 1e-10)


def test_the_affine_may_be_of_another_dtype():
    op, _, tensors, options = case(2, 1, 4, 6, 3)
    low = options | {name: options[name].half() for name in ("norm_weight", "norm_bias")}
    assert_same_results(results(op, tensors, low), on_torch(op, tensors, low), 1e-10)
