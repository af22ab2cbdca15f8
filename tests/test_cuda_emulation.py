"""prompt_attention's CUDA kernels on a CPU: values, bounds and races; and the emulation itself."""

import random
import subprocess
from ctypes import byref, c_int64, c_void_p

import emulation
import pytest
import torch
import torch.nn.functional as F
from emulation import CSRC, GRADS, INPUTS, INVALID, OK, UNSUPPORTED, Kernels, Tensor4
from ops import assert_policy, attention_case, attention_formula

EMULATION = CSRC / "emulation"
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SANITIZERS = {
    # Without optimisation it compiles in a fifth of the time.
    "address,undefined": ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    sources = [CSRC / "prompt_attention.cu", EMULATION / "exports.cpp"]
    return emulation.built(tmp_path_factory, "attention.so", sources, "-shared")


@pytest.fixture
def kernels(library):
    return Kernels(library)


# ---- values


def random_sizes(count):
    """Sizes around those of tiles and steps."""
    choose = random.Random(0)
    for _ in range(count):
        heads, groups = choose.choice([(1, 1), (2, 2), (2, 1), (3, 1), (4, 2)])
        yield {
            "batch": choose.choice([1, 1, 2]),
            "queries": choose.choice([1, 5, 15, 16, 17, 31, 32, 33, 50]),
            "tokens": choose.choice([2, 7, 15, 16, 17, 33, 64]),
            "heads": heads,
            "groups": groups,
            "dim": choose.choice([8, 16, 24, 32, 40, 64, 72, 80, 88, 96, 104, 128]),
            "prompts": choose.choice([0, 1, 5, 10, 16, 17]),
            "shared": choose.choice([False, True]),
        }


CASES = [
    *random_sizes(64),
    *({"batch": 1, "heads": 1, "groups": 1, "tokens": 40, "dim": dim} for dim in (32, 64, 80, 96, 128)),
    # As a ViT-B/16 with 50 prompts, and with so many keys that they take several passes.
    {"batch": 1, "queries": 197, "tokens": 197, "heads": 1, "groups": 1, "dim": 64, "prompts": 50},
    {"batch": 1, "queries": 34, "tokens": 290, "heads": 2, "groups": 1, "dim": 64, "prompts": 110},
    {"batch": 1, "queries": 17, "tokens": 257, "heads": 1, "groups": 1, "dim": 80, "prompts": 10},
    {"batch": 1, "queries": 17, "tokens": 10, "heads": 1, "groups": 1, "dim": 64, "prompts": 150},
    {"batch": 1, "queries": 5, "tokens": 300, "heads": 1, "groups": 1, "dim": 128, "prompts": 70},
]


def case(seed=0, **sizes):
    torch.manual_seed(seed)
    return attention_case(**{"batch": 1, "heads": 1, "groups": 1, "dim": 32} | sizes)


def sdpa(q, *tensors, scale, bias=None):
    """The formula as anyone would run it, also with grouped queries; prompts may be left out."""
    k, v, *prompts = tensors
    keys, values = (
        torch.cat([*(p.expand(q.shape[0], -1, -1, -1) for p in prompts[i : i + 1]), t], dim=1)
        .repeat_interleave(q.shape[2] // t.shape[2], dim=2)
        .transpose(1, 2)
        for i, t in enumerate((k, v))
    )
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, scale=scale).transpose(1, 2)


@DTYPES
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_error_is_at_most_that_of_eager_pytorch(kernels, sizes, dtype):
    _, _, tensors, options = case(**sizes)
    # Where one key takes nearly all, one rounding of the output decides both errors: that takes many seeds.
    options["scale"] = tensors[0].shape[-1] ** -0.5
    if sizes.get("prompts") == 0:  # nothing to compare of them
        no_prompts, tensors = [t.to(dtype) for t in tensors[3:]], tensors[:3]
    else:
        no_prompts = []

    def op(*tensors, **options):
        return kernels.prompt_attention(*tensors, *no_prompts, **options)

    assert_policy(None, [(op, sdpa, tensors, options)], dtype)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_error_over_20_seeds(kernels, scale, dtype):
    def cases():
        for seed in range(20):
            _, formula, tensors, options = case(seed, queries=30, tokens=28, prompts=5)
            yield kernels.prompt_attention, formula, [t * scale for t in tensors], options

    assert_policy(attention_case, cases(), dtype)


def run(kernels, tensors, scale=0.7, grad_out=None, **options):
    """out, lse and the gradients of all tensors."""
    out, lse = kernels.forward(tensors, scale)
    if grad_out is None:
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, lse, *kernels.backward(tensors, scale, out, lse, grad_out, **options)]


def low(dtype=torch.bfloat16, **sizes):
    return [t.to(dtype) for t in case(**sizes)[2]]


def assert_equal(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_lse(kernels):
    tensors = low(torch.float16, queries=20, tokens=30, heads=2, groups=2, prompts=3)
    q, k, _, prompt_k, _ = (t.double() for t in tensors)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, torch.cat([prompt_k, k], dim=1)) * 0.7
    expected = torch.logsumexp(scores, dim=-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(kernels.forward(tensors, 0.7)[1].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prompts", [3, 70, 140])
def test_prompts_alone_get_the_same_gradients(kernels, prompts):
    tensors = low(queries=37, tokens=20, heads=2, groups=1, dim=64, prompts=prompts)
    *_, grad_k, grad_v = run(kernels, tensors)
    *frozen, only_k, only_v = run(kernels, tensors, prompts_only=True)
    assert frozen[2:] == [None] * 3
    assert_equal([only_k, only_v], [grad_k, grad_v])


@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 37, "tokens": 60, "heads": 2, "groups": 1, "dim": 64, "prompts": 10},
        {"queries": 33, "tokens": 197, "heads": 1, "groups": 1, "dim": 64, "prompts": 50},
        {"queries": 17, "tokens": 100, "heads": 1, "groups": 1, "dim": 72, "prompts": 0},
        {"queries": 20, "tokens": 30, "heads": 2, "groups": 2, "dim": 128, "prompts": 70, "batch": 2},
    ],
    ids=str,
)
def test_less_shared_memory_changes_no_bit(kernels, sizes):
    """Fewer keys at a time, in more passes; down to 16."""
    tensors = low(**sizes)
    for prompts_only in (False, True):
        kernels.shared_memory = 227 * 1024
        expected = run(kernels, tensors, prompts_only=prompts_only)
        smallest = kernels.backward_shared_memory(tensors, prompts_only)
        for kernels.shared_memory in {smallest, (smallest + 60 * 1024) // 2, 99 * 1024}:
            actual = run(kernels, tensors, prompts_only=prompts_only)
            assert_equal([t for t in actual if t is not None], [t for t in expected if t is not None])


def test_shared_prompts_get_float32_gradients_of_each_image(kernels):
    tensors = low(batch=2, queries=20, prompts=5, shared=True)
    out, lse = kernels.forward(tensors, 0.7)
    arguments, grads = kernels.backward_arguments(tensors, 0.7, out, lse, out)
    assert [g.dtype for g in grads[3:]] == [torch.float32] * 2
    assert kernels.launch("prompt_attention_backward", arguments).code == OK
    every = [*tensors[:3], *(t.expand(2, -1, -1, -1).contiguous() for t in tensors[3:])]
    expected = run(kernels, every, grad_out=out)
    assert_equal([g.to(torch.bfloat16) for g in grads], expected[2:])


# ---- layouts


def layouts(tensor):
    """The same values in other memory, NaN around them; rows begin at multiples of 16 bytes."""
    batch, rows, heads, dim = tensor.shape
    yield "heads first", tensor.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.full((batch, rows + 1, heads + 2, dim + 8), float("nan"), dtype=tensor.dtype)
    padded[:, :rows, :heads, :dim] = tensor
    yield "padded", padded[:, :rows, :heads, :dim]
    flat = torch.full((tensor.numel() + 16,), float("nan"), dtype=tensor.dtype)
    flat[8:-8] = tensor.flatten()
    yield "offset", flat[8:-8].view(tensor.shape)


@pytest.mark.parametrize("position", range(6), ids=(*INPUTS, "grad_out"))
def test_layouts_make_no_difference(kernels, position):
    tensors = low(batch=2, queries=19, tokens=21, heads=2, groups=2, dim=24, prompts=3)
    tensors.append(torch.randn(tensors[0].shape).to(torch.bfloat16))
    expected = run(kernels, tensors[:5], grad_out=tensors[5])
    for _, same in layouts(tensors[position]):
        moved = [*tensors[:position], same, *tensors[position + 1 :]]
        assert_equal(run(kernels, moved[:5], grad_out=moved[5]), expected)


def test_layouts_of_the_results_make_no_difference(kernels):
    tensors = low(batch=2, queries=19, tokens=21, heads=2, groups=2, dim=24, prompts=3)
    out, lse, *grads = run(kernels, tensors)
    arguments, _, _ = kernels.forward_arguments(tensors, 0.7)
    for _, to in layouts(torch.zeros_like(out)):
        arguments.out = Tensor4.of(to, 2)
        assert kernels.launch("prompt_attention_forward", arguments).code == OK
        assert_equal([to], [out])
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    for name, expected in zip(GRADS, grads, strict=True):
        arguments, _ = kernels.backward_arguments(tensors, 0.7, out, lse, grad_out)
        for _, to in layouts(torch.zeros_like(expected)):
            setattr(arguments, name, Tensor4.of(to, 2))
            assert kernels.launch("prompt_attention_backward", arguments).code == OK
            assert_equal([to], [expected])


def test_slices_of_a_joint_projection(kernels):
    tensors = low(batch=2, queries=19, tokens=19, heads=2, groups=2, dim=16, prompts=3)
    joint = torch.cat([t.flatten(2) for t in tensors[:3]], dim=-1)
    slices = [t.unflatten(-1, (2, 16)) for t in joint.split(32, dim=-1)]
    assert not slices[1].is_contiguous()
    assert_equal(run(kernels, [*slices, *tensors[3:]]), run(kernels, tensors))


def test_an_incoming_gradient_that_repeats(kernels):
    tensors = low(batch=2, queries=19, heads=2, groups=2, dim=16)
    ones = torch.ones(tensors[0].shape, dtype=torch.bfloat16)
    repeated = ones[:1, :1, :1].expand(ones.shape)
    assert repeated.stride()[:3] == (0, 0, 0)
    assert_equal(run(kernels, tensors, grad_out=repeated), run(kernels, tensors, grad_out=ones))


@pytest.mark.parametrize(
    "strides", [(2**31 + 64, 16, 8, 1), (64, 2**31 + 64, 8, 1), (64, 8, 2**31 + 64, 1)], ids=str
)
def test_offsets_beyond_32_bits(kernels, strides):
    tensors = low(batch=2, queries=2, tokens=2, heads=2, groups=2, dim=8, prompts=2)
    expected = run(kernels, tensors)
    memory = torch.empty(3 * 2**31, dtype=torch.bfloat16)  # only the pages that are written take any
    moved = [
        memory[2**14 * i :].as_strided(t.shape, strides).copy_(t)
        for i, t in enumerate((*tensors, *expected[2:]))
    ]
    assert_equal(run(kernels, moved[:5]), expected)
    grad_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    arguments, _ = kernels.backward_arguments(tensors, 0.7, *expected[:2], grad_out)
    for name, to in zip(GRADS, moved[5:], strict=True):
        setattr(arguments, name, Tensor4.of(to.zero_(), 2))
    assert kernels.launch("prompt_attention_backward", arguments).code == OK
    assert_equal(moved[5:], expected[2:])


# ---- nothing there, too much there


def test_no_keys(kernels):
    out, lse, grad_q, *rest = run(kernels, low(queries=5, tokens=0, prompts=0))
    assert not out.any()
    assert not lse.any()
    assert not grad_q.any()
    assert all(grad.numel() == 0 for grad in rest)


def test_no_tokens(kernels):
    out, _, *grads = run(kernels, low(queries=5, tokens=0, prompts=4))
    assert all(torch.isfinite(t).all() for t in (out, grads[0], *grads[3:]))


def test_no_queries_no_gradients_of_keys(kernels):
    _, _, _, *grads = run(kernels, low(queries=0, tokens=5, prompts=4))
    assert all(grad.numel() > 0 and not grad.any() for grad in grads)


def test_no_images(kernels):
    results = run(kernels, low(batch=0, queries=5, tokens=5, prompts=4))
    assert all(t.numel() == 0 for t in results)


def test_one_key_has_no_say(kernels):
    """The softmax of one score is 1, and the gradients of its query and key are exactly 0."""
    for prompts in (0, 1):
        tensors = low(queries=9, tokens=1 - prompts, prompts=prompts, dim=64)
        out, _, grad_q, grad_k, _, grad_prompt_k, _ = run(kernels, tensors)
        value = tensors[4] if prompts else tensors[2]
        assert_equal([out], [value.expand(out.shape)])
        assert not any(grad.any() for grad in (grad_q, grad_k, grad_prompt_k))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("size", [100.0, 3e4])
@pytest.mark.parametrize(("tokens", "dim"), [(20, 32), (150, 128)])
def test_extreme_scores_stay_finite(kernels, tokens, dim, size, sign):
    tensors = low(queries=20, tokens=tokens, dim=dim)
    tensors[0] = sign * tensors[0].abs() * size
    tensors[1], tensors[3] = tensors[1].abs() + 1, tensors[3].abs() + 1
    results = run(kernels, tensors)
    assert results[1].abs().max() > 100
    assert all(torch.isfinite(t).all() for t in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", range(5), ids=INPUTS)
def test_nan_and_inf_propagate_as_in_eager(kernels, position, value):
    tensors = low(batch=2, queries=18, tokens=7)
    tensors[position][0, 0, 0, 0] = value
    out, _ = kernels.forward(tensors, 0.7)
    expected = attention_formula(*(t.float() for t in tensors), scale=0.7)
    torch.testing.assert_close(out.float(), expected, equal_nan=True, rtol=0.02, atol=0.02)
    assert torch.isfinite(out[1]).all()


def test_scores_of_minus_infinity_hide_their_keys(kernels):
    q, k = torch.full((1, 1, 1, 8), 1e20), torch.zeros(1, 70, 1, 8)
    k[:, :40] = -1e20  # all of the first chunk of keys
    v = torch.randn(1, 70, 1, 8)
    none = torch.zeros(1, 0, 1, 8)
    tensors = [t.bfloat16() for t in (q, k, v, none, none)]
    out, _ = kernels.forward(tensors, 1.0)
    expected = attention_formula(*(t.float() for t in tensors), scale=1.0)
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)


# ---- repeating


def test_results_repeat_bit_by_bit_and_image_by_image(kernels):
    tensors = low(batch=5, queries=33, tokens=20, heads=2, groups=1, dim=64)
    grad_out = torch.randn(tensors[0].shape).to(torch.bfloat16)
    results = run(kernels, tensors, grad_out=grad_out)
    assert_equal(run(kernels, tensors, grad_out=grad_out), results)
    alone = run(kernels, [t[2:3] for t in tensors], grad_out=grad_out[2:3])
    assert_equal(alone, [t[2:3] for t in results])


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128])
def test_rows_of_a_matrix_lie_in_different_banks(kernels, dim):
    kernels.bank_conflicts()
    run(kernels, low(queries=33, tokens=50, prompts=10, dim=dim))
    assert kernels.bank_conflicts() == 0


def test_kernels_use_no_atomics():
    for file in (*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")):
        text = file.read_text()
        assert "atomic" not in text
        assert '"red.' not in text


# ---- what they refuse


def forward_refused(kernels, **changes):
    tensors = low(batch=2, queries=5, tokens=5, heads=2, groups=2, dim=16)
    arguments, out, lse = kernels.forward_arguments(tensors, 0.7)
    for name, change in changes.items():
        setattr(arguments.sizes if hasattr(arguments.sizes, name) else arguments, name, change)
    status = kernels.launch("prompt_attention_forward", arguments)
    assert out.isnan().all()
    assert lse.isnan().all()
    return status.code, status.message.decode()


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"dtype": 2}, INVALID, "dtype must be float16 or bfloat16, got number 2"),
        ({"batch": -1}, INVALID, "must not be negative, got -1, 5, 5, 2"),
        ({"groups": 3}, INVALID, "groups must divide heads, got 3 groups and 2 heads"),
        ({"groups": 0}, INVALID, "groups must divide heads"),
        ({"head_dim": 12}, UNSUPPORTED, "heads must have 8, 16, 24, ... or 128 channels, got 12"),
        ({"head_dim": 136}, UNSUPPORTED, "got 136"),
        ({"tokens": 2**31}, UNSUPPORTED, "too many: 5, 2 and 2147483648"),
        ({"batch": 2**30}, UNSUPPORTED, "heads of all images are too many: 2 of 1073741824"),
        ({"tokens": 2000}, UNSUPPORTED, "needs 322560 bytes of shared memory, the device has 102400"),
        ({"lse": None}, INVALID, "lse must not be null"),
        ({"q": Tensor4()}, INVALID, "q must not be null"),
    ],
    ids=lambda value: value.partition(",")[0] if isinstance(value, str) else "",
)
def test_what_is_refused(kernels, changes, code, message):
    kernels.library.set_shared_memory_limit(c_int64(100 * 1024))
    try:
        given = forward_refused(kernels, **changes)
    finally:
        kernels.library.set_shared_memory_limit(c_int64(227 * 1024))
    assert given[0] == code
    assert message in given[1]


@pytest.mark.parametrize(("field", "step"), [("data", 2), ("batch", 1), ("token", 4), ("head", 4)])
@pytest.mark.parametrize("name", INPUTS)
def test_rows_that_begin_elsewhere_are_refused(kernels, name, field, step):
    tensors = low(batch=2, queries=5, tokens=5, heads=2, groups=2, dim=16)
    view = Tensor4.of(tensors[INPUTS.index(name)], 2)
    setattr(view, field, getattr(view, field) + step)
    code, message = forward_refused(kernels, **{name: view})
    assert code == INVALID
    assert message == f"every row of {name} must begin at a multiple of 16 bytes"


def test_strides_of_axes_of_length_1_do_not_matter(kernels):
    tensors = low(queries=1, tokens=5, dim=16)
    arguments, out, _ = kernels.forward_arguments(tensors, 0.7)
    arguments.q.batch = arguments.q.token = arguments.q.head = 1
    assert kernels.launch("prompt_attention_forward", arguments).code == OK
    assert_equal([out], [kernels.forward(tensors, 0.7)[0]])


def test_gradients_of_tokens_are_wanted_together(kernels):
    tensors = low(queries=5, tokens=5, dim=16)
    out, lse = kernels.forward(tensors, 0.7)
    for name in GRADS:
        arguments, grads = kernels.backward_arguments(tensors, 0.7, out, lse, out)
        setattr(arguments, name, Tensor4())
        status = kernels.launch("prompt_attention_backward", arguments)
        assert (status.code, status.message) == (INVALID, f"{name} must not be null".encode())
        assert all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize(
    "sizes", [{"dim": 64, "tokens": 197}, {"dim": 72, "tokens": 300, "heads": 4}], ids=str
)
def test_shared_memory_is_what_is_said(kernels, sizes):
    library = kernels.library
    tensors = low(queries=33, prompts=10, **sizes)
    out, lse = kernels.forward(tensors, 0.7)
    forward, _, _ = kernels.forward_arguments(tensors, 0.7)
    needed = library.prompt_attention_forward_shared_memory
    needed.restype = c_int64
    size = needed(byref(forward.sizes))
    for limit, code in ((size - 1, UNSUPPORTED), (size, OK)):
        library.set_shared_memory_limit(c_int64(limit))
        assert kernels.launch("prompt_attention_forward", forward).code == code
    for prompts_only in (False, True):
        size = kernels.backward_shared_memory(tensors, prompts_only)
        for limit, code in ((size - 1, UNSUPPORTED), (size, OK)):
            library.set_shared_memory_limit(c_int64(limit))
            kernels.shared_memory = limit
            backward, _ = kernels.backward_arguments(tensors, 0.7, out, lse, out, prompts_only)
            assert kernels.launch("prompt_attention_backward", backward).code == code
    library.set_shared_memory_limit(c_int64(227 * 1024))


def test_a_workspace_is_needed_for_several_passes_alone(kernels):
    tensors = low(queries=5, tokens=40, dim=16)
    out, lse = kernels.forward(tensors, 0.7)
    arguments, _ = kernels.backward_arguments(tensors, 0.7, out, lse, out)
    arguments.workspace = None
    assert kernels.launch("prompt_attention_backward", arguments).code == OK
    arguments.shared_memory = 0
    status = kernels.launch("prompt_attention_backward", arguments)
    assert (status.code, status.message) == (INVALID, b"workspace must not be null")


# ---- bounds and races

SANITIZED = [
    # B, queries, tokens, prompts, heads, groups, d, shared, kilobytes of shared memory in the backward
    (2, 5, 7, 2, 2, 2, 64, 0, 227),
    (1, 33, 35, 6, 2, 1, 72, 0, 227),
    (2, 17, 16, 16, 1, 1, 32, 1, 227),
    (1, 2, 260, 30, 1, 1, 64, 0, 227),
    (2, 33, 35, 6, 2, 1, 64, 0, 32),
    (1, 130, 3, 1, 1, 1, 96, 0, 227),
    (1, 20, 140, 70, 1, 1, 128, 0, 227),
    (1, 3, 5, 0, 1, 1, 80, 0, 227),
    (1, 3, 0, 0, 1, 1, 8, 0, 227),
    (1, 0, 5, 3, 1, 1, 64, 0, 227),
]


def run_sanitized(program, *arguments):
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session", params=SANITIZERS)
def sanitized(request, tmp_path_factory):
    sources = [CSRC / "prompt_attention.cu", EMULATION / "attention.cpp"]
    return emulation.built(
        tmp_path_factory, f"attention-{request.param}", sources, *SANITIZERS[request.param]
    )


@pytest.mark.parametrize("sizes", SANITIZED, ids=str)
def test_no_sanitizer_objects(sanitized, sizes):
    ran = run_sanitized(sanitized, *sizes)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "finite\n", "")


# ---- the emulation itself


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    def build(sanitizer):
        flags = SANITIZERS[sanitizer] if sanitizer else ()
        name = f"samples-{sanitizer or 'plain'}"
        return emulation.built(tmp_path_factory, name, [EMULATION / "samples.cu"], *flags)

    return build


@pytest.mark.parametrize("kernel", ["reverse", "sum"])
@pytest.mark.parametrize("sanitizer", [None, *SANITIZERS])
def test_right_kernels_are_right(samples, sanitizer, kernel):
    ran = run_sanitized(samples(sanitizer), kernel, "none")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "right\n", "")


@pytest.mark.parametrize(
    ("kernel", "mistake", "sanitizer", "found"),
    [
        ("reverse", "beyond_the_end", "address,undefined", "heap-buffer-overflow"),
        ("reverse", "no_barrier", "thread", "data race"),
        ("reverse", "copied_too_early", "thread", "data race"),
        ("reverse", "one_place", "thread", "data race"),
        ("reverse", "no_wait", None, "wrong"),
        ("reverse", "copied_too_early", None, "wrong"),
        ("reverse", "no_commit", None, "ends without having waited for its copies"),
        ("sum", "no_barrier", "thread", "data race"),
        ("sum", "ends_too_early", "thread", "data race"),
        ("sum", "no_end", None, "hangs: waits for threads that wait elsewhere or have ended"),
        ("sum", "parted_lanes", None, "hangs"),
        ("sum", "wrong_count", None, "expect another number of threads"),
    ],
)
def test_wrong_kernels_are_found_out(samples, kernel, mistake, sanitizer, found):
    ran = run_sanitized(samples(sanitizer), kernel, mistake)
    assert found in ran.stdout + ran.stderr


@pytest.mark.parametrize(("dtype", "number"), emulation.DTYPES.items(), ids=str)
def test_conversions_are_those_of_pytorch(kernels, dtype, number):
    words = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    ours = torch.empty(2**16)
    kernels.library.to_float(number, c_int64(2**16), c_void_p(words.data_ptr()), c_void_p(ours.data_ptr()))
    assert_equal([ours], [words.view(dtype).float()])

    # Every value, what lies in the middle of two, and a little beside it; and anything.
    values = ours[ours.isfinite()].sort().values
    middle = ((values[1:].double() + values[:-1].double()) / 2).float()
    beside = [middle * (1 + sign * 2**-20) for sign in (-1, 1)]
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0))
    given = torch.cat([values, middle, *beside, bits.to(torch.int32).view(torch.float32)])
    rounded = torch.empty(len(given), dtype=torch.int16)
    pointers = (c_void_p(t.data_ptr()) for t in (given, rounded))
    kernels.library.from_float(number, c_int64(len(given)), *pointers)
    assert_equal([rounded.view(dtype)], [given.to(dtype)])


def test_the_stride_of_an_axis_of_length_1_does_not_matter(kernels):
    tensors = [torch.randn(1, 3, 2, 8).half() for _ in INPUTS]
    arguments, out, _ = kernels.forward_arguments(tensors, 0.3)
    arguments.q.batch = 1
    status = kernels.launch("prompt_attention_forward", arguments)
    assert status.code == OK, status.message
    assert_equal([out], [kernels.forward(tensors, 0.3)[0]])
