"""What is particular to attention on Triton: extreme scores, biases, and joint tensors."""

from functools import partial

import pytest
import torch
from interpreter import only_last_program
from op_cases import (
    assert_same_results,
    attention_case,
    cls_case,
    packed_case,
    packed_formula,
    rand,
    results,
)
from shadow import no_overflow

from vapt_fast import functional
from vapt_fast.ops.absorbed_attention.op import Arguments, Gradients, Outputs, Saved

SMALL = {"batch": 2, "heads": 1, "groups": 1, "dim": 8}

attentions = pytest.mark.parametrize("make", [attention_case, cls_case], ids=["prompt", "absorbed"])


def case(make, **sizes):
    torch.manual_seed(0)
    return make(**sizes)


# ---- scores


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 100.0), (torch.float64, 800.0), (torch.float32, 3e4)]
)
@pytest.mark.parametrize("sign", [-1, 1])
@attentions
def test_extreme_scores_stay_finite(make, sign, dtype, size):
    op, _, tensors, options = case(make)
    tensors = [t.to(dtype) for t in tensors]
    tensors[0] = sign * tensors[0].abs() * size
    tensors[1:4] = [t.abs() + 1 for t in tensors[1:4]]
    outputs, grads = results(op, tensors, options)
    assert all(torch.isfinite(t).all() for t in (*outputs, *grads))


@pytest.mark.parametrize("prompts", [0, 2])
@pytest.mark.parametrize(
    ("make", "sizes"),
    [(attention_case, {"queries": 4, "groups": 2}), (cls_case, {"rows": 4})],
    ids=["prompt", "absorbed"],
)
def test_a_bias_may_hide_keys(make, sizes, prompts):
    """-inf for some keys, for a whole first block of keys, and for all tokens where there are prompts."""
    op, formula, tensors, options = case(make, tokens=40, prompts=prompts, bias=True, **sizes)
    options["bias"][..., 0, 3] = options["bias"][..., 1, :33] = float("-inf")
    if prompts:
        options["bias"][..., 2, :] = float("-inf")
    assert_same_results(results(op, tensors, options), results(formula, tensors, options), 1e-10)


def test_a_query_without_any_key_as_on_torch():
    op, _, tensors, options = case(attention_case, **SMALL, prompts=0, bias=True)
    options["bias"][..., 2, :] = float("-inf")
    actual, expected = (results(op, tensors, options | {"backend": b}) for b in ("triton", "torch"))
    assert_same_results(actual, expected, 1e-10)


@pytest.mark.parametrize("shape", [(2, 2, 5, 7), (2, 1, 5, 7), (1, 1, 5, 7), (2, 5, 7), (5, 7)], ids=str)
def test_a_bias_may_be_of_each_image_or_of_all_heads(shape):
    op, formula, tensors, options = case(attention_case, heads=2, groups=2)
    options["bias"] = rand(*shape)
    expected = results(formula, tensors, options | {"bias": options["bias"].expand(2, 2, 5, 7)})
    assert_same_results(results(op, tensors, options), expected, 1e-10)


@pytest.mark.parametrize("shape", [(1, 3, 2, 7), (1, 1, 2, 7), (3, 2, 7), (2, 7)], ids=str)
def test_the_bias_of_absorbed_attention_has_a_gradient(shape):
    op, formula, tensors, options = case(cls_case, rows=2)
    tensors.append(rand(*shape))
    del options["bias"]
    actual = results(lambda *a: op(*a[:-1], bias=a[-1], **options), tensors, {})
    expanded = (2, 3, 2, 7)
    expected = results(lambda *a: formula(*a[:-1], bias=a[-1].expand(expanded), **options), tensors, {})
    assert_same_results(actual, expected, 1e-10)


# ---- tensors


def test_packed_is_the_separate_form_bit_by_bit():
    op, _, (qkv, prompt_kv), options = case(packed_case, groups=2, tokens=17, shared=True, bias=True)
    (out,), grads = results(op, [qkv, prompt_kv], options)
    unpacked = partial(packed_formula, attention=functional.prompt_attention)
    (expected,), expected_grads = results(unpacked, [qkv, prompt_kv], options)
    assert torch.equal(out, expected)
    assert_same_results([grads], [expected_grads], 0)


def test_slices_of_a_joint_projection():
    op, _, tensors, options = case(attention_case, queries=7, tokens=7, heads=2, groups=2, dim=8)
    joint = torch.cat([t.flatten(2) for t in tensors[:3]], dim=-1)
    slices = [t.unflatten(-1, (2, 8)) for t in joint.split(16, dim=-1)]
    assert not slices[1].is_contiguous()
    expected = results(op, tensors, options)
    assert_same_results(results(op, [*slices, *tensors[3:]], options), expected, 0)


def test_a_stride_too_long_for_the_kernels():
    op, _, tensors, options = case(attention_case, **SMALL | {"batch": 1}, bias=True)
    expected = results(op, tensors, options)
    memory = torch.empty(7 * 2**24 + 8, dtype=torch.float64)  # only the pages that are written take any
    tensors[1] = memory.as_strided(tensors[1].shape, (8, 2**24, 8, 1)).copy_(tensors[1])
    assert_same_results(results(op, tensors, options), expected, 0)


@attentions
def test_numbers_of_prompts_far_apart_in_memory(make):
    op, _, tensors, options = case(make, batch=3, prompts=4, lengths=(2, 0, 4))
    expected = results(op, tensors, options)
    memory = torch.empty(2**31 + 1, dtype=torch.int32)  # only the pages that are written take any
    far = memory.as_strided((3,), (2**30,)).copy_(options["prompt_lengths"])
    assert_same_results(results(op, tensors, options | {"prompt_lengths": far}), expected, 0)


@pytest.mark.full
def test_more_than_2_31_elements_of_absorbed_attention():
    """Of the kernels alone: the op multiplies all queries by the weights."""
    from vapt_fast.ops.absorbed_attention import triton as absorbed  # kill_mutants replaces what it imports

    torch.manual_seed(0)
    batch, dim = 2**25 + 64, 64
    u, grad_y = torch.randn(2, 1, dim)
    prompts, x = torch.randn(2, 1, dim).half()
    leaves = [tensor.float().requires_grad_() for tensor in (u, x, prompts)]
    rows = torch.cat([leaves[2], leaves[1]])
    p = (leaves[0] @ rows.T).softmax(dim=-1)
    expected = torch.autograd.grad(p @ rows, leaves, grad_y)

    def many(last):
        images = torch.empty(batch, *last.shape, dtype=last.dtype)  # only the pages that are written take any
        images[-1] = last
        return images

    saved = tuple(map(many, (u, x, prompts)))
    out = Outputs(torch.empty(batch, 1, dim), torch.empty(batch, 1, 2))
    grads = Gradients(*map(torch.empty_like, saved), None)
    with no_overflow(), only_last_program():
        absorbed.forward(Arguments(*saved, None, None), out)
        absorbed.backward(Saved(*saved, out.p, None), (many(grad_y),), grads)
    assert_same_results([[out.p[-1], out.y[-1]]], [[p, p @ rows]], 1e-5)
    assert_same_results([[grad[-1].float() for grad in grads[:3]]], [expected], 1e-3)
