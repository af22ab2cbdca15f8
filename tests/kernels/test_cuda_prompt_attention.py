"""What prompt_attention's CUDA kernels compute and refuse, on a CPU (csrc/emulation); bounds and races."""

import itertools
import mmap
from functools import partial

import emulation
import pytest
import torch
from op_cases import (
    assert_policy,
    attention_case,
    attention_formula,
    layouts,
    packed_case,
    results,
)

from vapt_fast import BackendUnavailableError
from vapt_fast.functional import prompt_attention
from vapt_fast.ops.base import OPS
from vapt_fast.ops.prompt_attention import cuda
from vapt_fast.ops.prompt_attention.op import Arguments, Gradients

pytestmark = pytest.mark.usefixtures("on_emulation")
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
OP = OPS["prompt_attention"]
NAMES = Gradients._fields

# (B, Q, T, H, D, P): one and several tiles of queries and of keys, chunks of 16, 32 and 64.
SHAPES = [
    *itertools.product((1, 2), (1, 33), (1, 18), (2,), (8, 64), (1, 5)),
    *((1, 5, tokens, 1, 16, 7) for tokens in (8, 9, 10, 24, 25, 26, 41, 42, 56, 57, 58, 59, 121)),
    *((1, queries, 5, 1, 16, 1) for queries in (15, 16, 17, 32, 48, 49, 63, 64, 65, 127, 128, 129, 193)),
    *((1, 3, 3, 1, dim, 2) for dim in (24, 32, 40, 48, 56)),
    *((1, 6, 1, 1, 64, prompts) for prompts in (63, 64)),
    *((1, tokens, tokens, 1, 64, prompts) for tokens in (64, 65, 197) for prompts in (1, 50)),
    (1, 197, 197, 1, 64, 100),
    (1, 257, 257, 1, 64, 7),
    (1, 384, 320, 1, 8, 64),
    (1, 512, 319, 1, 8, 1),  # as many as fit
    # Wide heads: their own channels and zeros, one and several tiles of queries and of keys.
    *((1, 20, 30, 2, dim, 4) for dim in (72, 80, 88, 96, 104, 112, 120, 128)),
    *((1, queries, 30, 1, 80, 2) for queries in (1, 64, 65, 129)),
    *((2, 20, tokens, 1, 96, 7) for tokens in (1, 57, 58, 121, 122)),
    (1, 197, 197, 1, 80, 50),
    (1, 257, 257, 1, 128, 50),
    (1, 320, 319, 1, 72, 1),  # as many as fit
]


def arguments(dtype=torch.bfloat16, batch=2, queries=20, tokens=19, heads=2, dim=24, prompts=5, shared=False):
    torch.manual_seed(0)
    _, _, tensors, options = attention_case(batch, queries, tokens, heads, heads, dim, prompts, shared)
    return Arguments(*(t.to(dtype) for t in tensors), **options)


def forward(args):
    return OP.forward("cuda", args)


def backward(args, grad_out, needed=NAMES, out=None):
    saved = OP.save(args, forward(args) if out is None else out)
    return OP.backward("cuda", saved, (grad_out,), needed)


def forward_and_backward(args, grad_out=None):
    torch.manual_seed(1)
    grad_out = torch.randn(args.q.shape).to(args.q.dtype) if grad_out is None else grad_out
    return [*forward(args), *backward(args, grad_out)]


def assert_same(actual, expected):
    """The same bits."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


# ---- values and gradients


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, id=str(shape), marks=[pytest.mark.full] * (i % 2)) for i, shape in enumerate(SHAPES)],
)
def test_error_is_at_most_that_of_eager_pytorch(number):
    batch, queries, tokens, heads, dim, prompts = SHAPES[number]
    dtype = (torch.float16, torch.bfloat16)[number % 2]

    def cases():
        for seed in range(
            2 if queries * tokens > 2000 else 8
        ):  # the error of few numbers is a matter of luck
            torch.manual_seed(seed)
            case = attention_case(batch, queries, tokens, heads, heads, dim, prompts, shared=number % 3 == 0)
            yield *case[:3], {"scale": dim**-0.5}

    assert_policy(attention_case, cases(), dtype)


@HALF
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_error_over_twenty_seeds(dtype, scale):
    def cases():
        for seed in range(20):
            torch.manual_seed(seed)
            op, formula, tensors, options = attention_case(1, 30, 28, 1, 1, 32, 5)
            yield op, formula, [t * scale for t in tensors], options

    assert_policy(attention_case, cases(), dtype)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-40, 1e-3, 1.0])
def test_any_scale(scale):
    def cases():
        for seed in range(8):
            torch.manual_seed(seed)
            op, formula, tensors, _ = attention_case(1, 20, 60, 1, 1, 16, 9)
            yield op, formula, tensors, {"scale": scale}

    assert_policy(attention_case, cases(), torch.float16)


@HALF
def test_lse(dtype):
    args = arguments(dtype, tokens=90)
    keys = torch.cat([args.prompt_k, args.k], dim=1).double()
    scores = args.scale * torch.einsum("bqhd,bkhd->bhqk", args.q.double(), keys)
    expected = torch.logsumexp(scores, dim=-1) / torch.tensor(2.0).log()
    torch.testing.assert_close(forward(args).lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [-300.0, 300.0, 3e4])
def test_far_from_zero(offset):
    """Scores that exp would lose, and lse as large."""
    args = arguments(torch.bfloat16, batch=1, heads=1, dim=16, tokens=70)
    tensors = [t.clone() for t in args[:5]]
    for tensor in (tensors[1], tensors[3]):
        tensor[..., 0] = offset
    tensors[0][..., 0] = 1
    ours = results(partial(prompt_attention, scale=1.0), tensors, {})
    exact = results(attention_formula, [t.double() for t in tensors], {"scale": 1.0})
    assert all(t.isfinite().all() for t in itertools.chain(*ours))
    alone = backward(Arguments(*tensors, None, None, 1.0), torch.ones_like(args.q), ("q",))
    assert alone.q.isfinite().all()
    # Keys of this size round the gradients' sums: these are compared where that is not so.
    for actual, expected in ((ours[0][0], exact[0][0]), (ours[1][2], exact[1][2]), (ours[1][4], exact[1][4])):
        assert (actual - expected).abs().max() <= 0.02 * expected.abs().max()


def test_the_largest_score_comes_last():
    """Each chunk's scores are above those before, by more and by less than what is corrected at once."""
    for step in (0.5, 4.0, 40.0):
        args = arguments(torch.float16, batch=1, heads=1, dim=16, tokens=190, prompts=10)
        q, k, v, prompt_k, prompt_v = (t.clone() for t in args[:5])
        q[..., 0] = 1
        k[..., 0] = step * (torch.arange(190) // 32)[None, :, None]
        given = args._replace(q=q, k=k, scale=1.0)
        exact = attention_formula(*(t.double() for t in (q, k, v, prompt_k, prompt_v)), scale=1.0)
        assert (forward(given).out - exact).abs().max() <= 2e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "prompt_k"])
@pytest.mark.parametrize("dim", [24, 72])
def test_nan_and_infinity_reach_what_they_do_in_eager_pytorch(name, value, dim):
    args = arguments(batch=2, heads=2, tokens=70, dim=dim)
    tensor = getattr(args, name).clone()
    tensor[1, 1, 0, -1] = value
    given = args._replace(**{name: tensor})
    out = forward(given).out
    exact = attention_formula(*(t.double() for t in given[:5]), scale=args.scale)
    assert torch.equal(out.isfinite(), exact.isfinite())
    assert torch.equal(out[0], forward(args).out[0])


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 0},
        {"queries": 0},
        {"prompts": 0},
        {"prompts": 0, "queries": 197, "tokens": 197},
        {"tokens": 0},
        {"queries": 0, "dim": 80},
        {"prompts": 0, "dim": 80},
        {"tokens": 0, "dim": 80},
    ],
    ids=str,
)
def test_of_nothing(sizes):
    op, formula, tensors, options = attention_case(**{"prompts": 3, "dim": 64} | sizes)
    expected = results(formula, tensors, options)
    actual = results(op, [t.half() for t in tensors], options)
    for ours, exact in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert ours.shape == exact.shape
        assert not exact.numel() or (ours - exact).abs().max() <= 0.01 * exact.abs().max()


def test_prompts_of_all_images():
    """The same as those of each; their gradient is the sum."""
    args = arguments(torch.float16, shared=True, batch=3)
    grad_out = torch.randn(args.q.shape).half()
    each = args._replace(prompt_k=args.prompt_k.repeat(3, 1, 1, 1), prompt_v=args.prompt_v.repeat(3, 1, 1, 1))
    assert_same(forward(args), forward(each))
    ours, expected = backward(args, grad_out), backward(each, grad_out)
    assert_same(ours[:3], expected[:3])
    for grad, images in zip(ours[3:], expected[3:], strict=True):
        assert torch.equal(grad, images.sum(dim=0, keepdim=True))


@pytest.mark.parametrize(
    "needed",
    [("q",), ("k", "v"), ("prompt_k", "prompt_v"), ("q", "k", "v"), ("q", "prompt_k", "prompt_v"), NAMES[1:]],
    ids=str,
)
@pytest.mark.parametrize(("prompts", "dim"), [(5, 24), (70, 24), (70, 72)])
def test_only_what_is_needed(needed, prompts, dim):
    args = arguments(tokens=70, queries=70, batch=1, prompts=prompts, dim=dim)
    grad_out = torch.randn(args.q.shape).bfloat16()
    everything = backward(args, grad_out)
    grads = backward(args, grad_out, needed)
    for name in NAMES:
        grad = getattr(grads, name)
        assert (grad is not None) == (name in needed)
        assert grad is None or torch.equal(grad, getattr(everything, name))


@HALF
def test_opcheck(dtype):
    args = arguments(dtype)
    grad_out, saved = torch.randn(args.q.shape).to(dtype), OP.save(args, forward(args))
    needed = [name in NAMES for name in Arguments._fields]
    backward_op = torch.ops.vapt_fast.prompt_attention_backward.default
    torch.library.opcheck(backward_op, (grad_out, *saved, needed, "cuda"))
    leaves = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(OP.library_op, (*leaves, "cuda"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    def attention(*tensors):
        return prompt_attention(*tensors, scale=0.3)

    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 9):
        tensors = arguments(tokens=tokens)[:5]
        assert torch.equal(compiled(*tensors), attention(*tensors))


# ---- the same bits


def test_an_image_does_not_depend_on_the_others():
    args = arguments(batch=3)
    grad_out = torch.randn(args.q.shape).bfloat16()
    alone = args._replace(**{name: getattr(args, name)[2:] for name in NAMES})
    everything = forward_and_backward(args, grad_out)
    assert_same(forward_and_backward(alone, grad_out[2:]), [t[2:] for t in everything])


@pytest.mark.parametrize("shared", [False, True])
def test_views_of_packed_tensors(shared, launching):
    op, formula, tensors, options = packed_case(2, 20, 2, 2, 16, 5, shared)
    tensors = [t.half() for t in tensors]
    with launching() as launches:
        packed = results(op, tensors, options)
    assert [name for name, _ in launches] == ["prompt_attention_forward", "prompt_attention_backward"]
    _, given = launches[0]
    assert given["k"][0] - given["q"][0] == 2 * 16 * 2  # nothing was copied
    assert given["q"][1:] == (20 * 96, 96, 16)
    separate = results(partial(formula, attention=prompt_attention), tensors, options)
    assert_same(itertools.chain(*packed), itertools.chain(*separate))


def same_values(tensor):
    """``tensor`` in other layouts, some of which the kernels read as they are; one repeats an image."""
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"), dtype=tensor.dtype)
    padded[..., 8:] = tensor
    yield tensor, padded[..., 8:]
    for _, same in layouts(tensor):
        yield tensor, same
    for dims in ((0, 1), (1, 2)):
        yield tensor, tensor.transpose(*dims).contiguous().transpose(*dims)
    repeated = tensor[:1, :1, :1].expand_as(tensor)
    yield repeated.contiguous(), repeated


@pytest.mark.full
def test_layouts_make_no_difference():
    args = arguments()
    grad_out = torch.randn(args.q.shape).bfloat16()
    for name in NAMES:
        for pair in same_values(getattr(args, name)):
            contiguous, same = (args._replace(**{name: tensor}) for tensor in pair)
            out = forward(contiguous)
            assert_same(forward(same), out)
            assert_same(backward(same, grad_out, out=out), backward(contiguous, grad_out, out=out))
    for pair in same_values(grad_out):
        assert_same(*(backward(args, same) for same in pair))


@pytest.mark.parametrize("dim", [8, 72])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(axis, dim):
    pages = mmap.mmap(-1, 4 * (2**31 + 2**24))  # only those that are written take any memory
    memory = torch.frombuffer(pages, dtype=torch.float16)
    places = iter(range(0, 2**22, 2**14))

    def apart(tensor):
        strides = [64 * dim, 8 * dim, dim, 1]
        strides[axis] = 2**31 + 64
        return memory[next(places) :].as_strided(tensor.shape, strides).copy_(tensor)

    args = arguments(torch.float16, batch=2, queries=2, tokens=2, prompts=2, heads=2, dim=dim)
    grad_out = torch.randn(args.q.shape).half()
    expected = forward_and_backward(args, grad_out)
    far = args._replace(**{name: apart(getattr(args, name)) for name in NAMES})
    assert_same(forward_and_backward(far, apart(grad_out)), expected)
    grads = Gradients(*(apart(torch.zeros_like(t)) for t in args[:5]))
    cuda.backward(OP.save(args, forward(args)), (grad_out,), grads)
    assert_same(grads, expected[2:])


# ---- what is refused


@pytest.mark.parametrize(
    ("reason", "sizes"),
    [
        (
            "all tensors must be of one dtype, float16 or bfloat16, got torch.float32",
            {"dtype": torch.float32},
        ),
        ("heads must have 8, 16, 24, ... or 128 channels, got 12", {"dim": 12}),
        ("heads must have 8, 16, 24, ... or 128 channels, got 136", {"dim": 136}),
        ("there must be a key, got no prompt and no token", {"tokens": 0, "prompts": 0}),
        ("512 queries and 321 keys don't fit in shared memory", {"queries": 512, "tokens": 316}),
        ("321 queries and 24 keys don't fit in shared memory", {"queries": 321, "dim": 72}),
        ("20 queries and 321 keys don't fit in shared memory", {"tokens": 316, "dim": 128}),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_refused(reason, sizes):
    args = arguments(**sizes)
    with pytest.raises(
        BackendUnavailableError, match=rf"prompt_attention can't run on backend 'cuda': {reason}"
    ):
        prompt_attention(*args[:5], scale=args.scale)


def test_biases_lengths_and_grouped_queries_are_refused():
    args = arguments()
    with pytest.raises(BackendUnavailableError, match="it has no bias, got one"):
        prompt_attention(*args[:5], scale=1.0, bias=torch.zeros(1, 2, 20, 19))
    with pytest.raises(BackendUnavailableError, match="it has no prompt_lengths, got some"):
        prompt_attention(*args[:5], scale=1.0, prompt_lengths=torch.tensor([1, 2]))
    grouped = (args.q, *(t[:, :, :1] for t in args[1:5]))
    with pytest.raises(BackendUnavailableError, match="k must have q's 2 heads, got 1"):
        prompt_attention(*grouped, scale=1.0)


@pytest.mark.parametrize(
    ("message", "value", "names"),
    [
        ("{} must not be null", None, "q k v prompt_k prompt_v out"),
        ("{} must begin at a multiple of 16 bytes", (8, 960, 48, 24), "q k v prompt_k prompt_v out"),
        ("every row of {} must begin at a multiple of 16 bytes", (16, 960, 52, 24), "q k v prompt_k"),
        ("every row of {} must begin at a multiple of 16 bytes", (16, 961, 48, 24), "q k v prompt_v"),
        ("every row of {} must begin at a multiple of 16 bytes", (16, 960, 48, 25), "q k v out"),
        ("lse must begin at a multiple of 4 bytes", 6, "lse"),
        ("lse must not be null", 0, "lse"),
        ("channels must be 8, 16, 24, ... or 128, got 12", 12, "channels"),
        ("769 queries and 24 keys of 24 channels don't fit in shared memory", 769, "queries"),
        ("321 queries and 24 keys of 72 channels", {"queries": 321, "channels": 72}, "queries"),
        ("20 queries and 321 keys of 128 channels", {"tokens": 316, "channels": 128}, "queries"),
        ("there must be a key", 0, "tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_what_contradicts_the_header_is_refused(launching, op, message, value, names):
    args = arguments(prompts=0 if names == "tokens" else 5)
    saved, grad_out = OP.save(args, forward(args)), torch.zeros_like(args.q)
    error = NotImplementedError if names in ("channels", "queries") else ValueError
    for name in names.split():
        out, grads = OP.allocate(args), OP.allocate_gradients(saved, NAMES)
        message_of = rf"prompt_attention_{op}\(dtype=bfloat16, batch=2, .*\): " + message.format(name)
        changes = value if isinstance(value, dict) else {name: value}
        with launching(**changes), pytest.raises(error, match=message_of):
            cuda.forward(args, out) if op == "forward" else cuda.backward(saved, (grad_out,), grads)
        written = out if op == "forward" else grads
        assert all(t.isnan().all() for t in written)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_come_in_pairs(launching, name):
    args = arguments()
    saved = OP.save(args, forward(args))
    grads = OP.allocate_gradients(saved, NAMES)
    message = f"the gradient of {name} must begin at a multiple of 16 bytes"
    with launching(**{f"grad_{name}": (8, 0, 0, 0)}), pytest.raises(ValueError, match=message):
        cuda.backward(saved, (torch.zeros_like(args.q),), grads)
    if name != "q":
        message = f"the gradient of {name} must not be null"
        with launching(**{f"grad_{name}": None}), pytest.raises(ValueError, match=message):
            cuda.backward(saved, (torch.zeros_like(args.q),), grads)


# ---- bounds and races


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"queries": 70, "tokens": 75, "prompts": 50, "dim": 64, "batch": 1},
        {"queries": 1, "tokens": 1, "prompts": 0, "dim": 8},
        {"queries": 150, "tokens": 30, "prompts": 1, "heads": 1, "shared": True},
        {"queries": 130, "tokens": 99, "prompts": 30, "heads": 1, "dim": 72, "batch": 1},
    ],
    ids=str,
)
def test_a_step_is_finite(sizes):
    """On tensors that end where their memory ends: also what runs under sanitizers."""
    assert all(t.isfinite().all() for t in forward_and_backward(arguments(torch.float16, **sizes)))


@pytest.mark.full
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_stray_address_and_no_race(sanitizer):
    tests = f"{__file__}::{test_a_step_is_finite.__name__}"
    ran = emulation.run_sanitized(sanitizer, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", tests)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "5 passed" in ran.stdout
