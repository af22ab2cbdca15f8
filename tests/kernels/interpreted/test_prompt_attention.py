"""prompt_attention on Triton, in its interpreter, against the torch backend and the formula."""

import importlib
import itertools
import random
from unittest import mock

import pytest
import torch
from interpreter import recorded_launches
from op_cases import (
    assert_policy,
    assert_same_results,
    attention_case,
    layouts,
    packed_case,
    packed_formula,
    rand,
    results,
)

from vapt_fast import BackendUnavailableError
from vapt_fast.backends._packed import unpack

# By its full name: the package has a function of this name.
LAUNCHER = importlib.import_module("vapt_fast.backends.triton.prompt_attention")

TENSORS = ("q", "k", "v", "prompt_k", "prompt_v")
# The interpreter takes long for a program (image, head, block), no matter how large the block is.
SMALL = {"batch": 2, "heads": 1, "groups": 1, "dim": 8}
SEVERAL_HEADS = SMALL | {"heads": 2, "groups": 2}


def case(**sizes):
    torch.manual_seed(0)
    return attention_case(**sizes)


def on_torch(op, tensors, options):
    return results(op, tensors, options | {"backend": "torch"})


def random_sizes(count):
    """Sizes around those of the blocks, each value of each size several times."""
    choose = random.Random(0)
    for _ in range(count):
        heads, groups = choose.choice([(1, 1), (2, 2), (2, 1), (3, 1), (4, 2)])
        yield {
            "batch": choose.choice([1, 1, 2]),
            "queries": choose.choice([1, 5, 15, 16, 17, 33]),
            "tokens": choose.choice([1, 7, 15, 16, 17, 33]),
            "heads": heads,
            "groups": groups,
            "dim": choose.choice([1, 3, 8, 16, 24]),
            "prompts": choose.choice([0, 1, 5, 10, 16, 17]),
            "shared": choose.choice([False, True]),
            "bias": choose.choice([False, True]),
        }


CASES = [
    *random_sizes(56),
    *({"batch": 1, "heads": 1, "groups": 1, "dim": dim} for dim in (16, 32, 64, 72, 80, 88, 96, 128)),
    {"batch": 1, "queries": 49, "tokens": 50, "heads": 1, "groups": 1, "dim": 32, "prompts": 50},
]


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_equals_the_torch_backend(sizes):
    op, _, tensors, options = case(**sizes)
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("prompts", "batch", "shared"), [(0, 1, False), (2, 1, False), (2, 2, True)])
def test_gradcheck(prompts, batch, shared, groups, bias):
    op, _, tensors, options = case(
        batch=batch,
        queries=3,
        tokens=4,
        heads=2,
        groups=groups,
        prompts=prompts,
        shared=shared,
        bias=bias,
    )
    leaves = [t.requires_grad_() for t in tensors]
    # fast_mode compares products with random vectors instead of every element, which would take minutes here.
    assert torch.autograd.gradcheck(lambda *a: op(*a, **options), leaves, fast_mode=True)


# ---- the packed form: the same kernels, other strides


PACKED = [
    {"batch": b, "tokens": t, "heads": h, "groups": g, "dim": d, "prompts": p, "shared": s, "bias": m}
    for (b, t, h, g, d, p), (s, m) in zip(
        [
            *itertools.product((1, 2), (1, 17), (2,), (1, 2), (3, 8), (0, 5)),
            *((1, 33, 1, 1, 8, 17), (2, 16, 3, 1, 1, 16), (1, 5, 4, 2, 24, 1), (0, 5, 2, 2, 4, 3)),
        ],
        itertools.cycle(itertools.product((False, True), repeat=2)),
        strict=False,
    )
]


def packed(**sizes):
    torch.manual_seed(0)
    return packed_case(**sizes)


@pytest.mark.parametrize("sizes", PACKED, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_packed_equals_the_torch_backend(sizes):
    op, _, tensors, options = packed(**sizes)
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


def test_packed_equals_the_formula():
    op, formula, tensors, options = packed(heads=2, groups=1)
    assert formula is packed_formula
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("prompts", "batch", "shared"), [(0, 1, False), (2, 1, False), (2, 2, True)])
def test_gradcheck_of_the_packed_form(prompts, batch, shared, groups, bias):
    sizes = {"batch": batch, "tokens": 4, "heads": 2, "groups": groups, "dim": 3, "prompts": prompts}
    op, _, tensors, options = packed(**sizes, shared=shared, bias=bias)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *a: op(*a, **options), leaves, fast_mode=True)


def test_packed_is_the_separate_form_bit_by_bit():
    op, _, (qkv, prompt_kv), options = packed(heads=4, groups=2, tokens=17, shared=True, bias=True)
    (out,), (grad_qkv, grad_prompt_kv) = results(op, [qkv, prompt_kv], options)
    heads = options.pop("num_heads"), options.pop("num_kv_heads")
    separate, *_ = attention_case()
    (expected,), grads = results(separate, unpack(qkv, prompt_kv, *heads), options)
    assert torch.equal(out, expected)
    assert torch.equal(grad_qkv, torch.cat(grads[:3], dim=2).flatten(2))
    assert torch.equal(grad_prompt_kv, torch.cat(grads[3:], dim=2).flatten(2))


@pytest.mark.parametrize("position", [0, 1])
def test_layouts_of_joint_tensors_make_no_difference(position):
    op, _, tensors, options = packed(heads=2, groups=2, dim=8)
    expected = results(op, tensors, options)
    for name, same in layouts(tensors[position]):
        actual = results(op, [*tensors[:position], same, *tensors[position + 1 :]], options)
        assert_same_results(actual, expected, 0, name)


def test_layouts_of_the_incoming_gradient_of_the_packed_form_make_no_difference():
    op, _, tensors, options = packed(heads=2, groups=1, dim=8)
    leaves = [t.requires_grad_() for t in tensors]
    out = op(*leaves, **options)
    incoming = rand(*out.shape)
    expected = torch.autograd.grad(out, leaves, incoming, retain_graph=True)
    for name, same in layouts(incoming):
        actual = torch.autograd.grad(out, leaves, same, retain_graph=True)
        assert_same_results([actual], [expected], 0, name)


def test_the_gradient_of_a_joint_tensor_is_written_in_one_piece():
    op, _, (qkv, prompt_kv), options = packed(heads=2, groups=2, dim=8)
    leaves = [qkv.requires_grad_(), prompt_kv.requires_grad_()]
    with recorded_launches() as launches:
        out = op(*leaves, **options)
        nodes = [node for node, _ in out.grad_fn.next_functions if node is not None]
        grads = torch.autograd.grad(out.sum(), leaves)
    assert [node.variable for node in nodes] == leaves  # nothing between the op and what it was given
    kernels_run = ["forward", "row_products", "grad_queries", "grad_keys", "grad_keys"]
    assert [name for name, _ in launches] == kernels_run
    assert all(grad.is_contiguous() for grad in grads)


def test_only_prompts_that_learn_in_the_packed_form():
    op, formula, (qkv, prompt_kv), options = packed(heads=2, groups=1, shared=True)
    prompt_kv.requires_grad_()
    with recorded_launches() as launches:
        actual = torch.autograd.grad(op(qkv, prompt_kv, **options).square().sum(), prompt_kv)
    assert [name for name, _ in launches] == ["forward", "row_products", "grad_keys"]
    expected = torch.autograd.grad(formula(qkv, prompt_kv, **options).square().sum(), prompt_kv)
    assert_same_results([actual], [expected], 1e-10)


def test_opcheck_of_the_packed_form():
    _, _, tensors, options = packed(heads=2, groups=1, shared=True, bias=True)
    qkv, prompt_kv = (t.requires_grad_() for t in tensors)
    rest = (options["bias"], options["num_heads"], options["num_kv_heads"], options["scale"])
    ops = torch.ops.vapt_fast
    torch.library.opcheck(ops.prompt_attention_packed, (qkv, prompt_kv, *rest))
    out, lse = ops.prompt_attention_packed(qkv, prompt_kv, *rest)
    assert [t.requires_grad for t in (out, lse)] == [True, False]
    grad_out = torch.ones_like(out)
    row_dot = ops.prompt_attention_row_products(out, grad_out)
    arguments = [t.detach() for t in (grad_out, lse, row_dot, qkv, prompt_kv)]
    torch.library.opcheck(ops.prompt_attention_grad_packed, (*arguments, *rest))


def test_derivatives_that_the_packed_form_has_not():
    op, _, (qkv, prompt_kv), options = packed(heads=1, groups=1)
    qkv.requires_grad_()
    (grad,) = torch.autograd.grad(op(qkv, prompt_kv, **options).square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="prompt_attention can't be differentiated twice"):
        grad.sum().backward()
    tensor = prompt_kv.clone()
    with pytest.raises(NotImplementedError, match="prompt_attention has no forward-mode derivative"):
        torch.func.jvp(lambda t: op(qkv, t, **options), (tensor,), (torch.ones_like(tensor),))


def test_the_packed_form_compiles_into_one_graph_for_any_batch():
    op, _, _, options = packed(heads=1, groups=1)
    compiled = torch.compile(
        lambda *a: op(*a, **options, backend="triton"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (2, 3):
        tensors = packed(batch=batch, heads=1, groups=1)[2]
        assert_same_results(results(lambda *a: compiled(*a), tensors, {}), results(op, tensors, options), 0)


def test_dtypes_of_the_packed_form_under_autocast_are_those_of_the_torch_backend():
    op, _, (qkv, prompt_kv), options = packed(heads=2, groups=1)
    tensors = [qkv.float(), prompt_kv.half()]
    with torch.autocast("cpu", torch.float16):
        actual, expected = results(op, tensors, options), on_torch(op, tensors, options)
    assert_same_results(actual, expected, 0.02)


# ---- precision


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_is_at_most_that_of_eager_pytorch(dtype, scale):
    sizes = SMALL | {"batch": 1, "queries": 30, "tokens": 28, "dim": 32, "prompts": 5}

    def cases():
        for seed in range(20):
            torch.manual_seed(seed)
            op, formula, tensors, options = attention_case(**sizes)
            yield op, formula, [t * scale for t in tensors], options

    assert_policy(attention_case, cases(), dtype)


# ---- layouts


@pytest.mark.parametrize("position", range(len(TENSORS)), ids=TENSORS)
def test_layouts_make_no_difference(position):
    op, _, tensors, options = case(**SEVERAL_HEADS, bias=True)
    expected = results(op, tensors, options)
    for name, same in layouts(tensors[position]):
        actual = results(op, [*tensors[:position], same, *tensors[position + 1 :]], options)
        assert_same_results(actual, expected, 0, name)


def test_layouts_of_the_bias_make_no_difference():
    op, _, tensors, options = case(**SEVERAL_HEADS, bias=True)
    bias = options.pop("bias")
    expected = results(op, tensors, options | {"bias": bias})
    for name, same in layouts(bias):
        assert_same_results(results(op, tensors, options | {"bias": same}), expected, 0, name)
    for shape in ((5, 7), (1, 1, 5, 7), (2, 1, 5, 7)):
        bias = rand(*shape)
        every = bias.expand(2, 2, 5, 7).contiguous()
        actual, expected = (results(op, tensors, options | {"bias": b}) for b in (bias, every))
        assert_same_results(actual, expected, 0, str(shape))


def test_layouts_of_the_incoming_gradient_make_no_difference():
    op, _, tensors, options = case(**SMALL)
    leaves = [t.requires_grad_() for t in tensors]

    def grads(incoming):
        return torch.autograd.grad(op(*leaves, **options), leaves, incoming)

    incoming = rand(*tensors[0].shape)
    expected = grads(incoming)
    for name, same in layouts(incoming):
        assert_same_results([grads(same)], [expected], 0, name)
    ones = torch.ones((), dtype=torch.float64)
    assert_same_results([grads(ones.expand(incoming.shape))], [grads(torch.ones_like(incoming))], 0)


def test_slices_of_a_joint_projection():
    op, _, tensors, options = case(batch=2, queries=7, tokens=7, heads=2, groups=2, dim=8)
    joint = torch.cat([t.flatten(2) for t in tensors[:3]], dim=-1)
    slices = [t.unflatten(-1, (2, 8)) for t in joint.split(16, dim=-1)]
    assert not slices[1].is_contiguous()
    expected = results(op, tensors, options)
    assert_same_results(results(op, [*slices, *tensors[3:]], options), expected, 0)


def test_offsets_beyond_32_bits():
    op, _, tensors, options = case(batch=2, heads=1, groups=1, dim=8)
    tensors = [t.half() for t in tensors]
    far = 2**31 + 64
    memory = torch.empty(far + 64, dtype=torch.float16)  # only the pages that are written take any
    expected = results(op, tensors, options)
    for position, tensor in enumerate(tensors):
        distant = memory.as_strided(tensor.shape, (far, 8, 8, 1)).copy_(tensor)
        moved = [*tensors[:position], distant, *tensors[position + 1 :]]
        with mock.patch.object(torch.UntypedStorage, "copy_"):  # the interpreter's, of all memory on itself
            assert_same_results(results(op, moved, options), expected, 0, TENSORS[position])


def test_a_stride_too_long_for_the_kernels():
    op, _, tensors, options = case(batch=1, heads=1, groups=1, dim=8, bias=True)
    expected = results(op, tensors, options)
    memory = torch.empty(7 * 2**24 + 8, dtype=torch.float64)
    distant = memory.as_strided(tensors[1].shape, (8, 2**24, 8, 1)).copy_(tensors[1])
    assert_same_results(results(op, [tensors[0], distant, *tensors[2:]], options), expected, 0)


@pytest.mark.usefixtures("poisoned")
def test_memory_that_nobody_has_written_is_not_read():
    op, _, tensors, options = case(**SMALL, queries=17, tokens=18, shared=True, bias=True)
    outputs, grads = results(op, tensors, options)
    assert all(torch.isfinite(t).all() for t in (*outputs, *grads))


# ---- nothing there, too much there


@pytest.mark.parametrize("shared", [False, True])
def test_no_images(shared):
    op, _, tensors, options = attention_case(**SMALL | {"batch": 0}, shared=shared)
    outputs, grads = results(op, tensors, options)
    assert [t.shape for t in grads] == [t.shape for t in tensors]
    assert outputs[0].shape == tensors[0].shape
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 100.0), (torch.float64, 800.0), (torch.float32, 3e4)]
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_scores_stay_finite(dtype, size, sign):
    op, _, tensors, options = case(**SMALL)
    tensors = [t.to(dtype) for t in tensors]
    tensors[0] = sign * tensors[0].abs() * size
    tensors[1], tensors[3] = tensors[1].abs() + 1, tensors[3].abs() + 1
    outputs, grads = results(op, tensors, options)
    assert all(torch.isfinite(t).all() for t in (*outputs, *grads))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", range(len(TENSORS)), ids=TENSORS)
def test_nan_and_inf_propagate_as_on_torch(position, value):
    op, _, tensors, options = case(**SMALL)
    tensors[position][0, 0, 0, 0] = value
    with torch.no_grad():
        actual = op(*tensors, **options)
        expected = op(*tensors, **options, backend="torch")
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert torch.isfinite(actual[1]).all()


@pytest.mark.parametrize("prompts", [0, 2])
def test_a_bias_may_hide_keys(prompts):
    """-inf for some keys, for the whole first block of keys, and for all keys of a query."""
    op, _, tensors, options = case(
        batch=1, queries=4, tokens=20, heads=1, groups=1, prompts=prompts, bias=True
    )
    options["bias"][..., 0, 3] = options["bias"][..., 1, :16] = options["bias"][..., 2, :] = float("-inf")
    assert_same_results(results(op, tensors, options), on_torch(op, tensors, options), 1e-10)


# ---- launches


def test_only_prompts_that_learn():
    """As in the first block: nothing is computed for the tokens."""
    op, formula, (*frozen, prompt_k, prompt_v), options = case(**SMALL, shared=True)
    leaves = [prompt_k.requires_grad_(), prompt_v.requires_grad_()]
    with recorded_launches() as launches:
        actual = torch.autograd.grad(op(*frozen, *leaves, **options).square().sum(), leaves)
    assert [name for name, _ in launches] == ["forward", "row_products", "grad_keys"]
    expected = torch.autograd.grad(formula(*frozen, *leaves, **options).square().sum(), leaves)
    assert_same_results([actual], [expected], 1e-10)


def test_results_repeat_bit_by_bit_and_image_by_image():
    op, _, tensors, options = case(batch=3, heads=2, groups=1, dim=8)
    outputs, grads = results(op, tensors, options)
    assert_same_results(results(op, tensors, options), [outputs, grads], 0)
    with torch.no_grad():
        assert torch.equal(op(*(t[1:2] for t in tensors), **options), outputs[0][1:2])


# ---- as an op of PyTorch


def test_opcheck():
    _, _, tensors, options = case(**SMALL, shared=True, bias=True)
    arguments = [*(t.requires_grad_() for t in tensors), options["bias"], options["scale"]]
    torch.library.opcheck(torch.ops.vapt_fast.prompt_attention, arguments)


def test_opcheck_of_the_backward():
    _, _, tensors, options = case(**SMALL, shared=True, bias=True)
    q, k, v, prompt_k, prompt_v = tensors
    bias, scale = options["bias"], options["scale"]
    ops = torch.ops.vapt_fast
    out, lse = ops.prompt_attention(*tensors, bias, scale)
    grad_out = torch.ones_like(out)
    torch.library.opcheck(ops.prompt_attention_row_products, (out, grad_out))
    common = (grad_out, lse, ops.prompt_attention_row_products(out, grad_out), q)
    torch.library.opcheck(ops.prompt_attention_grad_queries, (*common, k, v, prompt_k, prompt_v, bias, scale))
    torch.library.opcheck(ops.prompt_attention_grad_keys, (*common, k, v, bias, scale))
    torch.library.opcheck(ops.prompt_attention_grad_keys, (*common, prompt_k, prompt_v, None, scale))


def test_lse_is_not_differentiable():
    _, _, tensors, options = case(**SMALL)
    arguments = [*(t.requires_grad_() for t in tensors), None, options["scale"]]
    outputs = torch.ops.vapt_fast.prompt_attention(*arguments)
    assert [output.requires_grad for output in outputs] == [True, False]


def test_a_second_derivative_raises():
    op, _, tensors, options = case(**SMALL)
    q, *rest = (t.requires_grad_() for t in tensors)
    (grad,) = torch.autograd.grad(op(q, *rest, **options).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="prompt_attention can't be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("position", range(len(TENSORS)), ids=TENSORS)
def test_a_forward_derivative_raises(position):
    op, _, tensors, options = case(**SMALL)

    def function(tensor):
        return op(*tensors[:position], tensor, *tensors[position + 1 :], **options)

    with pytest.raises(NotImplementedError, match="prompt_attention has no forward-mode derivative"):
        torch.func.jvp(function, (tensors[position],), (torch.ones_like(tensors[position]),))


def test_compiles_into_one_graph_for_any_batch():
    op, _, _, options = case(**SMALL)
    compiled = torch.compile(
        lambda *a: op(*a, **options, backend="triton"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (2, 3):
        tensors = case(**SMALL | {"batch": batch})[2]
        assert_same_results(results(lambda *a: compiled(*a), tensors, {}), results(op, tensors, options), 0)


def test_dtypes_under_autocast_are_those_of_the_torch_backend():
    op, _, (q, k, v, *prompts), options = case(**SMALL)
    tensors = [q.float(), k.float(), v.half(), *(t.float() for t in prompts)]
    with torch.autocast("cpu", torch.float16):
        actual, expected = results(op, tensors, options), on_torch(op, tensors, options)
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


# ---- what it refuses


def test_what_the_kernels_have_no_part_for_is_refused():
    op, _, (q, k, v, *prompts), options = case(**SMALL, bias=True)
    with pytest.raises(TypeError, match=r"must be of one dtype.*k torch.float64, v torch.float16"):
        op(q, k, v.half(), *prompts, **options)
    eighths = (t.to(torch.float8_e5m2) for t in (q, k, v, *prompts))
    with pytest.raises(
        BackendUnavailableError, match=r"prompt_attention can't run.*one dtype.*got torch.float8"
    ):
        op(*eighths, **options)
    with pytest.raises(BackendUnavailableError, match=r"no gradient of bias"):
        op(q, k, v, *prompts, scale=1.0, bias=options["bias"].requires_grad_())
    _, _, tensors, options = case(**SMALL | {"dim": 129})
    with pytest.raises(BackendUnavailableError, match=r"1 to 128 channels, got 129"):
        op(*tensors, **options)
