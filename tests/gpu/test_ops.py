"""Every op's kernels against its formula and against themselves."""

import itertools

import pytest
import torch
from kernel_cases import KERNELS, REAL, converted, laid_out, precision_cases, random_cases
from op_cases import assert_policy, assert_same_results, hardware_rounding, relative_error, results

from vapt_fast import BackendUnavailableError, functional, use_backend
from vapt_fast.ops.base import OPS

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
WITH_LIBRARY_PRODUCTS = ("absorbed_attention", "mlp")  # beside kernels of our own


def run(backend, function, tensors, options):
    """Outputs and gradients; skips, with the reason, what the backend can't take."""
    try:
        with use_backend(backend):
            return results(function, tensors, options)
    except BackendUnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=KERNELS)
def op(request, backend):
    if backend not in OPS[request.param].implementations:
        pytest.skip(f"{request.param} has no kernels on backend {backend!r}")
    return request.param


def bits(outputs_and_gradients):
    return list(itertools.chain(*outputs_and_gradients))


def assert_same_bits(actual, expected):
    for ours, theirs in zip(bits(actual), bits(expected), strict=True):
        assert torch.equal(ours, theirs)


# ---- against the formula


@pytest.mark.parametrize("index", range(10))
def test_equals_the_formula_in_float64(op, backend, index):
    cases = [*KERNELS[op].quick, *random_cases(op, 10)]
    torch.manual_seed(index)
    function, formula, tensors, options = KERNELS[op].make(**cases[index])
    actual = run(backend, function, tensors, options)
    assert_same_results(actual, results(formula, tensors, options), 1e-10)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
@pytest.mark.parametrize("sizes", ["small", "real"])
def test_error_is_at_most_that_of_eager_pytorch(op, backend, dtype, scale, sizes):
    if scale not in KERNELS[op].scales:
        pytest.skip(f"{op} is not tested with inputs times {scale:g}")

    def cases():
        if sizes == "small":
            yield from precision_cases(op, scale)
            return
        for seed in range(3):
            torch.manual_seed(seed)
            function, formula, tensors, options = KERNELS[op].make(batch=2, **REAL[op])
            yield function, formula, [t * scale for t in tensors], options

    run(backend, *converted(op, next(cases()), dtype))  # skips what can't run
    with use_backend(backend):
        assert_policy(KERNELS[op].make, cases(), dtype, on_gpu=True)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
@pytest.mark.parametrize("name", [name for name, op in KERNELS.items() if "lengths" in op.sizes])
def test_error_where_images_have_different_numbers_of_prompts(name, dtype):
    def cases():
        for seed in range(3):
            torch.manual_seed(seed)
            yield KERNELS[name].make(batch=4, lengths=(50, 7, 0, 33), **REAL[name])

    run("triton", *converted(name, next(cases()), dtype))  # skips what can't run
    with use_backend("triton"):
        assert_policy(KERNELS[name].make, cases(), dtype, on_gpu=True)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("name", [name for name, op in KERNELS.items() if op.cuda_sizes])
def test_random_shapes_of_cuda_kernels(name, dtype, scale):
    """The policy over a hundred of them, whose errors are taken together."""

    def cases():
        for seed, sizes in enumerate(random_cases(name, 100, "cuda_sizes")):
            torch.manual_seed(seed)
            function, formula, tensors, options = KERNELS[name].make(**sizes)
            yield function, formula, [t * scale for t in tensors], options

    run("cuda", *converted(name, next(cases()), dtype))  # skips where the kernels can't run
    with use_backend("cuda"):
        assert_policy(KERNELS[name].make, cases(), dtype, on_gpu=True)


@pytest.mark.parametrize("layout", ["transposed", "padded rows", "offset by one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_change_nothing(op, backend, dtype, layout):
    """No bit, where a row's elements are still neighbours; else the sums are in another order."""
    torch.manual_seed(0)
    sizes = KERNELS[op].cuda_quick if backend == "cuda" else KERNELS[op].quick
    function, tensors, options = converted(op, KERNELS[op].make(**sizes[0]), dtype)
    expected = run(backend, function, tensors, options)
    actual = run(backend, function, [laid_out(t, layout) for t in tensors], options)
    if layout != "transposed":
        assert_same_bits(actual, expected)
        return
    limit = hardware_rounding(dtype, bits(expected))
    for ours, theirs in zip(bits(actual), bits(expected), strict=True):
        assert relative_error(ours.double(), theirs.double()) <= limit


# ---- against themselves


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_a_hundred_runs_give_the_same_bits(op, backend, dtype):
    torch.manual_seed(0)
    case = converted(op, KERNELS[op].make(batch=4, **REAL[op]), dtype)
    expected = run(backend, *case)
    for _ in range(100):
        assert_same_bits(run(backend, *case), expected)


def test_an_image_gives_the_same_bits_in_any_batch(op, backend):
    if op in WITH_LIBRARY_PRODUCTS:
        pytest.skip("cuBLAS takes other kernels for other batches")
    torch.manual_seed(0)
    batch = 64
    function, tensors, options = converted(op, KERNELS[op].make(batch=batch, **REAL[op]), torch.bfloat16)
    positions = [i for i, t in enumerate(tensors) if t.shape[0] == batch]  # their gradients are the image's

    def of_image(outputs_and_gradients, index):
        outputs, grads = outputs_and_gradients
        return [t[index] for t in (*outputs, *(grads[i] for i in positions))]

    def incoming(outputs, index):
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(batch, *o.shape[1:], generator=generator, device="cpu")[index].to(o) for o in outputs
        ]

    def outputs_and_gradients(index):
        leaves = [t[index] if i in positions else t for i, t in enumerate(tensors)]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        try:
            with use_backend(backend):
                outputs = function(*leaves, **options)
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs, torch.autograd.grad(outputs, leaves, incoming(outputs, index))

    everything = outputs_and_gradients(slice(None))
    for image in (0, 1, 63):
        alone = of_image(outputs_and_gradients(slice(image, image + 1)), 0)
        for ours, theirs in zip(alone, of_image(everything, image), strict=True):
            assert torch.equal(ours, theirs)


# ---- sizes


def test_more_images_than_a_grid_has_rows(op, backend):
    """65,536: the second and third dimension of a grid end one before."""
    small = {name: min(of, key=lambda v: (v in (0, None), v)) for name, of in KERNELS[op].sizes.items()}
    small |= {"batch": 65536, "dim": 8} | ({"channels": 8} if "channels" in small else {})
    small |= {"activation": "relu"} if "activation" in small else {}
    small |= {"lengths": None} if "lengths" in small else {}
    torch.manual_seed(0)
    case = KERNELS[op].make(**small)
    function, tensors, options = converted(op, case, torch.float32)
    actual = run(backend, function, tensors, options)
    exact = results(case[1], case[2], case[3])
    for ours, right in zip(bits(actual), bits(exact), strict=True):
        assert (ours - right).norm() <= 1e-4 * right.norm()


def test_a_million_heads(backend):
    torch.manual_seed(0)
    case = KERNELS["prompt_attention"].make(
        batch=65536, queries=1, tokens=2, heads=17, groups=17, dim=16, prompts=1
    )
    function, tensors, options = converted("prompt_attention", case, torch.bfloat16)
    (actual, *_), _ = run(backend, function, tensors, options)
    exact = case[1](*(t.float() for t in tensors), **options)
    assert (actual.float() - exact).norm() <= 1e-2 * exact.norm()


def test_offsets_beyond_32_bits_equal_chunks(backend):
    """Queries, keys and values of (1600, 16, 729, 72) in one tensor: 4e9 elements."""
    batch, heads, tokens, dim, prompts, chunk = 1600, 16, 729, 72, 10, 400
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of free memory on the GPU")
    qkv = torch.empty(batch, tokens, 3 * heads * dim, dtype=torch.bfloat16).normal_()
    prompt_kv = torch.randn(batch, prompts, 2 * heads * dim, dtype=torch.bfloat16)
    grad = torch.randn(batch, tokens, heads, dim, dtype=torch.bfloat16)

    def attention(part):
        leaves = [t[part].requires_grad_() for t in (qkv, prompt_kv)]
        out = functional.prompt_attention_packed(
            *leaves, num_heads=heads, num_kv_heads=heads, scale=dim**-0.5, backend=backend
        )
        return out.detach(), *torch.autograd.grad(out, leaves, grad[part])

    try:
        everything = attention(slice(None))
    except BackendUnavailableError as reason:
        pytest.skip(str(reason))
    for start in range(0, batch, chunk):
        part = slice(start, start + chunk)
        for ours, whole in zip(attention(part), everything, strict=True):
            assert torch.equal(ours, whole[part])


# ---- streams and graphs


def test_a_cuda_graph_on_new_data(op, backend):
    """Forward and backward, captured once: a hundred replays give the bits of ordinary calls."""
    torch.manual_seed(0)
    function, tensors, options = converted(op, KERNELS[op].make(batch=2, **REAL[op]), torch.bfloat16)
    run(backend, function, tensors, options)  # compiles
    static = [t.clone().requires_grad_() for t in tensors]

    def call():
        outputs = function(*static, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(outputs, static, [torch.ones_like(o) for o in outputs])
        return [*(o.detach() for o in outputs), *grads]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with use_backend(backend):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(100):
            for t in static:
                t.data.normal_()
            graph.replay()
            for ours, theirs in zip(captured, call(), strict=True):
                assert torch.equal(ours, theirs)


def test_side_streams(op, backend):
    """Work on two streams at once gives the bits of one after the other."""
    cases = []
    for seed in range(2):
        torch.manual_seed(seed)
        cases.append(converted(op, KERNELS[op].make(batch=4, **REAL[op]), torch.bfloat16))
    expected = [run(backend, *case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        found = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(backend, *case))
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_bits(ours, theirs)
