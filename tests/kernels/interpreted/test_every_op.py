"""What every op on Triton has in common, in the interpreter against the formula and the torch backend."""

import itertools
from functools import partial

import pytest
import torch
from interpreter import bfloat16
from kernel_cases import KERNELS, converted, laid_out, random_cases
from kernel_checks import check_far_offsets, check_precision, check_values, made
from op_cases import BY_IMAGE, assert_same_results, image_by_image, results
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from vapt_fast import BackendUnavailableError, functional

LAYOUTS = ("transposed", "padded rows", "offset by one")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
for_every_op = pytest.mark.parametrize("op", KERNELS)
# Their matrix products with weights are PyTorch's, whose order of summation depends on layout and batch.
PRODUCTS = ("mlp", "absorbed_attention")


def everything(op, **changes):
    """A small case of two images that has each argument."""
    sizes = KERNELS[op].quick[0] | {"bias": True} if "bias" in KERNELS[op].sizes else KERNELS[op].quick[0]
    return made(op, **sizes | changes)


def options_of(op):
    """Names of those options that are tensors."""
    return [name for name, value in everything(op)[3].items() if isinstance(value, torch.Tensor)]


FROZEN = [(op, name) for op in KERNELS for name in options_of(op)]
FROZEN.remove(("absorbed_attention", "bias"))  # which may learn


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def name_of(value):
    if callable(value):
        return value.__name__
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


# ---- values and gradients


def values_of(op, start, stop):
    """Sizes from the random ones of an op."""
    return [(op, sizes) for sizes in itertools.islice(random_cases(op, stop), start, stop)]


CHOSEN = [
    (op, sizes)
    for op in KERNELS
    for sizes in (*KERNELS[op].quick, *KERNELS[op].wide, KERNELS[op].quick[0] | {"batch": 0})
]
RANDOM = [
    pytest.param(*case, marks=marks)
    for start, stop, marks in ((0, 4, ()), (4, 40, pytest.mark.full), (40, 250, pytest.mark.nightly))
    for op in KERNELS
    for case in values_of(op, start, stop)
]


@pytest.mark.parametrize(("op", "sizes"), [*CHOSEN, *RANDOM], ids=name_of)
def test_equals_the_formula_and_touches_what_it_may(op, sizes):
    check_values(op, sizes)


@pytest.mark.parametrize(("make", "sizes"), BY_IMAGE, ids=name_of)
def test_arguments_for_each_image_equal_single_calls(make, sizes):
    op, calls, tensors, options = image_by_image(make, **sizes)
    assert_same_results(results(op, tensors, options), results(calls, tensors, options), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["prompt_pool", "prompt_projector"])
def test_arguments_for_each_image_equal_single_calls_bit_by_bit(op, dtype):
    """Where nothing is summed over the images, in the dtypes of a model in ``dtype``."""
    make, sizes = next(
        (make, sizes)
        for make, sizes in reversed(BY_IMAGE)
        if make is KERNELS[op].make and sizes["batch"] == 3 and all(sizes.values())
    )
    function, calls, *given = image_by_image(make, **sizes)
    _, tensors, options = converted(op, (function, None, *given), dtype)
    with bfloat16():
        assert_same_results(results(function, tensors, options), results(calls, tensors, options), 0)


@for_every_op
def test_gradients_of_some_inputs_and_some_outputs(op):
    function, formula, tensors, options = everything(op)
    num_outputs = len(as_tuple(formula(*tensors, **options)))
    subsets = [(i,) for i in range(len(tensors))]
    subsets += [tuple(j for j in range(len(tensors)) if j != i) for i in range(len(tensors))]
    for wanted, used in itertools.product(filter(None, subsets), range(num_outputs)):
        found = []
        for f in (function, formula):
            leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
            learned = [leaves[i] for i in wanted]
            total = as_tuple(f(*leaves, **options))[used].exp().sum()
            depends = total.requires_grad
            grads = torch.autograd.grad(total, learned, materialize_grads=True) if depends else None
            found.append(grads or [torch.zeros_like(leaf) for leaf in learned])
        assert_same_results([found[0]], [found[1]], 1e-10, f"{wanted} of {used}")


@for_every_op
def test_without_gradients_the_outputs_are_the_same(op):
    function, _, tensors, options = everything(op)
    expected, _ = results(function, tensors, options)
    tensors = [t.requires_grad_() for t in tensors]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_same_results([as_tuple(function(*tensors, **options))], [expected], 0)


@for_every_op
def test_checkpointing_gives_the_same_gradients(op):
    function, _, tensors, options = everything(op)
    recomputed = partial(checkpoint, partial(function, **options), use_reentrant=False)
    assert_same_results(results(recomputed, tensors, {}), results(function, tensors, options), 0)


@for_every_op
def test_results_repeat_bit_by_bit_and_image_by_image(op):
    sizes = {"batch": 9}
    function, _, tensors, options = everything(op, **sizes)
    outputs, grads = results(function, tensors, options)
    assert_same_results(results(function, tensors, options), [outputs, grads], 0)

    def image(value):
        is_one = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == sizes["batch"]
        return value[4:5] if is_one else value

    one = function(*map(image, tensors), **{name: image(value) for name, value in options.items()})
    tolerance = 1e-13 if op in PRODUCTS else 0
    assert_same_results([as_tuple(one)], [[output[4:5] for output in outputs]], tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@for_every_op
def test_nan_and_inf_propagate_as_on_torch(op, value):
    _, _, tensors, _ = everything(op)
    for position in range(len(tensors)):
        function, _, tensors, options = everything(op)
        tensors[position].view(-1)[0] = value
        with torch.no_grad():
            actual, expected = (
                as_tuple(function(*tensors, **options, backend=b)) for b in ("triton", "torch")
            )
        assert_same_results([actual], [expected], 1e-10, f"argument {position}")
        if tensors[position].ndim > 2 and tensors[position].shape[0] == 2:
            assert all(torch.isfinite(output[1]).all() for output in actual)


# ---- precision


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str
)
@pytest.mark.parametrize(("op", "scale"), [(op, scale) for op in KERNELS for scale in KERNELS[op].scales])
def test_error_is_at_most_that_of_eager_pytorch(op, scale, dtype):
    check_precision(op, dtype, scale)


def outcome(function, tensors, options):
    """Outputs and gradients, or the error."""
    try:
        return list(itertools.chain(*results(function, tensors, options)))
    except (TypeError, RuntimeError) as error:
        return error


@pytest.mark.parametrize(
    "autocast",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.full) for dtype in (None, torch.float16))],
    ids=str,
)
@for_every_op
def test_dtypes_are_those_of_the_torch_backend(op, autocast):
    """Of each argument in each dtype; what the kernels don't take is refused with the dtype."""
    function, _, tensors, options = everything(op)
    tensors = [t.float() for t in tensors]
    options = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    cases = [converted(op, (function, None, tensors, options), dtype)[1:] for dtype in DTYPES]
    for dtype in DTYPES:
        for i, tensor in enumerate(tensors):
            cases.append(([*tensors[:i], tensor.to(dtype), *tensors[i + 1 :]], options))
        for name in options_of(op):
            cases.append((tensors, options | {name: options[name].to(dtype)}))
    for i, case in enumerate(cases):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None), bfloat16():
            actual, expected = (outcome(partial(function, backend=b), *case) for b in ("triton", "torch"))
        if isinstance(actual, BackendUnavailableError):
            assert i >= len(DTYPES)
            assert "got torch." in str(actual)
        elif isinstance(expected, TypeError):
            assert str(actual) == str(expected)
        elif isinstance(expected, RuntimeError):
            assert "autocast::prioritize" in str(
                expected
            )  # PyTorch's cat takes no other 16 bits than autocast's
        else:
            for ours, theirs in zip(actual, expected, strict=True):
                assert ours.dtype == theirs.dtype
                size = max(1.0, theirs.abs().max().item())
                torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03 * size)


@pytest.mark.parametrize("op", [op for op in KERNELS if op not in PRODUCTS] + ["mlp"])
def test_a_backward_under_autocast_is_in_the_dtype_of_the_forward(op):
    function, _, tensors, options = everything(op)
    tensors = [t.float().requires_grad_() for t in tensors]
    options = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    outputs = as_tuple(function(*tensors, **options))
    incoming = [torch.ones_like(output) for output in outputs]
    expected = torch.autograd.grad(outputs, tensors, incoming, retain_graph=True)
    with torch.autocast("cpu", torch.float16):
        actual = torch.autograd.grad(outputs, tensors, incoming)
    assert_same_results([actual], [expected], 0)


# ---- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@for_every_op
def test_layouts_make_no_difference(op, layout):
    """Of each argument and each incoming gradient alone."""
    function, _, tensors, options = everything(op, tokens=7) if op == "mlp" else everything(op)
    tolerance = 1e-13 if op in PRODUCTS else 0
    expected = results(function, tensors, options)
    for i, tensor in enumerate(tensors):
        actual = results(function, [*tensors[:i], laid_out(tensor, layout), *tensors[i + 1 :]], options)
        assert_same_results(actual, expected, tolerance, f"argument {i}")
    for name in options_of(op):
        actual = results(function, tensors, options | {name: laid_out(options[name], layout)})
        assert_same_results(actual, expected, tolerance, name)
    for position in range(len(expected[0])):
        count = itertools.count()
        actual = results(
            function,
            tensors,
            options,
            lay_out=lambda grad, count=count, i=position: (
                laid_out(grad, layout) if next(count) == i else grad
            ),
        )
        assert_same_results(actual, expected, tolerance, f"gradient {position}")


@for_every_op
def test_expanded_tensors(op):
    """A stride of 0: in the incoming gradients, as sum() makes it, and in every argument."""
    function, formula, tensors, options = everything(op)

    def expand(value):
        is_one = isinstance(value, torch.Tensor) and value.ndim
        return value[(slice(1),) * value.ndim].expand(value.shape) if is_one else value

    tensors, options = list(map(expand, tensors)), {name: expand(value) for name, value in options.items()}
    # A norm of rows of equal numbers divides by next to nothing.
    options |= {name: 1.0 for name in ("eps", "prompt_eps") if options.get(name) is not None}
    actual, expected = (results(f, tensors, options, lay_out=expand) for f in (function, formula))
    assert_same_results(actual, expected, 1e-10)


@pytest.mark.parametrize("index", range(max(len(kernels.far) for kernels in KERNELS.values())))
@for_every_op
def test_offsets_beyond_32_bits(op, index):
    if index < len(KERNELS[op].far):
        check_far_offsets(op, *KERNELS[op].far[index])


# ---- as ops of PyTorch


@for_every_op
def test_a_second_derivative_raises(op):
    function, _, tensors, options = everything(op)
    for position in range(min(3, len(tensors))):
        leaf = tensors[position].requires_grad_()
        total = sum(output.square().sum() for output in as_tuple(function(*tensors, **options)))
        (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{op} can't be differentiated twice"):
            grad.sum().backward()
        leaf.requires_grad_(False)


@for_every_op
def test_a_forward_derivative_raises(op):
    function, _, tensors, options = everything(op)
    message = f"{op} has no forward-mode derivative"
    # The product with value_weight is PyTorch's, and has one.
    for i, tensor in enumerate(tensors[:4] if op == "absorbed_attention" else tensors):
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(
                lambda t, i=i: function(*tensors[:i], t, *tensors[i + 1 :], **options),
                (tensor,),
                (torch.ones_like(tensor),),
            )
    for name in options_of(op):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(options[name], torch.ones_like(options[name]))
            with pytest.raises(NotImplementedError, match=message):
                function(*tensors, **options | {name: dual})


@pytest.mark.full
@for_every_op
def test_compiles_once_for_every_batch(op):
    unmasked = {"masked": False} if "masked" in KERNELS[op].sizes else {}
    _, _, _, options = everything(op, **unmasked)
    torch.compiler.reset()
    function = partial(everything(op)[0], **options, backend="triton")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: function(*a), fullgraph=True, dynamic=True, backend=backend)
    counts = []
    for batch in (9, 10, 12):  # unlike any other size, which tracing would take for the same
        _, _, tensors, _ = everything(op, batch=batch, **unmasked)
        assert_same_results(results(compiled, tensors, {}), results(function, tensors, {}), 1e-13)
        counts.append(backend.frame_count)
    assert counts[1:] == counts[:1] * 2


# ---- what they refuse


@pytest.mark.parametrize(("op", "name"), FROZEN)
def test_what_is_frozen_must_not_learn(op, name):
    function, _, tensors, options = everything(op)
    options[name].requires_grad_()
    with pytest.raises(
        BackendUnavailableError, match=f"can't run .*no gradient of {name}, which must not require"
    ):
        function(*tensors, **options)
    with torch.no_grad():
        actual, expected = (as_tuple(function(*tensors, **options, backend=b)) for b in ("triton", "torch"))
        assert_same_results([actual], [expected], 1e-10)


@pytest.mark.parametrize(
    ("op", "positions", "dtype", "message"),
    [
        (
            "add_norm",
            (0, 1),
            torch.float8_e5m2,
            "x must be float16, .*; branch must be float16, .* got torch.float8",
        ),
        ("prompt_pool", (0, 4), torch.float8_e5m2, "x must be float16, .*got torch.float8_e5m2"),
        ("prompt_pool", (1,), torch.float16, "matrix must be float32 or float64, got torch.float16"),
        ("prompt_projector", (0,), torch.float16, "pooled must be float32 or float64, got torch.float16"),
        ("prompt_attention", range(5), torch.float8_e5m2, "one dtype, .*got torch.float8"),
        ("prompt_attention_packed", range(2), torch.float8_e5m2, "one dtype, .*got torch.float8"),
        ("absorbed_attention", (1,), torch.float8_e5m2, "x must be float16, .*got torch.float8"),
        ("mlp", (0,), torch.float8_e5m2, "one dtype, .*got torch.float8"),
    ],
)
def test_other_dtypes_are_refused(op, positions, dtype, message):
    function, _, tensors, options = everything(op)
    for position in positions:
        tensors[position] = tensors[position].to(dtype)
    if op == "mlp":
        options = {name: value.to(dtype) for name, value in options.items()}
    with pytest.raises(BackendUnavailableError, match=f"{op} can't run on backend 'triton': .*{message}"):
        function(*tensors, **options)


def test_sizes_that_the_kernels_have_no_part_for_are_refused():
    x = torch.zeros(1, 3, 1, 129)
    with pytest.raises(BackendUnavailableError, match="1 to 128 channels, got 129"):
        functional.prompt_attention(x, x, x, x, x, scale=1.0)
    function, _, tensors, options = made("prompt_projector", width=65)
    with pytest.raises(BackendUnavailableError, match="down must have at most 64 rows, got 65"):
        function(*tensors, **options)
