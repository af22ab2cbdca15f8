"""The ops against their formulas in eager PyTorch: values, gradients, layouts, extremes, low precision."""

import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    BY_IMAGE,
    CASES,
    GRADCHECK,
    add_norm_case,
    assert_policy,
    assert_same_results,
    attention_case,
    cls_case,
    far_from_zero,
    image_by_image,
    layouts,
    mlp_case,
    packed_case,
    pool_case,
    projector_case,
    rand,
    results,
)

from vapt_fast import functional

for_every_op = pytest.mark.parametrize(
    "make",
    [add_norm_case, pool_case, projector_case, attention_case, packed_case, cls_case, mlp_case],
    ids=lambda make: make.__name__,
)


def name_of(value):
    """An id of a maker of cases or of its arguments."""
    return value.__name__ if callable(value) else " ".join(f"{k}={v}" for k, v in value.items())


@pytest.mark.parametrize(("make", "sizes"), CASES, ids=name_of)
def test_equals_the_formula(make, sizes):
    torch.manual_seed(0)
    op, formula, tensors, options = make(**sizes)
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-10)


@pytest.mark.parametrize(("make", "sizes"), BY_IMAGE, ids=name_of)
def test_arguments_for_each_image_equal_single_calls(make, sizes):
    op, calls, tensors, options = image_by_image(make, **sizes)
    assert_same_results(results(op, tensors, options), results(calls, tensors, options), 1e-9)


@pytest.mark.parametrize(("make", "sizes"), GRADCHECK, ids=name_of)
def test_gradcheck(make, sizes):
    torch.manual_seed(0)
    op, _, tensors, options = make(**sizes)
    if make is pool_case:
        options |= {"eps": 0.05, "prompt_eps": 0.5}  # far apart, so that an error in s would show
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *a: op(*a, **options), leaves)


# ---- layouts


@for_every_op
def test_layouts_make_no_difference(make):
    torch.manual_seed(0)
    op, _, tensors, options = make()
    expected = results(op, tensors, options)
    for position, tensor in enumerate(tensors):
        for name, same in layouts(tensor):
            actual = results(op, [*tensors[:position], same, *tensors[position + 1 :]], options)
            assert_same_results(actual, expected, 1e-13, f"argument {position} {name}")


@for_every_op
def test_expanded_incoming_gradients(make):
    """A stride of 0 in the incoming gradient, as sum() makes it."""
    torch.manual_seed(0)
    op, formula, tensors, options = make()
    grads = []
    for function in (op, formula):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = function(*leaves, **options)
        total = sum(o.sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
        grads.append(torch.autograd.grad(total, leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# ---- only some gradients, none, and none twice


def test_pool_when_only_the_prompts_learn():
    torch.manual_seed(0)
    op, formula, (x, *learned), options = pool_case(branch=False)
    grads = []
    for function in (op, formula):
        leaves = [t.detach().requires_grad_() for t in learned]
        grads.append(torch.autograd.grad(function(x, *leaves, **options)[-1].square().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2)], ids=str)
def test_pool_when_only_some_outputs_are_used(used, affine):
    torch.manual_seed(0)
    op, formula, tensors, options = pool_case(affine=affine, learned=True)
    for ours, theirs in zip(
        *(
            results(lambda *t, f=f: tuple(f(*t, **options)[i] for i in used), tensors, {})[1]
            for f in (op, formula)
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_second_derivative_of_a_handwritten_backward_raises():
    op, _, tensors, options = pool_case()
    x, *rest = [t.requires_grad_() for t in tensors]
    (grad,) = torch.autograd.grad(op(x, *rest, **options)[-1].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="prompt_pool can't be differentiated twice"):
        grad.sum().backward()

    def gradient(x):
        return torch.func.grad(lambda x: op(x, *rest, **options)[-1].square().sum())(x).sum()

    with pytest.raises(NotImplementedError, match="prompt_pool can't be differentiated twice"):
        torch.func.grad(gradient)(x)


# ---- what transforms and traces a function


POOLS = [
    {"branch": branch, "affine": affine, "learned": True}
    for branch in (False, True)
    for affine in (False, True)
]
ALL_BY_IMAGE = [
    (pool_case, {"learned": True, "matrix_by_image": True, "affine_by_image": True}),
    (
        projector_case,
        {"eps": 0.1, "learned": True, "learned_scale": True}
        | {"bias_by_image": True, "weights_by_image": True, "scale_by_image": True},
    ),
]


def cubes(function, options):
    """A number that depends on all outputs of ``function``."""

    def cubed(*tensors):
        outputs = function(*tensors, **options)
        return sum(o.pow(3).sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return cubed


@pytest.mark.parametrize(
    ("make", "sizes"), [*((pool_case, sizes) for sizes in POOLS), *ALL_BY_IMAGE], ids=name_of
)
def test_gradients_of_each_sample_and_of_each_set_of_parameters(make, sizes):
    torch.manual_seed(0)
    op, formula, tensors, options = make(batch=2, **sizes)
    everything = tuple(range(len(tensors)))
    all_but_one = [tuple(j != i for j in everything) for i in everything]
    only_one = [tuple(j == i for j in everything) for i in everything]
    for mapped in (*all_but_one, *only_one):
        arguments = [torch.stack([t, 2 * t, t + 1]) if m else t for t, m in zip(tensors, mapped, strict=True)]
        dims = tuple(0 if m else None for m in mapped)
        for wanted in (everything, (0,), (1, 2, 3)):
            grads = [
                torch.func.vmap(torch.func.grad(cubes(f, options), wanted), dims)(*arguments)
                for f in (op, formula)
            ]
            assert_same_results([grads[0]], [grads[1]], 1e-9)


@pytest.mark.parametrize("sizes", [*POOLS, ALL_BY_IMAGE[0][1]], ids=str)
def test_jacobians(sizes):
    torch.manual_seed(0)
    op, formula, tensors, options = pool_case(patches=3, dim=3, rows=2, **sizes)
    for output, argument in itertools.product((1, 2), range(len(tensors))):
        ours, theirs = (
            torch.func.jacrev(lambda *t, f=f, i=output: f(*t, **options)[i], argument)(*tensors)
            for f in (op, formula)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


class Module(torch.nn.Module):
    def __init__(self, op, options):
        super().__init__()
        self.op, self.options = op, options

    def forward(self, *tensors):
        return self.op(*tensors, **self.options)


def two_batches(make, **sizes):
    """A case, and its tensors with three times as many images; which tensors are of images."""
    torch.manual_seed(0)
    op, formula, tensors, options = make(batch=2, **sizes)
    of_images = [t.shape[0] == 2 for t in tensors]
    more = [torch.cat([t, t + 1, 2 * t]) if is_ else t for t, is_ in zip(tensors, of_images, strict=True)]
    return op, formula, tensors, options, more, of_images


TRACED = [
    *((pool_case, sizes) for sizes in POOLS),
    (projector_case, {"eps": 0.1, "learned": True}),
    *ALL_BY_IMAGE,
]


@pytest.mark.parametrize(("make", "sizes"), TRACED, ids=name_of)
def test_an_exported_program_has_the_right_gradients(make, sizes):
    op, formula, tensors, options, more, of_images = two_batches(make, **sizes)
    batch = torch.export.Dim("batch")
    shapes = {"tensors": tuple({0: batch} if is_ else None for is_ in of_images)}
    program = torch.export.export(Module(op, options), tuple(tensors), dynamic_shapes=shapes).module()
    assert_same_results(results(program, more, {}), results(formula, more, options), 1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("make", "sizes"), TRACED, ids=name_of)
def test_a_traced_function_has_the_right_gradients(make, sizes, grad, tmp_path):
    op, formula, tensors, options, more, _ = two_batches(make, **sizes)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(Module(op, options), tuple(t.requires_grad_(grad) for t in tensors))
    traced.save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    assert_same_results(results(traced, more, {}), results(formula, more, options), 1e-10)


SOME_TRACED = (TRACED[3], TRACED[4])  # each op once, with all that may learn


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize(
    ("make", "sizes"),
    [case if case in SOME_TRACED else pytest.param(*case, marks=pytest.mark.full) for case in TRACED],
    ids=name_of,
)
def test_a_compiled_function_has_the_right_gradients(make, sizes, dynamic):
    op, formula, tensors, options, more, _ = two_batches(make, **sizes)
    torch.compiler.reset()
    compiled = torch.compile(Module(op, options), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for given in (tensors, more):
        assert_same_results(results(compiled, given, {}), results(formula, given, options), 1e-10)
        with torch.no_grad():
            outputs = [f(*given) for f in (compiled, partial(formula, **options))]
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


# ---- extremes


@pytest.mark.parametrize("make", [add_norm_case, pool_case], ids=lambda f: f.__name__)
def test_norm_far_from_zero_and_constant_rows_in_float64(make):
    op, formula, tensors, options = far_from_zero(0, make)
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-9)


@pytest.mark.parametrize("make", [add_norm_case, pool_case], ids=lambda f: f.__name__)
def test_norm_far_from_zero_and_constant_rows_in_float32(make):
    assert_policy(make, (far_from_zero(seed, make) for seed in range(20)), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 100.0), (torch.float64, 800.0), (torch.float32, 3e4)]
)
def test_attention_with_extreme_scores_stays_finite(dtype, size):
    torch.manual_seed(0)
    for make in (attention_case, cls_case):
        op, _, tensors, options = make()
        tensors = [t.to(dtype) for t in tensors]
        tensors[0] = -tensors[0].abs() * size
        tensors[1] = tensors[1].abs()
        outputs, grads = results(op, tensors, options)
        assert all(torch.isfinite(t).all() for t in (*outputs, *grads))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_to_their_image_only(value):
    torch.manual_seed(0)
    for make, position in (
        (add_norm_case, 0),
        (pool_case, 0),
        (attention_case, 1),
        (packed_case, 0),
        (cls_case, 1),
        (mlp_case, 0),
        (projector_case, 0),
    ):
        op, _, tensors, options = make()
        tensors[position][0, 0, 0] = value
        outputs = op(*tensors, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert not all(torch.isfinite(o[0]).all() for o in outputs)
        assert all(torch.isfinite(o[1:]).all() for o in outputs)


# ---- low precision


@for_every_op
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_eager_pytorch(make, dtype, scale):
    sizes = {"dim": 8, "heads": 4, "channels": 32} if make is cls_case else {"dim": 32}

    def cases():
        for seed in range(20):
            torch.manual_seed(seed)
            op, formula, tensors, options = make(**sizes)
            yield op, formula, [t * scale for t in tensors], options

    assert_policy(make, cases(), dtype)


def add(x, y):
    return x + y


@pytest.mark.parametrize(
    ("op", "formula", "values", "passes"),
    [
        (add, lambda x, y: x - x + y - y, (1.0, 0.0), False),  # where the exact value is 0 too
        (lambda x, y: x * 0 + y * 0, lambda x, y: x - x + y - y, (1.0, 1.0), True),
        (lambda x, y: x * y * float("nan"), lambda x, y: x * y, (1.0, 1.0), False),
        # In float16 the product of the first two overflows; that in float32 is the yardstick.
        (lambda x, y: x * (y / 256), lambda x, y: x * y / 256, (512.0, 512.0), True),
        (lambda x, y: x * (y / 257), lambda x, y: x * y / 256, (512.0, 512.0), False),
    ],
)
def test_the_policy_can_fail(op, formula, values, passes):
    tensors = [torch.full((2,), value, dtype=torch.float64) for value in values]
    case = (op, formula, tensors, {})
    with nullcontext() if passes else pytest.raises(AssertionError):
        assert_policy(None, [case], torch.float16)


# ---- the pooling matrix


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (14, 14), (5, 2)], ids=str)
@pytest.mark.parametrize(("size", "padding"), [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_matrices_are_the_convolution_and_the_projection(grid, size, padding, depthwise):
    torch.manual_seed(0)
    out = [side + 2 * padding - size + 1 for side in grid]
    if min(out) < 1:
        return
    blocks, prompts, dim = 3, 2, 4
    weight = rand(blocks, prompts, out[0] * out[1])
    kernel = rand(blocks, dim, size, size) if depthwise else rand(blocks, size, size)
    z = rand(2, dim, *grid)
    matrices = functional.prompt_matrices(weight, kernel, grid, padding=padding, depthwise=depthwise)
    for block in range(blocks):
        k = kernel[block].unsqueeze(1) if depthwise else kernel[block].expand(dim, 1, -1, -1)
        expected = F.conv2d(z, k, padding=padding, groups=dim).flatten(2) @ weight[block].t()
        if depthwise:
            shifted = (z.flatten(2) @ matrices[block].t()).unflatten(-1, (size * size, prompts))
            actual = torch.einsum("bcsp,cs->bcp", shifted, kernel[block].flatten(1))
        else:
            actual = z.flatten(2) @ matrices[block].t()
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_matrices_without_convolution_are_the_projection():
    weight = rand(2, 3, 12)
    assert functional.prompt_matrices(weight, None, (3, 4)) is weight
