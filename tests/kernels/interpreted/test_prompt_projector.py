"""prompt_projector on Triton, in its interpreter, against the torch backend and the formula."""

import itertools
import random
from functools import partial
from unittest import mock

import pytest
import torch
from interpreter import bfloat16, recorded_launches
from op_cases import NORMS, assert_policy, assert_same_results, layouts, projector_case, rand, results
from torch.autograd import forward_ad

from vapt_fast import BackendUnavailableError
from vapt_fast.activations import ACTIVATIONS

EVERYTHING = {"masked": True, "eps": 1e-6, "learned_scale": True}
SMALL = {"batch": 2, "prompts": 3, "dim": 6, "width": 4, **EVERYTHING}


def case(**sizes):
    torch.manual_seed(0)
    return projector_case(**sizes)


def on_torch(op, tensors, options):
    return results(op, tensors, options | {"backend": "torch"})


def random_sizes(count):
    """Sizes around those of the blocks, each value of each size several times."""
    choose = random.Random(0)
    for _ in range(count):
        width = choose.choice([None, 1, 3, 8, 8, 15, 16, 17, 64])
        yield {
            "batch": choose.choice([1, 2, 3, 5, 9]),
            "prompts": choose.choice([1, 5, 10, 15, 16, 17]),
            "dim": choose.choice([1, 7, 15, 16, 17, 31, 32, 33, 48, 65]),
            "width": width,
            "activation": choose.choice(list(ACTIVATIONS)),
            "masked": choose.choice([False, True]),
            "eps": choose.choice([None, 1e-6]),
            "affine": choose.choice([False, True]),
            "learned_scale": choose.choice([False, True]),
        }


CASES = [
    *random_sizes(48),
    *(
        {**SMALL, "activation": name, "eps": eps, "affine": affine}
        for name in ACTIVATIONS
        for eps, affine in NORMS
    ),
    *({**SMALL, "batch": 1, "dim": dim, "width": 8} for dim in (192, 384, 768, 1024, 1280)),
    *({**SMALL, "batch": 1, "prompts": prompts, "width": 8} for prompts in (50, 100)),
    *({**SMALL, "batch": batch, "prompts": prompts} for batch, prompts in ((0, 3), (2, 0), (0, 0))),
]


@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_equals_the_torch_backend(sizes):
    op, _, tensors, options = case(**sizes)
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


@pytest.mark.parametrize(("eps", "affine"), [(None, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "sigmoid", "softmax", "identity"])
def test_gradcheck(activation, masked, eps, affine):
    sizes = {"activation": activation, "masked": masked, "eps": eps, "affine": affine}
    op, _, tensors, options = case(**SMALL | sizes)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *a: op(*a, **options), leaves, fast_mode=True)


def test_scale_may_be_a_number():
    op, _, (*tensors, scale), options = case(**SMALL)
    learned = results(op, [*tensors, scale.fill_(0.3)], options)
    op = partial(case(**SMALL | {"learned_scale": False})[0], scale=0.3)
    actual = results(op, tensors, options)
    assert_same_results(actual, on_torch(op, tensors, options), 1e-10)
    assert_same_results(actual, (learned[0], learned[1][:-1]), 1e-12)


# ---- the first prompts, which are exactly 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_prompts_of_zero(dtype):
    """As at initialisation: their variance is 0, so that the norm multiplies gradients by 1000."""
    sizes = {"dim": 32, "activation": "gelu", "affine": False}
    op, formula, (pooled, bias, *weights), options = case(**SMALL | sizes)
    tensors = [torch.zeros_like(pooled), torch.zeros_like(bias), *weights]
    expected = results(formula, tensors, options)
    assert expected[1][0].abs().max() > 100
    if dtype == torch.float64:
        actual = results(op, tensors, options)
        assert_same_results(actual, expected, 1e-9)
    else:
        options = {
            name: value.float() if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        actual = results(partial(op, dtype=dtype), [t.float() for t in tensors], options)
    assert actual[0][0].dtype == dtype
    assert not actual[0][0].any()
    size = expected[1][0].abs().max().item()
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        # What comes in is rounded to float16 as well.
        torch.testing.assert_close(
            ours.double(), theirs, rtol=0, atol=size * (1e-3 if dtype.itemsize == 2 else 1e-6)
        )


# ---- precision


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_eager_pytorch(dtype, scale, eps):
    def cases():
        for seed in range(20):
            torch.manual_seed(seed)
            op, formula, (pooled, bias, *weights), options = projector_case(dim=33, width=8, eps=eps)
            tensors = [pooled * scale, bias * scale, *(weight / 6 for weight in weights)]
            # The formula, in eager PyTorch and in float64, takes its dtype from the tensors.
            yield partial(op, dtype=dtype), formula, tensors, options

    with bfloat16():
        assert_policy(projector_case, cases(), dtype)


def test_norm_far_from_zero_and_constant_rows():
    op, formula, (pooled, bias, *rest), options = case(**SMALL | {"dim": 64, "masked": False})
    tensors = [pooled, bias + 1e4, *(t * 0.1 for t in rest)]
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-9)
    op, formula, tensors, options = case(**SMALL | {"dim": 64, "masked": False, "width": None})
    tensors[0][0, 1] = 7.0
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-9)


def test_autocast_makes_no_difference():
    op, _, tensors, options = case(**SMALL)
    tensors = [t.float() for t in tensors]
    expected = results(op, tensors, options)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_results(results(op, tensors, options), expected, 0)


def test_dtypes_are_those_of_the_torch_backend():
    op, _, tensors, options = case(**SMALL)
    for own, other, dtype in itertools.product(
        (torch.float32, torch.float64),
        (torch.float16, torch.float32, torch.float64),
        (None, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ):
        arguments = [tensors[0].to(own), *(t.to(other) for t in tensors[1:])]
        given = options | {"dtype": dtype}
        with bfloat16():
            actual = results(op, arguments, given)
        expected = on_torch(op, arguments, given)
        for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", ["relu", "gelu", "softmax"])
def test_nan_and_inf_propagate_as_on_torch(activation, value):
    op, _, tensors, options = case(**SMALL | {"activation": activation})
    tensors[0][0, 1, 2] = value
    options["channel_mask"][0, 0, 2] = 2
    with torch.no_grad():
        actual = op(*tensors, **options)
        expected = op(*tensors, **options, backend="torch")
    assert not torch.isfinite(actual[0, 1]).any()
    assert torch.isfinite(actual[1]).all()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


# ---- layouts


def test_layouts_make_no_difference():
    op, _, tensors, options = case(**SMALL)
    expected = results(op, tensors, options)
    for position, tensor in enumerate(tensors):
        for name, same in layouts(tensor):
            actual = results(op, [*tensors[:position], same, *tensors[position + 1 :]], options)
            assert_same_results(actual, expected, 0, f"argument {position} {name}")
    for option in ("channel_mask", "feature_mask", "norm_weight", "norm_bias"):
        for name, same in layouts(options[option]):
            actual = results(op, tensors, options | {option: same})
            assert_same_results(actual, expected, 0, f"{option} {name}")


def test_layouts_of_the_incoming_gradient_make_no_difference():
    op, _, tensors, options = case(**SMALL)
    leaves = [t.requires_grad_() for t in tensors]

    def grads(incoming):
        return torch.autograd.grad(op(*leaves, **options), leaves, incoming)

    incoming = rand(2, 3, 6)
    expected = grads(incoming)
    for name, same in layouts(incoming):
        assert_same_results([grads(same)], [expected], 0, name)


def test_expanded_tensors():
    """A stride of 0: in the incoming gradient, as sum() makes it, and in every argument."""
    op, _, tensors, options = case(**SMALL | {"eps": None})
    tensors = [t[:1].expand(t.shape) for t in tensors]
    grads = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        grads.append(torch.autograd.grad(op(*leaves, **options, backend=backend).sum(), leaves))
    assert_same_results([grads[0]], [grads[1]], 1e-10)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("which", ["pooled", "gradient"])
def test_offsets_beyond_32_bits(which, dim):
    """Two neighbours in ``dim`` lie more than 2^31 elements apart, in memory that nobody touches."""
    op, _, tensors, options = case(**SMALL | {"prompts": 2, "dim": 2, "width": 1, "masked": False})
    pooled, *rest = (t.float() for t in tensors)
    strides = [1 if d == dim else 8**d for d in range(3)]
    strides[dim] = 2**31 + 64
    far = torch.empty(2**31 + 1024).as_strided(pooled.shape, strides).copy_(pooled)

    def run(pooled, incoming):
        leaves = [t.detach().requires_grad_() for t in (pooled, *rest)]
        return torch.autograd.grad(op(*leaves, **options), leaves, incoming)

    expected = run(pooled, pooled)
    with mock.patch.object(torch.UntypedStorage, "copy_"):  # the interpreter's, of the whole memory on itself
        actual = run(far, pooled) if which == "pooled" else run(pooled, far)
    assert_same_results([actual], [expected], 0)


# ---- launches


def test_nothing_is_launched_for_what_needs_no_gradient():
    op, formula, (pooled, bias, *frozen), options = case(**SMALL)
    leaves = [pooled.requires_grad_(), bias.requires_grad_()]
    with recorded_launches() as launches:
        actual = torch.autograd.grad(op(*leaves, *frozen, **options).square().sum(), leaves)
    assert [name for name, _ in launches] == ["project", "project_backward"]
    expected = torch.autograd.grad(formula(*leaves, *frozen, **options).square().sum(), leaves)
    assert_same_results([actual], [expected], 1e-9)


def test_results_repeat_bit_by_bit_and_image_by_image():
    op, _, tensors, options = case(**SMALL | {"batch": 9})
    outputs, grads = results(op, tensors, options)
    assert_same_results(results(op, tensors, options), [outputs, grads], 0)
    masks = {name: options[name][4:5] for name in ("channel_mask", "feature_mask")}
    with torch.no_grad():
        one = op(tensors[0][4:5], *tensors[1:], **options | masks)
    assert torch.equal(one, outputs[0][4:5])


# ---- as an op of PyTorch


def op_arguments(options, tensors):
    """Of the custom op, from those of a case with everything."""
    others = [options[name] for name in ("channel_mask", "feature_mask", "norm_weight", "norm_bias")]
    return [*tensors, *others, 1.0, options["activation"], options["eps"], torch.float32]


def test_opcheck():
    _, _, tensors, options = case(**SMALL)
    arguments = op_arguments(options, [t.requires_grad_() for t in tensors])
    torch.library.opcheck(torch.ops.vapt_fast.prompt_projector, arguments)
    pooled, bias, *_ = tensors
    arguments = [pooled, bias, *[None] * 7, 1.0, "relu", None, torch.float64]
    torch.library.opcheck(torch.ops.vapt_fast.prompt_projector, arguments)


def test_opcheck_of_the_backward():
    _, _, tensors, options = case(**SMALL)
    ops = torch.ops.vapt_fast
    arguments = op_arguments(options, tensors)
    prompts, hidden, statistics = ops.prompt_projector(*arguments)
    given = (prompts, *arguments[:8], hidden, statistics, 1.0, "relu")
    torch.library.opcheck(ops.prompt_projector_backward, given)
    _, grad_hidden, means, _, _ = ops.prompt_projector_backward(*given)
    pooled, bias, _, *rest = arguments[:8]
    given = (prompts, pooled, bias, *rest, hidden, grad_hidden, statistics, means, 1.0, "relu")
    torch.library.opcheck(ops.prompt_projector_backward_weights, given)


def test_statistics_are_not_differentiable():
    _, _, tensors, options = case(**SMALL)
    arguments = op_arguments(options, [t.requires_grad_() for t in tensors])
    outputs = torch.ops.vapt_fast.prompt_projector(*arguments)
    assert [output.requires_grad for output in outputs] == [True, False, False]


def test_a_second_derivative_raises():
    op, _, tensors, options = case(**SMALL)
    pooled, *rest = (t.requires_grad_() for t in tensors)
    (grad,) = torch.autograd.grad(op(pooled, *rest, **options).square().sum(), pooled, create_graph=True)
    with pytest.raises(NotImplementedError, match="prompt_projector can't be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("position", range(5))
def test_a_forward_derivative_raises(position):
    op, _, tensors, options = case(**SMALL)

    def function(tensor):
        return op(*tensors[:position], tensor, *tensors[position + 1 :], **options)

    tangent = torch.ones_like(tensors[position])
    with pytest.raises(NotImplementedError, match="prompt_projector has no forward-mode derivative"):
        torch.func.jvp(function, (tensors[position],), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="prompt_projector"):
        function(forward_ad.make_dual(tensors[position], tangent))


def test_compiles_into_one_graph_for_any_batch():
    op, _, _, options = case(**SMALL | {"masked": False})
    compiled = torch.compile(
        lambda *a: op(*a, **options, backend="triton"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (2, 3, 5):
        tensors = case(**SMALL | {"batch": batch, "masked": False})[2]
        assert_same_results(results(lambda *a: compiled(*a), tensors, {}), results(op, tensors, options), 0)


# ---- what it refuses


def test_what_the_kernels_have_no_part_for_is_refused():
    op, _, (pooled, *rest), options = case(**SMALL)
    with pytest.raises(
        BackendUnavailableError, match=r"prompt_projector can't run.*pooled must be float32 or fl"
    ):
        op(pooled.half(), *rest, **options)
    with pytest.raises(BackendUnavailableError, match=r"dtype must be float16, .*, got torch.float8_e5m2"):
        op(pooled, *rest, **options, dtype=torch.float8_e5m2)
    for name in ("channel_mask", "feature_mask", "norm_weight", "norm_bias"):
        learned = options | {name: options[name].clone().requires_grad_()}
        with pytest.raises(BackendUnavailableError, match=f"no gradient of {name}"):
            op(pooled, *rest, **learned)
        with torch.no_grad():
            actual, expected = (op(pooled, *rest, **learned, backend=name) for name in ("triton", "torch"))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    _, _, tensors, options = case(**SMALL | {"width": 65})
    with pytest.raises(BackendUnavailableError, match=r"down must have at most 64 rows, got 65"):
        op(*tensors, **options)
