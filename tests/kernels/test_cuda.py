"""The launchers of the CUDA kernels, on a CPU: vapt_fast._C is compiled against the kernels' emulation here.

What the kernels compute is tested in test_cuda_emulation_pool.py, and here what comes before and after them:
what they are given of tensors, autograd, ops of PyTorch, and what is refused.
"""

import importlib.util
import itertools
import sys
import sysconfig
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import emulation
import pytest
import torch
from kernel_cases import KERNELS, converted
from op_cases import assert_policy, assert_same_results, layouts, pool_case, results

from vapt_fast import AdaptiveViT, BackendUnavailableError, PromptConfig
from vapt_fast.backends import _dispatch
from vapt_fast.backends.cuda import _launch

POOL = {"batch": 2, "prefix": 1, "patches": 9, "dim": 24, "rows": 3}
FROZEN = ("norm_weight", "norm_bias", "layer_scale")


def pool(dtype=torch.bfloat16, seed=0, tokens=None, **sizes):
    """A case in ``dtype``, with tokens x in another one if that is given."""
    torch.manual_seed(seed)
    op, formula, (x, *learned), options = pool_case(**POOL | sizes)
    learned, branch = learned[:3], learned[3:]
    tensors = [x.to(dtype if tokens is None else tokens), *(t.float() for t in learned)]
    tensors += [t.to(dtype) for t in branch]
    options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return op, formula, tensors, options


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """vapt_fast._C for the CPU."""
    pybind11 = pytest.importorskip("pybind11")
    runtime = tmp_path_factory.mktemp("runtime")
    (runtime / "cuda_runtime_api.h").write_text("#define CUDART_VERSION 13000\n")
    includes = [runtime, pybind11.get_include(), sysconfig.get_path("include")]
    module = emulation.built(
        tmp_path_factory,
        f"_C{sysconfig.get_config_var('EXT_SUFFIX')}",
        [*emulation.CSRC.glob("*.cu"), emulation.CSRC / "bindings.cpp"],
        *("-std=c++20", "-shared", "-fvisibility=hidden", '-DVAPT_FAST_ARCHITECTURES="80-virtual"'),
        *itertools.chain.from_iterable(("-isystem", str(path)) for path in includes),
    )
    spec = importlib.util.spec_from_file_location("_C", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch, compiled):
    """CPU tensors count as CUDA tensors."""
    monkeypatch.setitem(sys.modules, "vapt_fast._C", compiled)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(_dispatch, "device_lacks", lambda name, device: [])
    monkeypatch.setattr(_dispatch, "unavailable_because", lambda name: [])
    with _dispatch.use_backend("cuda"):
        yield


@contextmanager
def recorded_launches():
    """(name, arguments) of each launch in the ``with`` block."""
    launches = []
    launch = _launch.launch

    def record(name, on, **arguments):
        launches.append((name, arguments))
        launch(name, on, **arguments)

    with mock.patch.object(sys.modules["vapt_fast.backends.cuda.prompt_pool"], "launch", record):
        yield launches


# ---- values and gradients


def test_what_runs_on_a_gpu_is_taken():
    """The cases of tests/gpu and of compute-sanitizer: none is left out there for its sizes."""
    torch.manual_seed(0)
    for sizes in KERNELS["prompt_pool"].cuda_quick:
        case = converted("prompt_pool", KERNELS["prompt_pool"].make(**sizes), torch.bfloat16)
        with recorded_launches() as launches:
            outputs, grads = results(*case)
        assert [name for name, _ in launches] == ["prompt_pool_forward", "prompt_pool_backward"]
        assert all(t.isfinite().all() for t in (*outputs, *grads))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"branch": False},
        {"layer_scale": False},
        {"affine": False},
        {"prefix": 0, "patches": 20, "dim": 40, "rows": 17},
    ],
    ids=str,
)
def test_pool_errs_at_most_as_eager_pytorch(dtype, sizes):
    def cases():
        for seed in range(5):
            torch.manual_seed(seed)
            yield pool_case(**POOL | sizes)

    assert_policy(pool_case, cases(), dtype)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_pool_under_autocast(branch, layer_scale, affine):
    """The stream of tokens is float32, and what is added to it is not."""
    op, _, tensors, options = pool(
        tokens=torch.float32, branch=branch, layer_scale=layer_scale, affine=affine
    )
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(op, tensors, options)
        expected = results(op, tensors, options | {"backend": "torch"})
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("leaves", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
def test_pool_gives_the_gradients_that_are_needed(leaves, layer_scale):
    """Of the tokens, of what is added to them, of what is learned: one without the others is the same."""
    x, branch, learned = map(bool, leaves)
    op, _, tensors, options = pool(layer_scale=layer_scale)
    expected = results(op, tensors, options)[1]
    wanted = [x, learned, learned, learned, branch]
    given = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    outputs = op(*given, **options)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    pairs = [(o, i) for o, i in zip(outputs, incoming, strict=True) if o.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    for tensor, want, grad in zip(given, wanted, expected, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            assert torch.equal(tensor.grad, grad)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"rows": 0}], ids=str)
def test_pool_of_nothing(sizes):
    op, _, tensors, options = pool(**sizes)
    outputs, grads = results(op, tensors, options)
    expected = results(op, tensors, options | {"backend": "torch"})
    assert_same_results([outputs, grads], expected, 0.02)


@pytest.mark.parametrize("position", range(5))
def test_layouts_make_no_difference_to_pool(position):
    op, _, tensors, options = pool()
    expected = results(op, tensors, options)
    for name, same in layouts(tensors[position]):
        actual = results(op, [*tensors[:position], same, *tensors[position + 1 :]], options)
        assert_same_results(actual, expected, 0, name)


@pytest.mark.parametrize("name", FROZEN)
def test_layouts_and_dtypes_of_what_is_frozen_make_no_difference_to_pool(name):
    op, _, tensors, options = pool()
    expected = results(op, tensors, options)
    frozen = options[name]
    every_other = torch.stack([frozen, torch.full_like(frozen, float("nan"))], dim=1)[:, 0]
    for same in (every_other, frozen.float(), frozen.double(), *dict(layouts(frozen)).values()):
        assert_same_results(results(op, tensors, options | {name: same}), expected, 0)


@pytest.mark.parametrize("name", FROZEN)
def test_pool_keeps_nothing_of_what_is_frozen(name):
    """A change in place counts from the next call on."""
    op, _, tensors, options = pool()
    results(op, tensors, options)
    changed = options[name] + 1
    expected = results(op, tensors, options | {name: changed})
    options[name].copy_(changed)
    assert_same_results(results(op, tensors, options), expected, 0)


@pytest.mark.parametrize("position", range(3))
def test_layouts_of_incoming_gradients_make_no_difference_to_pool(position):
    op, _, tensors, options = pool()
    leaves = [t.requires_grad_() for t in tensors]
    outputs = op(*leaves, **options)
    incoming = [torch.randn(o.shape).to(o.dtype) for o in outputs]

    def grads(same):
        given = [*incoming[:position], same, *incoming[position + 1 :]]
        return torch.autograd.grad(outputs, leaves, given, retain_graph=True)

    expected = grads(incoming[position])
    for name, same in layouts(incoming[position]):
        assert_same_results([grads(same)], [expected], 0, name)


def test_pool_in_two_passes(monkeypatch):
    op, _, tensors, options = pool(dim=264, patches=40)
    with recorded_launches() as launches:
        in_one = results(op, tensors, options)
        monkeypatch.setattr(sys.modules["vapt_fast.backends.cuda.prompt_pool"], "ONE_PASS", False)
        assert_same_results(results(op, tensors, options), in_one, 0.02)
    names = ("prompt_pool_forward", "prompt_pool_backward")
    given = [(name, arguments["one_pass"]) for name, arguments in launches]
    assert given == [(name, one_pass) for one_pass in (True, False) for name in names]


def test_pool_reads_no_memory_that_nobody_has_written(monkeypatch):
    op, _, tensors, options = pool()
    expected = results(op, tensors, options)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    assert_same_results(results(op, tensors, options), expected, 0)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_opcheck_of_pool(branch, affine):
    _, _, (x, *learned), options = pool(branch=branch, affine=affine)
    learned, added = learned[:3], learned[3] if branch else None
    ops, layer_scale = torch.ops.vapt_fast, options["layer_scale"]
    norm = [options.get(name) for name in ("norm_weight", "norm_bias")]
    rest = (torch.bfloat16, options["num_prefix"], options["eps"], options["prompt_eps"])
    leaves = [t.detach().requires_grad_() for t in (x, *learned)]
    torch.library.opcheck(ops.cuda_prompt_pool, (leaves[0], added, layer_scale, *norm, *leaves[1:], *rest))
    total, normed, pooled, mean, rstd = ops.cuda_prompt_pool(x, added, layer_scale, *norm, *learned, *rest)
    incoming = (torch.ones_like(total) if branch else None, torch.ones_like(normed), torch.ones_like(pooled))
    saved = (total if branch else x, layer_scale, norm[0], *learned, mean, rstd)
    wanted = (x.dtype, torch.bfloat16 if branch else None)
    torch.library.opcheck(ops.cuda_prompt_pool_backward, (*incoming, *saved, *rest, *wanted))


def test_pool_compiles_into_one_graph_for_any_batch():
    op, _, tensors, options = pool()
    compiled = torch.compile(partial(op, **options), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        _, _, tensors, _ = pool(batch=batch)
        assert_same_results(results(compiled, tensors, {}), results(op, tensors, options), 0)


def test_derivatives_that_pool_has_not():
    op, _, (x, *rest), options = pool()
    (grad,) = torch.autograd.grad(
        op(x.requires_grad_(), *rest, **options)[2].square().sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="prompt_pool can't be differentiated twice"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="prompt_pool has no forward-mode derivative"):
        torch.func.jvp(lambda x: op(x, *rest, **options), (x.detach(),), (torch.ones_like(x),))
    for name in FROZEN:

        def of_frozen(frozen, name=name):
            return op(x.detach(), *rest, **options | {name: frozen})

        with pytest.raises(NotImplementedError, match="prompt_pool has no forward-mode derivative"):
            torch.func.jvp(of_frozen, (options[name],), (torch.ones_like(options[name]),))


def test_what_pool_has_no_part_for_is_refused():
    def refused(match, change=lambda tensors: tensors, **case):
        op, _, tensors, options = pool(**case)
        with pytest.raises(
            BackendUnavailableError, match=rf"prompt_pool can't run on backend 'cuda': {match}"
        ):
            op(*change(tensors), **options)

    refused("normed must be float16 or bfloat16, got torch.float32", dtype=torch.float32)
    refused(
        "normed must be .*; branch must be normed's torch.float32, got torch.bfloat16", tokens=torch.float32
    )
    refused("tokens must have 8, 16, 24, ... channels, got 20", dim=20)
    refused("matrix must be float32, got torch.float64", lambda t: [t[0], t[1].double(), *t[2:]])
    for name in FROZEN:
        op, _, tensors, options = pool()
        options[name].requires_grad_()
        with pytest.raises(
            BackendUnavailableError, match=f"no gradient of {name}, which must not require one"
        ):
            op(*tensors, **options)
        with torch.no_grad():
            op(*tensors, **options)


def test_a_status_becomes_an_exception_that_names_the_op_and_its_sizes(compiled):
    names = ("layer_scale", "weight", "bias", *FROZEN[:2], "total", "normed", "pooled", "mean", "rstd")

    def forward(error, message, sizes=(), **arguments):
        counts = {"batch": 1, "prefix": 0, "patches": 1, "channels": 8, "rows": 0}
        sizes = compiled.PromptPoolSizes(
            **({"dtype": "bfloat16", "float32_tokens": True} | counts | dict(sizes))
        )
        call = {"sizes": sizes, "eps": 0, "prompt_eps": 0, "x": (16, 8, 8), "branch": None, "matrix": None}
        call |= dict.fromkeys(names, 0) | {"one_pass": True, "stream": 0} | arguments
        with pytest.raises(error, match=message):
            compiled.prompt_pool_forward(**call)

    op = r"prompt_pool_forward\(dtype=bfloat16, float32_tokens=True, batch=1, .*rows=0\)"
    forward(ValueError, f"{op}: x must not be null", x=None)
    forward(ValueError, f"{op}: x must begin at a multiple of 16 bytes", x=(24, 8, 8))
    forward(NotImplementedError, r"prompt_pool_forward\(.*channels=7", sizes={"channels": 7})
    forward(TypeError, "incompatible function arguments", x=(16, 8, 8, 8))
    forward(TypeError, "incompatible function arguments", x=16)
    with pytest.raises(ValueError, match="dtype must be float16 or bfloat16, got float32"):
        forward(ValueError, "", sizes={"dtype": "float32"})


# ---- launches


def test_a_view_is_copied_only_where_the_kernels_cannot_read_it():
    joint = torch.zeros(2, 7, 3 * 2 * 8, dtype=torch.bfloat16)
    q = joint.unflatten(-1, (-1, 8))[:, :, 2:4]
    assert _launch.aligned(q) is q
    one = q[:1].as_strided((1, 7, 2, 8), (3, 48, 8, 1))  # the stride of a single image is never used
    assert _launch.aligned(one) is one
    offset = joint.flatten()[1:-47].view(2, -1, 8)[:, :, None]
    assert _launch.aligned(offset) is not offset
    for copied in (q.transpose(2, 3).contiguous().transpose(2, 3), joint[..., :45].unfold(2, 9, 9)[..., :8]):
        assert torch.equal(_launch.aligned(copied), copied)
        assert _launch.aligned(copied).is_contiguous()
    assert _launch.rows(q) == (joint.data_ptr() + 32, 7 * 48, 48, 8)
    assert _launch.rows(q[:0]) is None


def test_launches_are_under_the_device_guard_and_on_the_current_stream(monkeypatch):
    order = []

    @contextmanager
    def device_of(tensor):
        order.append(("enter", tensor))
        yield
        order.append(("leave", tensor))

    function = mock.Mock(side_effect=lambda **arguments: order.append(("launch", arguments)))
    monkeypatch.setitem(sys.modules, "vapt_fast._C", SimpleNamespace(some_op=function))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=(device, 7)))
    tensor = torch.zeros(1)
    _launch.launch("some_op", tensor, size=3)
    assert order == [
        ("enter", tensor),
        ("launch", {"size": 3, "stream": (tensor.device, 7)}),
        ("leave", tensor),
    ]


# ---- the whole model


def test_the_model():
    torch.manual_seed(0)
    model = AdaptiveViT("test_vit", prompts=PromptConfig(num_prompts=2, prompt_dropout=0.0), num_classes=3)
    for parameter in model.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = model.bfloat16().eval()
    images = torch.randn(2, 3, *model._image_size).bfloat16()
    with recorded_launches() as launches, torch.no_grad():
        ours = model(images)
    assert launches
    with torch.no_grad(), _dispatch.use_backend("torch"):
        theirs = model(images)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
