"""Batches whose images have different numbers of prompts: what stands in the padding, dtypes, transforms."""

from functools import partial

import pytest
import torch
from op_cases import assert_same_results, attention_case, cls_case, packed_case, results

from vapt_fast import use_backend

pytestmark = pytest.mark.full

LENGTHS = (2, 0, 4)
PROMPTS = {attention_case: (3, 4), packed_case: (1,), cls_case: (2,)}  # positions of tensors (B or 1, P, ...)

attentions = pytest.mark.parametrize("make", PROMPTS, ids=lambda make: make.__name__)


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request, monkeypatch):
    """Each implementation that takes lengths; Triton's in its interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton", minversion="3.6")
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled")
        from interpreter import quick_calls

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with use_backend("triton"), quick_calls():
            yield
    else:
        with use_backend("torch"):
            yield


def case(make, **sizes):
    torch.manual_seed(0)
    heads = {"heads": 1} if make is cls_case else {"heads": 2, "groups": 1}
    return make(**{"batch": 3, "prompts": 4, "lengths": LENGTHS} | heads | sizes)


@pytest.mark.parametrize("value", [0.0, 1e300, float("inf"), float("-inf"), float("nan")])
@attentions
def test_the_padding_may_hold_anything(make, value):
    op, _, tensors, options = case(make)
    expected = results(op, tensors, options)
    assert all(t.isfinite().all() for t in (*expected[0], *expected[1]))
    for position in PROMPTS[make]:
        for image, length in enumerate(LENGTHS):
            tensors[position][image, length:] = value
            assert not expected[1][position][image, length:].any()
    assert_same_results(results(op, tensors, options), expected, 0)


@attentions
def test_gradients_of_padding_are_zero_whatever_comes_in(make):
    """Prompts that all images share: an image whose gradient overflows spoils those it has, no others."""
    op, _, tensors, options = case(make, shared=True, lengths=(2, 4))

    def overflowing(grad):
        grad[0] = float("inf")
        return grad

    _, grads = results(op, tensors, options, lay_out=overflowing)
    for position in PROMPTS[make]:
        assert not grads[position][:, :2].isfinite().all()
        assert grads[position][:, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@attentions
def test_lengths_of_any_integers_and_strides(make, dtype):
    op, _, tensors, options = case(make)
    expected = results(op, tensors, options)
    lengths = options["prompt_lengths"].to(dtype)
    apart = torch.stack([lengths, lengths + 9], dim=1)[:, 0]
    assert_same_results(results(op, tensors, options | {"prompt_lengths": apart}), expected, 0)
    equal, repeated = torch.tensor([0, 0, 0]), torch.tensor([0], dtype=dtype).expand(3)
    expected, actual = (op(*tensors, **options | {"prompt_lengths": n}) for n in (equal, repeated))
    assert torch.equal(actual, expected)


@attentions
def test_values_are_checked_in_every_call(make):
    op, _, tensors, options = case(make)
    lengths = options["prompt_lengths"]
    op(*tensors, **options)
    for wrong in (-1, 5):
        lengths[1] = wrong
        with pytest.raises(ValueError, match=rf"prompt_lengths must be 0 to 4, got \[2, {wrong}, 4\]"):
            op(*tensors, **options)


@attentions
def test_autocast_leaves_lengths_as_they_are(make):
    op, formula, tensors, options = case(make)
    tensors, count = [t.float() for t in tensors], 2**24 + 1  # no float of fewer bits holds it
    options["prompt_lengths"] = options["prompt_lengths"].clone()
    with torch.autocast("cpu", torch.float16):
        (actual,), _ = results(op, tensors, options)
        options["prompt_lengths"][0] = count
        with pytest.raises(ValueError, match=str(count)):
            op(*tensors, **options)
    options["prompt_lengths"][0] = LENGTHS[0]
    expected = formula(*tensors, **options)
    torch.testing.assert_close(actual.float(), expected, rtol=0.03, atol=0.03)


# ---- transforms


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # no kernel is mapped
@attentions
def test_mapped_over_lengths(make):
    op, formula, tensors, options = case(make)
    lengths = torch.tensor([[2, 0, 4], [1, 1, 0]])

    def gradients(f, numbers):
        def total(*tensors):
            return f(*tensors, **options | {"prompt_lengths": numbers}).pow(3).sum()

        return torch.func.grad(total, tuple(range(len(tensors))))(*tensors)

    for position in PROMPTS[make]:
        tensors[position] = tensors[position].nan_to_num(1.0)
    actual = torch.func.vmap(partial(gradients, op))(lengths)
    expected = [torch.stack(grads) for grads in zip(*(gradients(formula, n) for n in lengths), strict=True)]
    assert_same_results([actual], [expected], 1e-10)


@attentions
def test_compiled_for_all_lengths_and_clamped(make):
    op, _, tensors, options = case(make)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *args: op(*args[:-1], **options | {"prompt_lengths": args[-1]}),
        fullgraph=True,
        backend="aot_eager",
    )
    for count, (given, clamped) in enumerate([((2, 0, 4), (2, 0, 4)), ((-3, 2, 2**40), (0, 2, 4))]):
        for position in PROMPTS[make]:
            tensors[position] = tensors[position].nan_to_num(1.0)
        given, clamped = torch.tensor(given), torch.tensor(clamped)
        with torch.compiler.set_stance("fail_on_recompile" if count else "default"):
            actual = results(lambda *a, n=given: compiled(*a, n), tensors, {})
        assert_same_results(actual, results(op, tensors, options | {"prompt_lengths": clamped}), 1e-13)
