"""add_norm on Triton, in its interpreter, against the torch backend and the formula."""

import itertools

import pytest
import torch
from interpreter import bfloat16
from op_cases import add_norm_case, assert_policy, assert_same_results, far_from_zero, layouts, rand, results
from test_prompt_pool import RESIDUALS as KINDS
from test_prompt_pool import recorded_launches
from torch.autograd import forward_ad

from vapt_fast import BackendUnavailableError

# (B, T, C): widths of models, and around the sizes of blocks, which change with the width.
SHAPES = [
    *itertools.product((1, 3), (1, 2, 5), (1, 5, 64)),
    *((2, 3, c) for c in (63, 65, 192, 255, 256, 257, 384, 511, 513, 768, 1024, 1280)),
    *((1, 2, c) for c in (1408, 1535, 1536, 1537, 2047, 2048, 2049, 4096, 4097, 9000)),
    *((b, 1, 8) for b in (2, 4, 7, 64)),
    *((1, t, 8) for t in (3, 4, 16, 49, 197, 207, 257)),
    *((2, t, 6) for t in (7, 8, 9)),
    *((0, 5, 6), (2, 0, 6), (0, 0, 6)),
]


def case(batch, tokens, dim, **kind):
    torch.manual_seed(0)
    return add_norm_case(batch=batch, tokens=tokens, dim=dim, **kind)


def op_case(batch, tokens, dim, **kind):
    """The arguments of vapt_fast::add_norm; x and branch require gradients."""
    _, _, tensors, options = case(batch, tokens, dim, **kind)
    x, *branch = (t.requires_grad_() for t in tensors)
    frozen = (options[name] for name in ("layer_scale", "weight", "bias"))
    return x, branch[0] if branch else None, *frozen, options["eps"], x.dtype


def on_torch(op, tensors, options):
    return results(op, tensors, options | {"backend": "torch"})


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *((shape, KINDS[i % len(KINDS)]) for i, shape in enumerate(SHAPES)),
        *itertools.product(((2, 5, 6), (1, 3, 300), (1, 2, 1600)), KINDS),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_equals_the_torch_backend(shape, kind):
    op, _, tensors, options = case(*shape, **kind)
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradcheck(shape, kind):
    op, _, tensors, options = case(*shape, **kind)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *a: op(*a, **options), leaves, fast_mode=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind["branch"]], ids=str)
@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=str)
def test_only_one_gradient(kind, wanted):
    """The tokens of the first block need none, only what its branches add to them."""
    op, formula, tensors, options = case(2, 3, 6, **kind)
    grads = []
    for function in (op, formula):
        leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        total, normed = function(*leaves, **options)
        learned = [leaf for leaf in leaves if leaf.requires_grad]
        grads.append(torch.autograd.grad(total.square().sum() + normed.exp().sum(), learned))
    assert_same_results([grads[0]], [grads[1]], 1e-10)


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_is_used(used):
    op, formula, tensors, options = case(2, 3, 6)
    grads = []
    for function in (op, formula):
        leaves = [t.detach().requires_grad_() for t in tensors]
        grads.append(torch.autograd.grad(function(*leaves, **options)[used].exp().sum(), leaves))
    assert_same_results([grads[0]], [grads[1]], 1e-10)


# ---- precision


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_eager_pytorch(dtype, scale):
    def cases():
        for seed in range(20):
            torch.manual_seed(seed)
            op, formula, tensors, options = add_norm_case(dim=32, **KINDS[seed % 2 - 2])
            yield op, formula, [t * scale for t in tensors], options

    with bfloat16():
        assert_policy(add_norm_case, cases(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_with_several_blocks(dtype):
    def cases():
        for seed in range(3):
            torch.manual_seed(seed)
            yield add_norm_case(batch=1, tokens=9, dim=600)

    with bfloat16():
        assert_policy(add_norm_case, cases(), dtype)


def test_norm_far_from_zero_and_constant_rows():
    op, formula, tensors, options = far_from_zero(0, add_norm_case)
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-9)
    assert_policy(add_norm_case, (far_from_zero(seed, add_norm_case) for seed in range(20)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_sum_stays_wide_and_the_norm_is_rounded_once(dtype):
    op, _, tensors, options = case(2, 3, 300)
    x, branch = (t.float() for t in tensors)
    options = {k: v.float() if torch.is_tensor(v) else v for k, v in options.items()}
    wide = op(x, branch.to(dtype), **options, backend="torch")
    for backend in ("torch", "triton"):
        with bfloat16(), torch.autocast("cpu", dtype):
            total, normed = op(x, branch.to(dtype), **options, backend=backend)
        torch.testing.assert_close(total, wide[0], rtol=1e-6, atol=1e-6)
        # A value that float32 puts next to a tie may be rounded to either side of it.
        assert (normed != wide[1].to(dtype)).float().mean() < 0.01
        torch.testing.assert_close(normed, wide[1].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_normalised_is_the_sum_as_it_is_returned(backend):
    """Where float16 has steps of 2, in which branch alone would be much finer."""
    op, _, (_, branch), options = case(2, 3, 64, layer_scale=False, affine=False)
    total, normed = op(torch.full_like(branch, 2500).half(), branch.half(), **options, backend=backend)
    expected = torch.nn.functional.layer_norm(total.double(), (64,), eps=options["eps"])
    torch.testing.assert_close(normed.double(), expected, rtol=1e-3, atol=1e-3)


def test_dtypes_are_those_of_the_torch_backend():
    _, _, tensors, options = case(2, 3, 8)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for (x, branch), frozen, autocast in itertools.product(
        itertools.product(dtypes, dtypes), (torch.bfloat16, torch.float32), (False, True)
    ):
        op = add_norm_case()[0]
        arguments = [tensors[0].to(x), tensors[1].to(branch)]
        cast = {k: v.to(frozen) if torch.is_tensor(v) else v for k, v in options.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            actual, expected = results(op, arguments, cast), on_torch(op, arguments, cast)
        for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
            assert ours.dtype == theirs.dtype
        total, normed = actual[0]
        assert total.dtype == torch.promote_types(x, branch)
        narrows = autocast and total.dtype != torch.float64
        assert normed.dtype == (torch.bfloat16 if narrows else total.dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 1])
def test_nan_and_inf_stay_in_their_row_as_on_torch(value, position):
    op, _, tensors, options = case(2, 3, 300)
    tensors[position][0, 1, 0] = value
    actual, expected = results(op, tensors, options), on_torch(op, tensors, options)
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
        assert not torch.isfinite(ours[0, 1]).all()
        ours[0, 1] = 0
        assert torch.isfinite(ours).all()


# ---- layouts


@pytest.mark.parametrize("dim", [6, 300])
def test_layouts_make_no_difference(dim):
    op, _, tensors, options = case(2, 3, dim)
    expected = results(op, tensors, options)
    for position, tensor in enumerate(tensors):
        for name, same in layouts(tensor):
            actual = results(op, [*tensors[:position], same, *tensors[position + 1 :]], options)
            assert_same_results(actual, expected, 0, f"argument {position} {name}")
    for frozen in ("weight", "bias", "layer_scale"):
        for name, same in layouts(options[frozen]):
            actual = results(op, tensors, options | {frozen: same})
            assert_same_results(actual, expected, 0, f"{frozen} {name}")
        spread = torch.full((dim, 2), float("nan"), dtype=torch.float64)
        spread[:, 0] = options[frozen]
        assert_same_results(results(op, tensors, options | {frozen: spread[:, 0]}), expected, 0, frozen)


def test_layouts_of_incoming_gradients_make_no_difference():
    op, _, tensors, options = case(2, 3, 6)
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
    op, _, tensors, options = case(2, 3, 6)
    tensors = [t[:1, :1].expand(t.shape) for t in tensors]
    options = {k: v[:1].expand(v.shape) if torch.is_tensor(v) else v for k, v in options.items()}
    grads = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = op(*leaves, **options, backend=backend)
        grads.append(torch.autograd.grad(sum(output.sum() for output in outputs), leaves))
    assert_same_results([grads[0]], [grads[1]], 1e-10)


# ---- launches


def test_equal_gradients_are_one_tensor_and_unwanted_ones_are_not_written():
    for kind, same in (({"layer_scale": False}, True), ({"layer_scale": True}, False)):
        op, _, tensors, options = case(1, 2, 4, **kind)
        leaves = [t.requires_grad_() for t in tensors]
        outputs = op(*leaves, **options)
        of_x, of_branch = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
        assert (of_x.data_ptr() == of_branch.data_ptr()) is same
    x, *_ = arguments = op_case(1, 2, 4, layer_scale=True)
    total, _, mean, rstd = (t.detach() for t in torch.ops.vapt_fast.add_norm(*arguments))
    given = (total, total, total, None, None, mean, rstd)
    for wanted in itertools.product((None, torch.float64), repeat=2):
        outputs = torch.ops.vapt_fast.add_norm_backward(*given, *wanted)
        expected = [(0,) if dtype is None else tuple(x.shape) for dtype in wanted]
        assert [tuple(output.shape) for output in outputs] == expected


def test_what_is_launched():
    op, _, (x, branch), options = case(2, 5, 6)
    with recorded_launches() as launches:
        op(x, branch, **options)
    assert launches == [("forward", 5)]
    with recorded_launches() as launches:
        op(x, branch.requires_grad_(), **options)[1].sum().backward()
    assert launches == [("forward", 5), ("backward", 5)]


# ---- as an op of PyTorch


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(kind):
    torch.library.opcheck(torch.ops.vapt_fast.add_norm, op_case(2, 3, 6, **kind))


@pytest.mark.parametrize("wanted", list(itertools.product((None, torch.float64), repeat=2)), ids=str)
def test_opcheck_of_the_backward(wanted):
    _, _, layer_scale, weight, *_ = arguments = op_case(2, 3, 6)
    total, normed, mean, rstd = (t.detach() for t in torch.ops.vapt_fast.add_norm(*arguments))
    given = (total, normed, total, layer_scale, weight, mean, rstd, *wanted)
    torch.library.opcheck(torch.ops.vapt_fast.add_norm_backward, given)


def test_statistics_are_not_differentiable():
    outputs = torch.ops.vapt_fast.add_norm(*op_case(2, 3, 6))
    assert [output.requires_grad for output in outputs] == [True, True, False, False]


def test_a_second_derivative_raises():
    op, _, tensors, options = case(2, 3, 6)
    leaves = [t.requires_grad_() for t in tensors]
    for leaf in leaves:
        total, normed = op(*leaves, **options)
        (grad,) = torch.autograd.grad((total + normed).square().sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="add_norm can't be differentiated twice"):
            grad.sum().backward()


@pytest.mark.parametrize("name", ["x", "branch", "weight", "bias", "layer_scale"])
def test_a_forward_derivative_raises(name):
    op, _, (x, branch), options = case(2, 3, 6)
    arguments = {"x": x, "branch": branch} | options

    def function(tensor):
        values = arguments | {name: tensor}
        return op(values.pop("x"), values.pop("branch"), **values)

    tangent = torch.ones_like(arguments[name])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="add_norm has no forward-mode"):
        function(forward_ad.make_dual(arguments[name], tangent))


def test_compiles_into_one_graph_for_any_batch():
    op, _, _, options = case(1, 3, 6)
    compiled = torch.compile(
        lambda *a: op(*a, **options, backend="triton"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (2, 3, 5):
        tensors = case(batch, 3, 6)[2]
        assert_same_results(results(lambda *a: compiled(*a), tensors, {}), results(op, tensors, options), 0)


# ---- what it refuses


@pytest.mark.parametrize("name", ["weight", "bias", "layer_scale"])
def test_what_is_frozen_must_not_learn(name):
    op, _, tensors, options = case(1, 2, 6)
    options[name].requires_grad_()
    with pytest.raises(
        BackendUnavailableError,
        match=f"add_norm can't run .*no gradient of {name}, which must not require one",
    ):
        op(*tensors, **options)
    with torch.no_grad():
        assert_same_results([op(*tensors, **options)], [op(*tensors, **options, backend="torch")], 1e-10)


def test_other_dtypes_are_refused_with_every_reason():
    op, _, (x, branch), options = case(1, 2, 6)
    narrow = torch.float8_e4m3fn
    with pytest.raises(BackendUnavailableError, match=r"x must be float16.*; branch must be float16"):
        op(x.to(narrow), branch.to(narrow), **options)
