"""prompt_pool in CUDA, compiled for a CPU (csrc/emulation): values, gradients, layouts, bounds, races."""

import contextlib
import ctypes
import itertools
import subprocess

import emulation
import pytest
import torch
from emulation import CSRC, INVALID, SANITIZERS, UNSUPPORTED
from emulation_pool import PoolKernels
from op_cases import assert_policy, assert_same_results, by_name, pool_case, results

KERNELS = [CSRC / f"prompt_pool_{name}.cu" for name in ("forward", "backward")]
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
EPS = (1e-6, 1e-5)

# (B, S, N, C, R): every size of a block +- 1 and what lies between.
SHAPES = [
    *itertools.product((1, 2), (0, 5), (1, 17), (8, 72), (4, 10)),
    *((b, 1, 17, 24, 1) for b in (1, 2)),
    *((1, 1, n, 16, 3) for n in (15, 16, 31, 32, 33, 49, 62, 63, 64, 65, 127, 196)),
    *((1, s, 16, 16, 3) for s in (4, 10, 47, 48, 49)),
    *(
        (1, 1, 4, c, 3)
        for c in (24, 32, 56, 64, 120, 128, 136, 192, 248, 256, 264, 384, 768, 1024, 1032, 1280)
    ),
    *((1, 0, 4, 8, r) for r in (15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 127, 128, 129, 200)),
    *((b, 1, 4, 8, 3) for b in (3, 4)),
    *((5, 1, 33, 24, r) for r in (3, 40)),
    *((1, s, 256 - s, 8, 33) for s in (0, 1)),
    (1, 1, 256, 8, 33),
    (1, 5, 196, 8, 50),
    (3, 3, 30, 264, 64),
    (2, 1, 33, 136, 35),
    (1, 1, 65, 72, 129),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return emulation.library(tmp_path_factory)


@pytest.fixture(params=[True, False], ids=["one pass", "two passes"])
def kernels(library, request):
    kernels = PoolKernels(library)
    kernels.one_pass = request.param
    return kernels


@pytest.fixture
def both(library):
    """For tests that choose themselves, in one pass or two."""
    return PoolKernels(library)


@contextlib.contextmanager
def device(kernels, shared_memory=227 * 1024, clusters=2):
    """Emulate another device: bytes of shared memory of a block, clusters that run at once."""
    try:
        kernels.library.set_shared_memory_limit(ctypes.c_int64(shared_memory))
        kernels.library.set_clusters_at_once(ctypes.c_int64(clusters))
        yield
    finally:
        kernels.library.set_shared_memory_limit(ctypes.c_int64(227 * 1024))
        kernels.library.set_clusters_at_once(ctypes.c_int64(2))


def case(
    kernels, batch=2, prefix=1, patches=9, dim=24, rows=3, branch=True, layer_scale=True, affine=True, seed=0
):
    torch.manual_seed(seed)
    _, formula, tensors, options = pool_case(batch, prefix, patches, dim, rows, branch, layer_scale, affine)
    names = ("x", "matrix", "weight", "bias", *(["branch"] if branch else []))
    return by_name(kernels.prompt_pool, names), formula, tensors, options


def low(dtype, tensors, tokens=None):
    """Tokens in ``tokens`` or ``dtype``, branch in ``dtype``, what is learned in float32."""
    dtypes = {0: dtype if tokens is None else tokens, 4: dtype}
    return [t.to(dtypes.get(i, torch.float32)) for i, t in enumerate(tensors)]


def arguments(
    dtype=torch.bfloat16,
    batch=2,
    prefix=1,
    patches=9,
    dim=24,
    rows=3,
    branch=True,
    layer_scale=True,
    affine=True,
):
    """The arguments of PoolKernels.forward; norm_weight is zero in some channels."""
    torch.manual_seed(0)
    x, added = (torch.randn(batch, prefix + patches, dim).to(dtype) for _ in range(2))
    learned = [torch.randn(rows, patches), torch.randn(dim), torch.randn(dim)]
    scale = torch.randn(dim) if layer_scale else None
    norm_weight, norm_bias = torch.randn(2, dim, generator=torch.Generator().manual_seed(1))
    norm_weight[1::3] = 0
    norm = (norm_weight, norm_bias) if affine else (None, None)
    return [x, *learned, *norm, added if branch else None, scale, *EPS]


def backward_arguments(kernels, given):
    """Those of PoolKernels.backward, after a forward pass."""
    x, *learned, norm_weight, _, branch, layer_scale, eps, prompt_eps = given
    total, normed, pooled, mean, rstd = kernels.forward(*given)
    grad_total, grad_normed, grad_pooled = (torch.randn(t.shape).to(t.dtype) for t in (x, normed, pooled))
    total = x if branch is None else total
    frozen = (norm_weight, layer_scale)
    return [total, grad_total, grad_normed, grad_pooled, *learned, *frozen, mean, rstd, eps, prompt_eps]


# ---- values and gradients


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_error_is_at_most_that_of_eager_pytorch(kernels, number):
    *_, patches, _, rows = SHAPES[number]
    # Dtypes and arguments take turns.
    dtype = (torch.float16, torch.bfloat16)[(number + kernels.one_pass) % 2]
    options = {"branch": number % 3 > 0, "layer_scale": number % 3 > 1, "affine": number % 4 > 0}

    def cases():
        for seed in range(3 if rows * patches > 16 else 12):  # the error of few numbers is a matter of luck
            yield case(kernels, *SHAPES[number], **options, seed=seed)

    assert_policy(pool_case, cases(), dtype)


@HALF
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_error_over_twenty_seeds(kernels, dtype, scale):
    def cases():
        for seed in range(20):
            op, formula, tensors, options = case(kernels, dim=32, seed=seed)
            yield op, formula, [t * scale for t in tensors], options

    assert_policy(pool_case, cases(), dtype)


def test_both_eps_where_the_variance_is_small(kernels):

    def cases():
        for seed in range(5):
            op, formula, (x, *learned, branch), options = case(
                kernels, patches=33, layer_scale=False, seed=seed
            )
            yield op, formula, [x * 2e-3, *learned, branch * 2e-3], options

    assert_policy(pool_case, cases(), torch.float16)


@HALF
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_tokens_as_under_autocast(kernels, dtype, offset):
    """Their sum is exact, their statistics are float32, and the rest is at least as good as in 16 bits."""
    kernels.half = dtype
    for optional in (
        (True, True, True),
        (True, False, False),
        (False, False, True),
    ):  # branch, layer_scale, affine
        op, formula, tensors, options = case(kernels, 2, 1, 33, 136, 35, *optional)
        tensors = low(dtype, tensors, tokens=torch.float32)
        tensors[0] = tensors[0] + offset
        ours = results(op, tensors, options)
        exact = results(formula, [t.double() for t in tensors], options)
        eps = [torch.finfo(t.dtype).eps for t in itertools.chain(*ours)]
        # What passes through a product with the matrix is rounded to tf32: normed, sums and all gradients.
        eps[1:] = [max(e, 2**-10) for e in eps[1:]]
        for actual, expected, e in zip(itertools.chain(*ours), itertools.chain(*exact), eps, strict=True):
            assert (actual - expected).abs().max() <= 2 * e * expected.abs().max()


def test_the_sum_is_rounded_once(kernels):
    for dtype, tokens in itertools.product((torch.float16, torch.bfloat16), (None, torch.float32)):
        given = arguments(dtype)
        given[0] = given[0].to(dtype if tokens is None else tokens)
        kernels.half = dtype
        total = kernels.forward(*given)[0]
        x, branch, layer_scale = given[0], given[6], given[7]
        assert torch.equal(total, (x.float() + layer_scale * branch.float()).to(x.dtype))


def test_normed_is_rounded_once(kernels):
    given = arguments(torch.float16)
    total, normed, _, mean, rstd = kernels.forward(*given)
    x_hat = (total.float() - mean[..., None]) * rstd[..., None]
    assert torch.equal(normed, (x_hat * given[4] + given[5]).half())


def test_what_is_pooled_is_without_the_affine_of_the_norm(kernels):
    """Also where that is zero: then normed is its bias, and no gradient comes from it."""
    given, plain = arguments(dim=136), arguments(dim=136, affine=False)
    ours, expected = kernels.forward(*given), kernels.forward(*plain)
    assert all(torch.equal(ours[i], expected[i]) for i in (0, 2, 3, 4))
    assert torch.equal(ours[1][..., 1::3], given[5][1::3].bfloat16().expand(2, 10, -1))
    given = backward_arguments(kernels, given)
    expected = kernels.backward(*given, wanted=(True, True))
    given[2][..., 1::3] = 1e3
    assert_same_results([kernels.backward(*given, wanted=(True, True))], [expected], 0)


def test_constant_rows(kernels):
    """Variance 0: rstd is 1000, nothing is NaN."""
    given = arguments(branch=False, layer_scale=False, affine=False)
    given[0][:, 3] = 7.0
    _, normed, pooled, mean, rstd = kernels.forward(*given)
    assert torch.all(mean[:, 3] == 7)
    assert not normed[:, 3].any()
    torch.testing.assert_close(rstd[:, 3], torch.full((2,), 1e3))
    assert torch.isfinite(pooled).all()


def test_many_images_share_a_chunk(kernels):
    """More blocks than are needed: then the images of a chunk are added before the chunks are."""

    def cases():
        yield case(kernels, 520, 0, 1, 8, 1)

    assert_policy(pool_case, cases(), torch.float16)


# ---- nothing there


def test_no_rows(kernels):
    op, formula, tensors, options = case(kernels, rows=0)
    tensors = low(torch.bfloat16, tensors)
    (_, normed, pooled), (grad_x, *learned, grad_branch) = results(op, tensors, options)
    assert pooled.shape == (2, 0, 24)
    assert not any(grad.any() for grad in learned)
    exact = results(formula, [t.double() for t in tensors], options)
    for actual, expected in ((normed, exact[0][1]), (grad_x, exact[1][0]), (grad_branch, exact[1][4])):
        torch.testing.assert_close(actual.double(), expected, rtol=0.02, atol=0.05)


def test_no_images(kernels):
    op, _, tensors, options = case(kernels, batch=0)
    outputs, grads = results(op, low(torch.bfloat16, tensors), options)
    assert [t.shape for t in grads] == [t.shape for t in tensors]
    assert not any(t.any() for t in (*outputs, *grads))


# ---- only what is wanted


def test_which_gradients_are_wanted_changes_none(kernels):
    given = backward_arguments(kernels, arguments())
    expected = kernels.backward(*given, wanted=(True, True))
    for wanted in itertools.product((True, False), repeat=2):
        grads = kernels.backward(*given, wanted=wanted)
        assert [grad is not None for grad in grads] == [*wanted, True, True, True]
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True) if a is not None)


def test_absent_gradients_and_factors(kernels):
    likes = {1: torch.zeros_like, 2: torch.zeros_like, 7: torch.ones_like, 8: torch.ones_like}
    for position, like in likes.items():
        given = backward_arguments(kernels, arguments())
        expected = list(given)
        given[position], expected[position] = None, like(given[position])
        grads = (kernels.backward(*a, wanted=(True, True)) for a in (given, expected))
        assert_same_results([next(grads)], [next(grads)], 0)
    given = arguments()
    absent, expected = list(given), list(given)
    absent[4:8] = None, None, given[6], None
    expected[4:8] = torch.ones(24), torch.zeros(24), given[6], torch.ones(24)
    assert_same_results([kernels.forward(*absent)], [kernels.forward(*expected)], 0)


def test_without_layer_scale_the_gradients_of_x_and_branch_are_the_same(kernels):
    grads = kernels.backward(*backward_arguments(kernels, arguments(layer_scale=False)), wanted=(True, True))
    assert torch.equal(grads[0], grads[1])


# ---- the same bits


def test_an_image_does_not_depend_on_the_others(kernels):
    given = arguments(batch=3, dim=136)
    outputs = kernels.forward(*given)
    alone = kernels.forward(given[0][2:], *given[1:6], given[6][2:], *given[7:])
    assert all(torch.equal(a, b[2:]) for a, b in zip(alone, outputs, strict=True))
    given = backward_arguments(kernels, given)
    grads = kernels.backward(*given, wanted=(True, True))
    for position in (0, 1, 2, 3, 9, 10):
        given[position] = given[position][2:].clone()
    alone = kernels.backward(*given, wanted=(True, True))
    assert all(torch.equal(a, b[2:]) for a, b in zip(alone[:2], grads[:2], strict=True))


def rows_apart(tensor):
    """The same values in other memory layouts, each row at a multiple of 16 bytes."""
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"), dtype=tensor.dtype)
    padded[..., 8:] = tensor
    yield padded[..., 8:]
    if tensor.ndim == 3:
        yield tensor.transpose(0, 1).contiguous().transpose(0, 1)


def test_layouts_make_no_difference(kernels):
    given = arguments()
    expected = kernels.forward(*given)
    for position in (0, 1, 6):
        for same in rows_apart(given[position]):
            outputs = kernels.forward(*given[:position], same, *given[position + 1 :])
            assert_same_results([outputs], [expected], 0)
    given = backward_arguments(kernels, given)
    expected = kernels.backward(*given, wanted=(True, True))
    for position in (0, 1, 2, 3, 4):
        for same in rows_apart(given[position]):
            grads = kernels.backward(*given[:position], same, *given[position + 1 :], wanted=(True, True))
            assert_same_results([grads], [expected], 0)


def test_repeated_images_and_rows(kernels):
    """Strides of 0, as an expanded tensor or the gradient of a sum has them."""
    given = arguments()
    repeated = given[0][:1, :1].expand_as(given[0])
    outputs = (kernels.forward(x, *given[1:]) for x in (repeated, repeated.contiguous()))
    assert_same_results([next(outputs)], [next(outputs)], 0)
    given = backward_arguments(kernels, given)
    for position in (1, 2, 3):
        both = []
        for change in (lambda t: t, torch.Tensor.contiguous):
            one = given[position][:1, :1].expand_as(given[position])
            both.append(kernels.backward(*given[:position], change(one), *given[position + 1 :]))
        assert_same_results([both[0][:1] + both[0][2:]], [both[1][:1] + both[1][2:]], 0)


@pytest.mark.parametrize("strides", [(2**31 + 64, 8, 1), (64, 2**31 + 64, 1)], ids=str)
def test_offsets_beyond_32_bits(kernels, strides):
    given = arguments(batch=2, prefix=1, patches=1, dim=8, rows=2)
    memory = torch.empty(2**31 + 2**24, dtype=torch.float32)  # only the pages that are written take any

    def apart(tensors, positions):
        tensors = list(tensors)
        for i in positions:
            like = memory.view(tensors[i].dtype)[2**14 * i :]
            tensors[i] = like.as_strided(tensors[i].shape, strides[-tensors[i].ndim :]).copy_(tensors[i])
        return tensors

    expected = kernels.forward(*given)
    assert_same_results([kernels.forward(*apart(given, (0, 1, 6)))], [expected], 0)
    given = backward_arguments(kernels, given)
    expected = kernels.backward(*given, wanted=(True, True))
    assert_same_results([kernels.backward(*apart(given, range(5)), wanted=(True, True))], [expected], 0)


def test_clusters_only_where_they_fit(both):
    """Too little shared memory or too many channels for a cluster: in two passes, with the same result."""
    given = arguments(patches=40, dim=264)
    given[0] += 3
    both.one_pass = True
    in_one = both.forward(*given)
    fallbacks = []
    for on in ({"shared_memory": 30 * 1024}, {"clusters": 0}):
        with device(both, **on):
            fallbacks.append(both.forward(*given))
    both.one_pass = False
    in_two = both.forward(*given)
    assert not torch.equal(in_one[4], in_two[4])  # sums in another order: one can tell which way was taken
    assert_same_results(fallbacks, [in_two] * 2, 0)
    for actual, expected in zip(in_one, in_two, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-5)


def test_fewer_long_tokens_are_normalised_at_once(both):
    """Those of 8,192 bytes, where there is no room for eight of them."""
    given = arguments(dim=2048, branch=False, layer_scale=False)
    given[0] = given[0].float()
    both.one_pass = False
    expected = both.forward(*given)
    with device(both, shared_memory=30 * 1024):
        assert_same_results([both.forward(*given)], [expected], 0)


def backward_in_both(kernels, given):
    """The gradients in one pass and in two."""
    for kernels.one_pass in (True, False):
        yield kernels.backward(*given, wanted=(True, True))


TOO_MUCH_FOR_A_CLUSTER = [
    ({"rows": 65}, {}),
    ({"patches": 256, "dim": 8}, {}),
    ({"dim": 1032}, {}),
    ({"dim": 136, "patches": 99, "rows": 50}, {"shared_memory": 100 * 1024}),
    ({"dim": 136}, {"clusters": 0}),
]


def test_rows_of_a_matrix_lie_in_different_banks(both):
    both.library.bank_conflicts()
    for both.one_pass, rows in itertools.product((True, False), (3, 35, 70)):
        both.backward(*backward_arguments(both, arguments(patches=70, dim=136, rows=rows)))
    assert both.library.bank_conflicts() == 0


@pytest.mark.parametrize(("sizes", "on"), TOO_MUCH_FOR_A_CLUSTER, ids=str)
def test_clusters_only_where_they_fit_in_the_backward(both, sizes, on):
    given = backward_arguments(both, arguments(**sizes))
    with device(both, **on):
        assert_same_results([next(ways := backward_in_both(both, given))], [next(ways)], 0)


FOR_A_CLUSTER = [
    {"rows": 64},
    {"patches": 220, "dim": 8},
    {"dim": 1024},
    {"batch": 5, "dim": 136, "rows": 10},
]


@HALF
@pytest.mark.parametrize("tokens", [torch.float32, None], ids=str)
@pytest.mark.parametrize("sizes", FOR_A_CLUSTER, ids=str)
def test_both_ways_of_the_backward_agree(both, sizes, dtype, tokens):
    given = arguments(dtype, **sizes)
    given[0] = given[0].to(dtype if tokens is None else tokens)
    both.half = dtype
    in_one, in_two = backward_in_both(both, backward_arguments(both, given))
    assert not torch.equal(in_one[4], in_two[4])  # the sums of the matrix's rows aren't rounded to tf32
    for actual, expected in zip(in_one, in_two, strict=True):
        eps = max(torch.finfo(actual.dtype).eps, 2**-10)  # tf32's
        torch.testing.assert_close(actual, expected, rtol=0, atol=eps * expected.abs().max().item())


def test_chunks_of_images_change_no_image(both):
    both.one_pass = True
    given = backward_arguments(both, arguments(batch=5, dim=136, patches=20, rows=35))
    ways = []
    for clusters in (1, 2, 3, 100):
        with device(both, clusters=clusters):
            ways.append(both.backward(*given, wanted=(True, True)))
    for grads in ways[1:]:
        assert_same_results([grads[:2]], [ways[0][:2]], 0)
        for actual, expected in zip(grads[2:], ways[0][2:], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # Their sums are in other orders: in chunks of 5, of 3 and 2, of 2, 2 and 1, and one by one.
    for one, another in itertools.combinations(ways, 2):
        assert not torch.equal(one[2], another[2])


# ---- NaN


def test_nan_stays_in_its_image_and_a_prefix_token_out_of_what_is_pooled(kernels):
    given = arguments(branch=False, layer_scale=False)
    clean = kernels.forward(*given)
    given[0][0, 0, 0] = float("nan")  # a prefix token
    _, normed, pooled, _, rstd = kernels.forward(*given)
    assert normed[0, 0].isnan().all()
    assert rstd[0, 0].isnan()
    assert torch.equal(normed[0, 1:], clean[1][0, 1:])
    assert torch.equal(pooled, clean[2])
    given = backward_arguments(kernels, given)
    grad_x, _, *learned = kernels.backward(*given)
    assert grad_x[0, 0].isnan().all()
    assert all(torch.isfinite(t).all() for t in (grad_x[0, 1:], grad_x[1], *learned))

    given = arguments(branch=False, layer_scale=False)
    given[0][0, 4, 0] = float("nan")  # a patch
    _, normed, pooled, _, _ = kernels.forward(*given)
    assert pooled[0].isnan().all()
    assert torch.isfinite(pooled[1]).all()
    grad_x, _, grad_matrix, *_ = kernels.backward(*backward_arguments(kernels, given))
    assert torch.isfinite(grad_x[1]).all()
    assert torch.isfinite(grad_x[0, :4]).all()
    assert grad_matrix[:, 3].isnan().all()
    assert torch.isfinite(grad_matrix[:, :3]).all()


def test_nan_in_the_gradient_leaves_prefix_tokens_alone(kernels):
    """Also where a prefix token would only be multiplied by 0."""
    given = backward_arguments(kernels, arguments(dim=136))
    given[3][0, 1, 130] = float("nan")
    grad_x, grad_branch, grad_matrix, grad_weight, grad_bias = kernels.backward(*given, wanted=(True, True))
    for grad in (grad_x, grad_branch):
        assert grad[0, 1:].isnan().all()
        assert torch.isfinite(grad[0, 0]).all()
        assert torch.isfinite(grad[1]).all()
    assert grad_matrix[1].isnan().all()
    assert torch.isfinite(grad_matrix[[0, 2]]).all()
    for grad in (grad_weight, grad_bias):
        assert grad[130].isnan()
        assert torch.isfinite(torch.cat([grad[:130], grad[131:]])).all()


# ---- what is refused


def test_what_contradicts_the_header_is_refused(kernels):
    given = arguments()

    def refused(code, message, change):
        arguments_, outputs = kernels.forward_arguments(*given)
        change(arguments_)
        status = kernels.launch("prompt_pool_forward", arguments_)
        assert (status.code, message in status.message.decode()) == (code, True), status.message
        assert all(output.isnan().all() for output in outputs)

    def set_size(name, value):
        return lambda a: setattr(a.sizes, name, value)

    refused(INVALID, "dtype must be float16 or bfloat16, got number 7", set_size("dtype", 7))
    refused(INVALID, "sizes must not be negative, got -1 images", set_size("batch", -1))
    refused(INVALID, "there must be a patch, got 0", set_size("patches", 0))
    refused(UNSUPPORTED, "tokens must have 8, 16, 24, ... channels, got 12", set_size("channels", 12))
    refused(UNSUPPORTED, "too large: 1099511627776 images", set_size("batch", 2**40))
    refused(UNSUPPORTED, "too large: 2 images, 1 + 1099511627776 tokens", set_size("patches", 2**40))
    for name in ("weight", "bias", "norm_bias", "normed", "pooled", "mean", "rstd", "total"):
        refused(INVALID, f"{name} must not be null", lambda a, name=name: setattr(a, name, None))
    refused(INVALID, "matrix must not be null", lambda a: setattr(a.matrix, "data", None))
    refused(INVALID, "x must not be null", lambda a: setattr(a.x, "data", None))
    refused(INVALID, "total must be null where branch is", lambda a: setattr(a.branch, "data", None))
    refused(INVALID, "norm_bias must be null where norm_weight is", lambda a: setattr(a, "norm_weight", None))
    for name in ("x", "branch"):
        for field in ("batch", "row"):
            message = f"every row of {name} must begin at a multiple of 16 bytes"
            refused(INVALID, message, lambda a, n=name, f=field: setattr(getattr(a, n), f, 12))
    for name in ("layer_scale", "weight", "bias", "norm_weight", "norm_bias", "normed", "pooled"):
        message = f"{name} must begin at a multiple of 16 bytes"
        refused(INVALID, message, lambda a, n=name: setattr(a, n, getattr(a, n) + 8))
    refused(INVALID, "x must begin at a multiple of 16", lambda a: setattr(a.x, "data", a.x.data + 2))


def test_what_contradicts_the_header_is_refused_in_the_backward(kernels):
    given = backward_arguments(kernels, arguments())

    def refused(message, change):
        arguments_, grads = kernels.backward_arguments(*given, wanted=(True, True))
        change(arguments_)
        status = kernels.launch("prompt_pool_backward", arguments_)
        assert (status.code, message in status.message.decode()) == (INVALID, True), status.message
        assert all(grad.isnan().all() for grad in grads)

    for name in ("weight", "bias", "mean", "rstd", "workspace", "grad_matrix", "grad_weight", "grad_bias"):
        refused(f"{name} must not be null", lambda a, n=name: setattr(a, n, None))
    for name in ("total", "grad_pooled"):
        refused(f"{name} must not be null", lambda a, n=name: setattr(getattr(a, n), "data", None))
    refused("matrix must not be null", lambda a: setattr(a.matrix, "data", None))
    for name in ("total", "grad_total", "grad_normed", "grad_pooled"):
        message = f"every row of {name} must begin at a multiple of 16 bytes"
        refused(message, lambda a, n=name: setattr(getattr(a, n), "row", 13))
    for name in ("layer_scale", "weight", "bias", "norm_weight", "workspace", "grad_x", "grad_branch"):
        message = f"{name} must begin at a multiple of 16 bytes"
        refused(message, lambda a, n=name: setattr(a, n, getattr(a, n) + 4))


# ---- bounds and races


@pytest.mark.full
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(
    "words",
    [
        (0, 1, 1, 1, 1, 1, 1, 9, 136, 3),
        (1, 1, 0, 0, 0, 2, 0, 1, 8, 35),
        (1, 0, 1, 0, 1, 2, 2, 33, 24, 3),
        (0, 0, 1, 1, 1, 1, 60, 6, 8, 129),
        (0, 1, 1, 0, 0, 3, 1, 20, 136, 17),
        (1, 1, 1, 1, 1, 5, 3, 13, 24, 35),
    ],
    ids=lambda words: "-".join(map(str, words)),
)
def test_no_stray_address_and_no_race(tmp_path_factory, sanitizer, words):
    sources = [*KERNELS, CSRC / "emulation" / "pool.cpp"]
    program = emulation.built(tmp_path_factory, f"pool-{sanitizer}", sources, *SANITIZERS[sanitizer])
    command = [program, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "finite\n", "")


def test_kernels_use_no_atomics():
    for file in (*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")):
        text = file.read_text()
        assert "atomic" not in text
        assert '"red.' not in text
