"""absorbed_attention on Triton, in its interpreter, against the torch backend and the formula."""

import itertools
import random
from unittest import mock

import pytest
import torch
from interpreter import bfloat16, recorded_launches
from op_cases import assert_policy, assert_same_results, cls_case, layouts, rand, results
from torch.autograd import forward_ad

from vapt_fast import BackendUnavailableError

TENSORS = ("q", "x", "prompts", "key_weight", "value_weight")
SMALL = {"batch": 2, "rows": 2, "tokens": 7, "heads": 3, "dim": 2, "channels": 6, "prompts": 3}


def case(**sizes):
    torch.manual_seed(0)
    return cls_case(**sizes)


def on_torch(op, tensors, options):
    return results(op, tensors, options | {"backend": "torch"})


def random_sizes(count):
    """Sizes around those of the blocks, each value of each size several times."""
    choose = random.Random(0)
    for _ in range(count):
        yield {
            "batch": choose.choice([1, 2, 3, 5]),
            "rows": choose.choice([1, 1, 2, 5, 11]),
            "tokens": choose.choice([1, 7, 16, 31, 32, 33, 50]),
            "heads": choose.choice([1, 2, 3, 12]),
            "dim": choose.choice([1, 3, 8]),
            "channels": choose.choice([1, 6, 15, 16, 17, 31, 32, 33, 48]),
            "prompts": choose.choice([0, 1, 5, 10, 16, 17, 32, 33]),
            "shared": choose.choice([False, True]),
            "bias": choose.choice([False, True]),
        }


CASES = [
    *random_sizes(56),
    *({**SMALL, "batch": 1, "channels": channels} for channels in (192, 384, 768, 1024, 1280)),
    *({**SMALL, "batch": 1, "tokens": tokens} for tokens in (197, 257)),
    *({**SMALL, "prompts": prompts, "shared": shared} for prompts in (50, 100) for shared in (False, True)),
    {**SMALL, "batch": 1, "rows": 11, "heads": 16},
    *({**SMALL, "batch": 9, "shared": True, "prompts": prompts} for prompts in (0, 3)),
]


@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_equals_the_torch_backend(sizes):
    op, _, tensors, options = case(**sizes)
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("prompts", "batch", "shared"), [(0, 1, False), (2, 2, False), (2, 2, True)])
def test_gradcheck(prompts, batch, shared, rows, bias):
    op, _, tensors, options = case(**SMALL | {"batch": batch, "prompts": prompts}, shared=shared, bias=bias)
    leaves = [t.requires_grad_() for t in tensors]
    if bias:
        leaves.append(options.pop("bias").requires_grad_())

    def function(*leaves):
        extra = {"bias": leaves[5]} if bias else {}
        return op(*leaves[:5], **options | extra)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 3, 2, 7), (1, 1, 2, 7), (3, 2, 7), (2, 7)], ids=str)
def test_gradient_of_the_bias(shape):
    op, _, tensors, _ = case(**SMALL)
    bias = rand(*shape)
    actual, expected = (
        results(lambda *a, b=backend: op(*a[:5], bias=a[5], scale=0.7, backend=b), [*tensors, bias], {})
        for backend in ("triton", "torch")
    )
    assert_same_results(actual, expected, 1e-10)


# ---- precision


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_eager_pytorch(dtype, scale):
    def cases():
        for seed in range(20):
            torch.manual_seed(seed)
            op, formula, (q, x, prompts, *weights), options = cls_case(dim=8, heads=4, channels=33)
            # Larger weights would leave each query one key, and gradients that are 0.
            tensors = [q, x * scale, prompts * scale, *(weight / 6 for weight in weights)]
            yield op, formula, tensors, options

    with bfloat16():
        assert_policy(cls_case, cases(), dtype)


def test_dtypes_are_those_of_the_torch_backend():
    op, _, tensors, options = case(**SMALL, shared=True)
    dtypes = (torch.float16, torch.float32, torch.float64)
    for own, tokens, learned in itertools.product(dtypes, dtypes, dtypes):
        q, x, prompts, *weights = tensors
        arguments = [q.to(own), x.to(tokens), prompts.to(learned), *(w.to(own) for w in weights)]
        actual, expected = results(op, arguments, options), on_torch(op, arguments, options)
        for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_autocast_makes_no_difference():
    op, _, tensors, options = case(**SMALL)
    tensors = [tensors[0].half(), *(t.float() for t in tensors[1:])]
    leaves = [t.requires_grad_() for t in tensors]
    expected = op(*leaves, **options)
    with torch.autocast("cpu", torch.bfloat16):
        actual = op(*leaves, **options)
    grads = [torch.autograd.grad(out.sum(), leaves) for out in (actual, expected)]
    assert_same_results([[actual], grads[0]], [[expected], grads[1]], 0)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 100.0), (torch.float64, 800.0), (torch.float32, 3e4)]
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_scores_stay_finite(dtype, size, sign):
    op, _, tensors, options = case(**SMALL)
    tensors = [t.to(dtype) for t in tensors]
    tensors[0] = sign * tensors[0].abs() * size
    tensors[1:4] = [t.abs() + 1 for t in tensors[1:4]]
    outputs, grads = results(op, tensors, options)
    assert all(torch.isfinite(t).all() for t in (*outputs, *grads))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_nan_and_inf_propagate_as_on_torch(position, value):
    op, _, tensors, options = case(**SMALL)
    tensors[position].view(2, -1)[0, 0] = value
    with torch.no_grad():
        actual = op(*tensors, **options)
        expected = op(*tensors, **options, backend="torch")
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
    assert not torch.isfinite(actual[0]).all()
    assert torch.isfinite(actual[1]).all()


@pytest.mark.parametrize("prompts", [0, 2])
def test_a_bias_may_hide_keys(prompts):
    """-inf for some keys, for a whole block of keys, and for all tokens where there are prompts."""
    op, _, tensors, options = case(**SMALL | {"tokens": 40, "prompts": prompts}, bias=True)
    options["bias"][..., 0, 3] = options["bias"][..., 1, :33] = float("-inf")
    if prompts:
        options["bias"][:, 1] = float("-inf")
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


# ---- layouts


@pytest.mark.parametrize("position", range(len(TENSORS)), ids=TENSORS)
def test_layouts_make_no_difference(position):
    op, _, tensors, options = case(**SMALL, bias=True)
    expected = results(op, tensors, options)
    # PyTorch's own products of q and the weights may sum in another order.
    tolerance = 0 if position in (1, 2) else 1e-13
    for name, same in layouts(tensors[position]):
        actual = results(op, [*tensors[:position], same, *tensors[position + 1 :]], options)
        assert_same_results(actual, expected, tolerance, name)


def test_layouts_of_the_incoming_gradient_make_no_difference():
    op = torch.ops.vapt_fast.absorbed_attention
    queries, x, prompts = (rand(*shape).requires_grad_() for shape in ((2, 6, 5), (2, 7, 5), (2, 3, 5)))

    def grads(incoming):
        y, _ = op(queries, x, prompts, None)
        return torch.autograd.grad(y, [queries, x, prompts], incoming)

    incoming = rand(2, 6, 5)
    expected = grads(incoming)
    for name, same in layouts(incoming):
        assert_same_results([grads(same)], [expected], 0, name)
    ones = torch.ones((), dtype=torch.float64)
    assert_same_results([grads(ones.expand(2, 6, 5))], [grads(ones.expand(2, 6, 5).contiguous())], 0)


def test_expanded_tensors():
    """A stride of 0: in the incoming gradient, as sum() makes it, and in every argument."""
    op, _, tensors, options = case(**SMALL)
    tensors = [t[:1].expand(t.shape) for t in tensors]
    grads = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        grads.append(torch.autograd.grad(op(*leaves, **options, backend=backend).sum(), leaves))
    assert_same_results([grads[0]], [grads[1]], 1e-10)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("position", [0, 1, 2], ids=["queries", "x", "prompts"])
def test_offsets_beyond_32_bits(position, dim):
    """Two neighbours in ``dim`` lie more than 2^31 elements apart, in memory that nobody touches."""
    op = torch.ops.vapt_fast.absorbed_attention
    tensors = [rand(2, 2, 2).float().requires_grad_() for _ in range(3)]
    strides = [1 if d == dim else 8**d for d in range(3)]
    strides[dim] = 2**31 + 64
    memory = torch.empty(2**31 + 1024)
    far = memory.as_strided((2, 2, 2), strides).copy_(tensors[position].detach()).requires_grad_()

    def run(*tensors):
        y, _ = op(*tensors, None)
        return y, *torch.autograd.grad(y, tensors, torch.ones_like(y))

    expected = run(*tensors)
    with mock.patch.object(torch.UntypedStorage, "copy_"):  # the interpreter's, of the whole memory on itself
        actual = run(*tensors[:position], far, *tensors[position + 1 :])
    assert_same_results([actual], [expected], 0)


# ---- nothing there


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("prompts", [0, 3])
def test_no_images(prompts, shared):
    op, _, tensors, options = case(**SMALL | {"batch": 0, "prompts": prompts}, shared=shared, bias=True)
    outputs, grads = results(op, tensors, options)
    assert outputs[0].shape == tensors[0].shape
    assert [t.shape for t in grads] == [t.shape for t in tensors]
    assert not any(grad.any() for grad in grads)


# ---- launches


def test_only_prompts_that_learn():
    """As with frozen tokens: nothing is computed for them."""
    op, formula, (q, x, prompts, *weights), options = case(**SMALL, shared=True)
    prompts.requires_grad_()
    with recorded_launches() as launches:
        actual = torch.autograd.grad(op(q, x, prompts, *weights, **options).square().sum(), prompts)
    names = [name for name, _ in launches]
    assert names == ["scores", "weighted_sums", "scores", "grad_rows", "add_chunks"]
    expected = torch.autograd.grad(formula(q, x, prompts, *weights, **options).square().sum(), prompts)
    assert_same_results([actual], [expected], 1e-10)


def test_results_repeat_bit_by_bit_and_image_by_image():
    queries, x, prompts = (rand(9, n, 5) for n in (6, 7, 3))
    op = torch.ops.vapt_fast.absorbed_attention
    run = lambda *tensors: op(*tensors, None)[0]  # noqa: E731 (results() wants a function of tensors)
    outputs, grads = results(run, [queries, x, prompts], {})
    assert_same_results(results(run, [queries, x, prompts], {}), [outputs, grads], 0)
    assert torch.equal(run(queries[4:5], x[4:5], prompts[4:5]), outputs[0][4:5])


# ---- as an op of PyTorch


def op_arguments(shared=False):
    torch.manual_seed(0)
    return [rand(2, 6, 5), rand(2, 7, 5), rand(1 if shared else 2, 3, 5), rand(1, 6, 7)]


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared):
    arguments = [t.requires_grad_() for t in op_arguments(shared)]
    torch.library.opcheck(torch.ops.vapt_fast.absorbed_attention, arguments)
    torch.library.opcheck(torch.ops.vapt_fast.absorbed_attention, [*arguments[:3], None])


def test_opcheck_of_the_backward():
    ops = torch.ops.vapt_fast
    queries, x, prompts, bias = op_arguments(shared=True)
    y, p = ops.absorbed_attention(queries, x, prompts, bias)
    torch.library.opcheck(ops.absorbed_attention_grad_scores, (y, x, prompts, p))
    grad_scores = ops.absorbed_attention_grad_scores(y, x, prompts, p)
    torch.library.opcheck(ops.absorbed_attention_grad_queries, (grad_scores, x, prompts))
    for rows, first_key in ((x, 3), (prompts, 0)):
        torch.library.opcheck(ops.absorbed_attention_grad_rows, (rows, first_key, grad_scores, p, queries, y))


def test_p_is_not_differentiable():
    outputs = torch.ops.vapt_fast.absorbed_attention(*(t.requires_grad_() for t in op_arguments()))
    assert [output.requires_grad for output in outputs] == [True, False]


def test_a_second_derivative_raises():
    op, _, tensors, options = case(**SMALL)
    q, *rest = (t.requires_grad_() for t in tensors)
    (grad,) = torch.autograd.grad(op(q, *rest, **options).square().sum(), rest[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="absorbed_attention can't be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("position", range(len(TENSORS)), ids=TENSORS)
def test_a_forward_derivative_raises(position):
    op, _, tensors, options = case(**SMALL)

    def function(tensor):
        return op(*tensors[:position], tensor, *tensors[position + 1 :], **options)

    tangent = torch.ones_like(tensors[position])
    with pytest.raises(NotImplementedError, match="absorbed_attention has no forward-mode derivative"):
        torch.func.jvp(function, (tensors[position],), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="absorbed_attention"):
        function(forward_ad.make_dual(tensors[position], tangent))


def test_compiles_into_one_graph_for_any_batch():
    op, _, _, options = case(**SMALL)
    compiled = torch.compile(
        lambda *a: op(*a, **options, backend="triton"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (2, 3, 5):
        tensors = case(**SMALL | {"batch": batch})[2]
        actual = results(lambda *a: compiled(*a), tensors, {})
        assert_same_results(actual, results(op, tensors, options), 1e-13)


# ---- what it refuses


def test_other_dtypes_are_refused():
    op, _, (q, x, *rest), options = case(**SMALL)
    with pytest.raises(
        BackendUnavailableError, match=r"absorbed_attention can't run.*x must be float16, .* got torch.fl"
    ):
        op(q, x.to(torch.float8_e5m2), *rest, **options)
