"""What prompt_pool's CUDA kernels compute and refuse, on a CPU (csrc/emulation); bounds and races."""

import itertools
import mmap
from typing import NamedTuple

import emulation
import pytest
import torch
from op_cases import assert_policy, assert_same_results, layouts, pool_case, results

from vapt_fast.ops.base import OPS
from vapt_fast.ops.prompt_pool import cuda
from vapt_fast.ops.prompt_pool.op import Arguments

pytestmark = pytest.mark.usefixtures("on_emulation")
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
OP = OPS["prompt_pool"]

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


class Incoming(NamedTuple):
    """Gradients of the op's results."""

    total: torch.Tensor
    normed: torch.Tensor
    pooled: torch.Tensor


def arguments(
    dtype=torch.bfloat16,
    tokens=None,
    batch=2,
    prefix=1,
    patches=9,
    dim=24,
    rows=3,
    branch=True,
    layer_scale=True,
    affine=True,
):
    """x in dtype ``tokens``; norm_weight is zero in some channels."""
    torch.manual_seed(0)
    x, added = (torch.randn(batch, prefix + patches, dim).to(dtype) for _ in range(2))
    learned = [torch.randn(rows, patches), torch.randn(dim), torch.randn(dim)]
    scale = torch.randn(dim) if branch and layer_scale else None
    norm_weight, norm_bias = torch.randn(2, dim, generator=torch.Generator().manual_seed(1))
    norm_weight[1::3] = 0
    norm = (norm_weight, norm_bias) if affine else (None, None)
    x = x if tokens is None else x.to(tokens)
    return Arguments(x, added if branch else None, scale, *learned, *norm, prefix, 1e-6, 1e-5, dtype)


def forward(args):
    return OP.forward("cuda", args)


def backward_inputs(args):
    """The incoming gradients, and what a forward pass has saved."""
    outputs = forward(args)
    grads = (torch.randn(t.shape).to(t.dtype) for t in (args.x, outputs.normed, outputs.pooled))
    return Incoming(*grads), OP.save(args, outputs)


def backward(incoming, saved):
    needed = [name for name in OP.differentiable if name != "branch" or saved.branch_dtype is not None]
    return OP.backward("cuda", saved, incoming, needed)


def forward_and_backward(args):
    return [forward(args), backward(*backward_inputs(args))]


def assert_same(actual, expected):
    """The same bits."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


# ---- values and gradients


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_error_is_at_most_that_of_eager_pytorch(passes, number):
    *_, patches, _, rows = SHAPES[number]
    # Dtypes and arguments take turns.
    dtype = (torch.float16, torch.bfloat16)[(number + passes) % 2]
    options = (number % 3 > 0, number % 3 > 1, number % 4 > 0)  # branch, layer_scale, affine

    def cases():
        for seed in range(3 if rows * patches > 16 else 12):  # the error of few numbers is a matter of luck
            torch.manual_seed(seed)
            yield pool_case(*SHAPES[number], *options)

    assert_policy(pool_case, cases(), dtype)


@HALF
@pytest.mark.parametrize(
    ("scale", "sizes"),
    [
        (1.0, {"dim": 32}),
        (5.0, {"dim": 32}),
        (2e-3, {"dim": 24, "patches": 33, "layer_scale": False}),  # a variance of both eps's size
    ],
)
def test_error_over_twenty_seeds(passes, dtype, scale, sizes):
    def cases():
        for seed in range(20):
            torch.manual_seed(seed)
            op, formula, (x, *learned, branch), options = pool_case(**{"prefix": 1} | sizes)
            if scale > 1:
                learned = [t * scale for t in learned]
            yield op, formula, [x * scale, *learned, branch * scale], options

    assert_policy(pool_case, cases(), dtype)


@HALF
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("options", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
def test_float32_tokens_under_autocast(passes, dtype, offset, options):
    """Their sum is exact, their statistics are float32, and the rest is at least as good as in 16 bits."""
    torch.manual_seed(0)
    op, formula, (x, *learned), frozen = pool_case(2, 1, 33, 136, 35, *options)
    tensors = [(x + offset).float(), *(t.float() for t in learned[:3]), *(t.to(dtype) for t in learned[3:])]
    exact = results(formula, [t.double() for t in tensors], frozen)
    with torch.autocast("cpu", dtype):
        ours = results(op, tensors, frozen)
        assert [t.dtype for t in ours[0]] == [torch.float32, dtype, torch.float32]
    eps = [torch.finfo(t.dtype).eps for t in itertools.chain(*ours)]
    # What passes through a product with the matrix is rounded to tf32: normed, sums and all gradients.
    eps[1:] = [max(e, 2**-10) for e in eps[1:]]
    for actual, expected, e in zip(itertools.chain(*ours), itertools.chain(*exact), eps, strict=True):
        assert (actual - expected).abs().max() <= 2 * e * expected.abs().max()


@HALF
@pytest.mark.parametrize("tokens", [None, torch.float32], ids=str)
def test_total_and_normed_are_rounded_once(passes, dtype, tokens):
    args = arguments(dtype, tokens)
    out = forward(args)
    total = args.x.float() + args.layer_scale * args.branch.float()
    assert torch.equal(out.total, total.to(args.x.dtype))
    x_hat = (out.total.float() - out.mean[..., None]) * out.rstd[..., None]
    assert torch.equal(out.normed, (x_hat * args.norm_weight + args.norm_bias).to(dtype))


def test_many_images_share_a_chunk(passes):
    """More blocks than fill a device: then a block adds the images of a chunk before the chunks are added."""
    torch.manual_seed(0)
    assert_policy(pool_case, [pool_case(520, 0, 1, 8, 1)], torch.float16)


def test_what_is_pooled_is_without_the_affine_of_the_norm(passes):
    """Also where that is zero: then normed is its bias, and no gradient comes from it."""
    args, plain = arguments(dim=136), arguments(dim=136, affine=False)
    ours, expected = forward(args), forward(plain)
    assert_same(ours._replace(normed=None), expected._replace(normed=None))
    assert torch.equal(ours.normed[..., 1::3], args.norm_bias[1::3].bfloat16().expand(2, 10, -1))
    incoming, saved = backward_inputs(args)
    expected = backward(incoming, saved)
    incoming.normed[..., 1::3] = 1e3
    assert_same(backward(incoming, saved), expected)


def test_constant_rows(passes):
    """Variance 0: rstd is 1000, nothing is NaN."""
    args = arguments(branch=False, affine=False)
    args.x[:, 3] = 7.0
    out = forward(args)
    assert torch.all(out.mean[:, 3] == 7)
    assert not out.normed[:, 3].any()
    torch.testing.assert_close(out.rstd[:, 3], torch.full((2,), 1e3))
    assert torch.isfinite(out.pooled).all()


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"batch": 0}], ids=str)
def test_of_nothing(passes, sizes):
    op, formula, tensors, options = pool_case(**{"prefix": 1, "dim": 24} | sizes)
    expected = results(formula, [t.double() for t in tensors], options)
    tensors = [t.to(torch.float32 if 0 < i < 4 else torch.bfloat16) for i, t in enumerate(tensors)]
    for ours, theirs in zip(
        itertools.chain(*results(op, tensors, options)), itertools.chain(*expected), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.05)


def test_absent_gradients_and_factors(passes, launching):
    args = arguments()
    ones, zeros = torch.ones(24), torch.zeros(24)
    explicit = args._replace(layer_scale=ones, norm_weight=ones, norm_bias=zeros)
    absent = args._replace(layer_scale=None, norm_weight=None, norm_bias=None)
    assert_same(forward(absent), forward(explicit))
    incoming, saved = backward_inputs(args)
    zero = {"total": torch.zeros_like(incoming.total), "normed": torch.zeros_like(incoming.normed)}
    for absent, given, kept in (
        ({"layer_scale": 0}, {}, {"layer_scale": ones}),
        ({"norm_weight": 0}, {}, {"norm_weight": ones}),
        ({"grad_total": None}, {"total": zero["total"]}, {}),
        ({"grad_normed": None}, {"normed": zero["normed"]}, {}),
    ):
        with launching(**absent):
            actual = backward(incoming, saved)
        assert_same(actual, backward(incoming._replace(**given), saved._replace(**kept)))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_opcheck(branch, affine):
    args = arguments(branch=branch, affine=affine)
    needed = [name in OP.differentiable and getattr(args, name) is not None for name in args._fields]
    incoming, saved = backward_inputs(args)
    backward_op = torch.ops.vapt_fast.prompt_pool_backward.default
    torch.library.opcheck(backward_op, (*incoming, *saved, needed, "cuda"))
    leaves = [t.requires_grad_() if need else t for t, need in zip(args, needed, strict=True)]
    torch.library.opcheck(OP.library_op, (*leaves, "cuda"))


# ---- the same bits


def test_an_image_does_not_depend_on_the_others(passes):
    args = arguments(batch=3, dim=136)
    outputs = forward(args)
    alone = forward(args._replace(x=args.x[2:], branch=args.branch[2:]))
    assert_same(alone[:5], [t[2:] for t in outputs[:5]])
    incoming, saved = backward_inputs(args)
    grads = backward(incoming, saved)
    saved = saved._replace(**{name: getattr(saved, name)[2:].clone() for name in ("total", "mean", "rstd")})
    alone = backward(Incoming(*(t[2:].clone() for t in incoming)), saved)
    assert_same(alone[:2], [t[2:] for t in grads[:2]])


def same_values(tensor):
    """``tensor`` in other layouts, some of which the kernels read as they are; one repeats an image."""
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"), dtype=tensor.dtype)
    padded[..., 8:] = tensor
    yield tensor, padded[..., 8:]
    for _, same in layouts(tensor):
        yield tensor, same
    if tensor.ndim == 3:
        yield tensor, tensor.transpose(0, 1).contiguous().transpose(0, 1)
        repeated = tensor[:1, :1].expand_as(tensor)
        yield repeated.contiguous(), repeated


def test_layouts_make_no_difference(passes):
    args = arguments()
    for name in ("x", "branch", "matrix"):
        for pair in same_values(getattr(args, name)):
            assert_same(*(forward(args._replace(**{name: same})) for same in pair))
    incoming, saved = backward_inputs(args)
    for name in ("total", "normed", "pooled"):
        for pair in same_values(getattr(incoming, name)):
            assert_same(*(backward(incoming._replace(**{name: same}), saved) for same in pair))
    for name in ("total", "matrix"):
        for pair in same_values(getattr(saved, name)):
            assert_same(*(backward(incoming, saved._replace(**{name: same})) for same in pair))


@pytest.mark.parametrize("strides", [(2**31 + 64, 8, 1), (64, 2**31 + 64, 1)], ids=str)
def test_offsets_beyond_32_bits(passes, strides):
    pages = mmap.mmap(-1, 4 * (2**31 + 2**24))  # only those that are written take any memory
    memory = torch.frombuffer(pages, dtype=torch.float32)

    def apart(arguments, *names):
        for i, name in enumerate(names):
            tensor = getattr(arguments, name)
            view = memory.view(tensor.dtype)[2**14 * i :].as_strided(tensor.shape, strides[-tensor.ndim :])
            arguments = arguments._replace(**{name: view.copy_(tensor)})
        return arguments

    args = arguments(prefix=1, patches=1, dim=8, rows=2)
    assert_same(forward(apart(args, "x", "branch", "matrix")), forward(args))
    incoming, saved = backward_inputs(args)
    expected = backward(incoming, saved)
    assert_same(backward(apart(incoming, "total", "normed", "pooled"), saved), expected)
    assert_same(backward(incoming, apart(saved, "total", "matrix")), expected)


# ---- one pass or two


def in_both(monkeypatch, function):
    for one_pass in (True, False):
        monkeypatch.setattr(cuda, "ONE_PASS", one_pass)
        yield function()


@pytest.mark.parametrize("limits", [{"shared_memory": 30 * 1024}, {"clusters": 0}], ids=str)
def test_clusters_only_where_they_fit(monkeypatch, limits):
    """Too little shared memory or too many channels for a cluster: in two passes, with the same result."""
    args = arguments(patches=40, dim=264)
    args.x.add_(3)
    in_one, in_two = in_both(monkeypatch, lambda: forward(args))
    assert not torch.equal(
        in_one.rstd, in_two.rstd
    )  # sums in another order: one can tell which way was taken
    monkeypatch.setattr(cuda, "ONE_PASS", True)
    with emulation.device(**limits):
        assert_same(forward(args), in_two)


def test_fewer_long_tokens_are_normalised_at_once(monkeypatch):
    """Those of 8,192 bytes, where there is no room for eight of them."""
    monkeypatch.setattr(cuda, "ONE_PASS", False)
    args = arguments(tokens=torch.float32, dim=2048, branch=False)
    expected = forward(args)
    with emulation.device(shared_memory=30 * 1024):
        assert_same(forward(args), expected)


@pytest.mark.parametrize(
    ("sizes", "limits"),
    [
        ({"rows": 65}, {}),
        ({"patches": 256, "dim": 8}, {}),
        ({"dim": 1032}, {}),
        ({"dim": 136, "patches": 99, "rows": 50}, {"shared_memory": 100 * 1024}),
        ({"dim": 136}, {"clusters": 0}),
    ],
    ids=str,
)
def test_clusters_only_where_they_fit_in_the_backward(monkeypatch, sizes, limits):
    inputs = backward_inputs(arguments(**sizes))
    with emulation.device(**limits):
        assert_same(*in_both(monkeypatch, lambda: backward(*inputs)))


@HALF
@pytest.mark.parametrize("tokens", [torch.float32, None], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 64},
        {"patches": 220, "dim": 8},
        {"dim": 1024},
        {"batch": 5, "dim": 136, "rows": 10},
    ],
    ids=str,
)
def test_both_ways_of_the_backward_agree(monkeypatch, sizes, dtype, tokens):
    inputs = backward_inputs(arguments(dtype, tokens, **sizes))
    in_one, in_two = in_both(monkeypatch, lambda: backward(*inputs))
    # In one pass the sums of the matrix's rows, which make the gradient of bias, aren't rounded to tf32.
    assert not torch.equal(in_one.affine[1], in_two.affine[1])
    for actual, expected in zip(in_one, in_two, strict=True):
        eps = max(torch.finfo(actual.dtype).eps, 2**-10)  # tf32's
        torch.testing.assert_close(actual, expected, rtol=0, atol=eps * expected.abs().max().item())


def test_chunks_of_images_change_no_image():
    inputs = backward_inputs(arguments(batch=5, dim=136, patches=20, rows=35))
    ways = []
    for clusters in (1, 2, 3, 100):
        with emulation.device(clusters=clusters):
            ways.append(backward(*inputs))
    for grads in ways[1:]:
        assert_same(grads[:2], ways[0][:2])
        assert_same_results([grads[2:]], [ways[0][2:]], 1e-5)
    # Their sums are in other orders: in chunks of 5, of 3 and 2, of 2, 2 and 1, and one by one.
    for one, another in itertools.combinations(ways, 2):
        assert not torch.equal(one.matrix, another.matrix)


def test_rows_of_a_matrix_lie_in_different_banks(passes):
    emulation.emulator().bank_conflicts()
    for rows in (3, 35, 70):
        forward_and_backward(arguments(patches=70, dim=136, rows=rows))
    assert emulation.emulator().bank_conflicts() == 0


# ---- NaN


def test_nan_stays_in_its_image_and_a_prefix_token_out_of_what_is_pooled(passes):
    args = arguments(branch=False)
    clean = forward(args)
    args.x[0, 0, 0] = float("nan")  # a prefix token
    out = forward(args)
    assert out.normed[0, 0].isnan().all()
    assert out.rstd[0, 0].isnan()
    assert torch.equal(out.normed[0, 1:], clean.normed[0, 1:])
    assert torch.equal(out.pooled, clean.pooled)
    grads = backward(*backward_inputs(args))
    assert grads.x[0, 0].isnan().all()
    assert all(torch.isfinite(t).all() for t in (grads.x[0, 1:], grads.x[1], grads.matrix, grads.affine))

    args = arguments(branch=False)
    args.x[0, 4, 0] = float("nan")  # a patch
    out = forward(args)
    assert out.pooled[0].isnan().all()
    assert torch.isfinite(out.pooled[1]).all()
    grads = backward(*backward_inputs(args))
    assert torch.isfinite(grads.x[1]).all()
    assert torch.isfinite(grads.x[0, :4]).all()
    assert grads.matrix[:, 3].isnan().all()
    assert torch.isfinite(grads.matrix[:, :3]).all()


def test_nan_in_the_gradient_leaves_prefix_tokens_alone(passes):
    """Also where a prefix token would only be multiplied by 0."""
    incoming, saved = backward_inputs(arguments(dim=136))
    incoming.pooled[0, 1, 130] = float("nan")
    grads = backward(incoming, saved)
    for grad in grads[:2]:
        assert grad[0, 1:].isnan().all()
        assert torch.isfinite(grad[0, 0]).all()
        assert torch.isfinite(grad[1]).all()
    assert grads.matrix[1].isnan().all()
    assert torch.isfinite(grads.matrix[[0, 2]]).all()
    assert grads.affine[:, 130].isnan().all()
    assert torch.isfinite(grads.affine[:, :130]).all()
    assert torch.isfinite(grads.affine[:, 131:]).all()


# ---- what is refused


def sizes(**changes):
    given = {"dtype": "bfloat16", "float32_tokens": False, "batch": 2, "prefix": 1, "patches": 9}
    return emulation.module().PromptPoolSizes(**given | {"channels": 24, "rows": 3} | changes)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "sizes must not be negative, got -1 images", {"batch": -1}),
        (ValueError, "there must be a patch, got 0", {"patches": 0}),
        (NotImplementedError, "8, 16, 24, ... channels, got 12", {"channels": 12}),
        (NotImplementedError, "too large: 1099511627776 images", {"batch": 2**40}),
        (NotImplementedError, "2 images, 1 [+] 1099511627776 tokens", {"patches": 2**40}),
        (ValueError, "dtype must be float16 or bfloat16, got float32", {"dtype": "float32"}),
    ],
    ids=str,
)
def test_sizes_that_are_refused(launching, error, message, changes):
    with pytest.raises(error, match=message), launching(sizes=sizes(**changes)):
        forward(arguments())


NULL = "{} must not be null"
ROW = "every row of {} must begin at a multiple of 16 bytes"
BEGIN = "{} must begin at a multiple of 16 bytes"


@pytest.mark.parametrize(
    ("op", "message", "value", "names"),
    [
        ("forward", NULL, None, "x matrix"),
        ("forward", NULL, 0, "weight bias norm_bias normed pooled mean rstd total"),
        ("forward", ROW, (64, 12, 24), "x branch"),
        ("forward", ROW, (64, 240, 12), "x branch"),
        ("forward", BEGIN, (66, 240, 24), "x branch"),
        ("forward", BEGIN, 8, "layer_scale weight bias norm_weight norm_bias normed pooled"),
        ("forward", "total must be null where {} is", None, "branch"),
        ("forward", "norm_bias must be null where {} is", 0, "norm_weight"),
        ("backward", NULL, None, "total grad_pooled matrix"),
        ("backward", NULL, 0, "weight bias mean rstd workspace grad_matrix grad_weight grad_bias"),
        ("backward", ROW, (64, 240, 13), "total grad_total grad_normed grad_pooled"),
        ("backward", BEGIN, 4, "layer_scale weight bias norm_weight workspace grad_x grad_branch"),
    ],
    ids=str,
)
def test_what_contradicts_the_header_is_refused(launching, op, message, value, names):
    args = arguments()
    incoming, saved = backward_inputs(args)
    call = rf"prompt_pool_{op}\(dtype=bfloat16, float32_tokens=False, batch=2, .*rows=3\): "
    for name in names.split():
        out, grads = OP.allocate(args, "cuda"), OP.allocate_gradients(saved, OP.differentiable)
        with launching(**{name: value}), pytest.raises(ValueError, match=call + message.format(name)):
            cuda.forward(args, out) if op == "forward" else cuda.backward(saved, incoming, grads)
        assert all(written.isnan().all() for written in (*out, *grads))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("x has the wrong type: [(]16, 8[)]", {"x": (16, 8)}),
        ("x has the wrong type: 16", {"x": 16}),
        ("eps has the wrong type: None", {"eps": None}),
        ("an argument is unknown", {"y": 0}),
    ],
    ids=str,
)
def test_keywords_that_are_refused(launching, message, changes):
    with launching(**changes), pytest.raises(TypeError, match=f"prompt_pool_forward: {message}"):
        forward(arguments())
    with pytest.raises(TypeError, match="prompt_pool_forward: eps is missing"):
        emulation.module().prompt_pool_forward(sizes=sizes())


# ---- bounds and races


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (1, 1, 9, 136, 3)),
        ({"tokens": torch.float32, "branch": False, "affine": False}, (2, 0, 1, 8, 35)),
        ({"tokens": torch.float32, "layer_scale": False}, (2, 2, 33, 24, 3)),
        ({}, (1, 60, 6, 8, 129)),
        ({"layer_scale": False, "affine": False}, (3, 1, 20, 136, 17)),
        ({"tokens": torch.float32}, (5, 3, 13, 24, 35)),
    ],
    ids=str,
)
def test_a_step_is_finite(passes, options, shape):
    """On tensors that end where their memory ends: also what runs under sanitizers."""
    shape = dict(zip(("batch", "prefix", "patches", "dim", "rows"), shape, strict=True))
    outputs, grads = forward_and_backward(arguments(torch.float16, **options, **shape))
    assert all(t.isfinite().all() for t in (*outputs, *grads) if t is not None)


@pytest.mark.full
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_stray_address_and_no_race(sanitizer):
    tests = f"{__file__}::{test_a_step_is_finite.__name__}"
    ran = emulation.run_sanitized(sanitizer, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", tests)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "12 passed" in ran.stdout
