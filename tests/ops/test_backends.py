"""Which backend runs: the context manager, the model's own choice, the environment variable, the report."""

import contextlib
import sys
import threading
import types

import pytest
import torch
from op_cases import forget

import vapt_fast
from vapt_fast import AdaptiveViT, BackendUnavailableError, PromptConfig, use_backend
from vapt_fast.forward import fused, reference
from vapt_fast.info import report
from vapt_fast.ops import backend as backends
from vapt_fast.ops.base import OPS, Op
from vapt_fast.ops.device import unavailable_reasons
from vapt_fast.ops.measurement import Measurement
from vapt_fast.ops.prompt_attention.op import Arguments as AttentionArguments
from vapt_fast.ops.prompt_attention.op import PackedArguments, unpack
from vapt_fast.ops.prompt_pool.op import Arguments as PoolArguments


@pytest.fixture
def ran(monkeypatch):
    """Names of the forward passes that ran, in order."""
    calls = []
    for module, name in ((reference, "reference"), (fused, "torch")):
        real = module.forward_tokens
        monkeypatch.setattr(
            module, "forward_tokens", lambda *a, _n=name, _r=real, **k: (calls.append(_n), _r(*a, **k))[1]
        )
    return calls


def run(model):
    with torch.no_grad():
        model(torch.zeros(1, 3, *model._image_size))


def make(backend=None):
    return AdaptiveViT("test_vit", prompts=PromptConfig(num_prompts=2), backend=backend)


def test_precedence(ran, monkeypatch):
    run(make())
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    run(make())
    run(make("torch"))
    with use_backend("reference"):
        run(make("torch"))
        with use_backend("torch"):
            run(make("reference"))
        run(make("torch"))
    run(make("auto"))
    assert ran == ["torch", "reference", "torch", "reference", "torch", "reference", "torch"]


def test_context_ends_with_an_exception_and_stays_in_its_thread(ran):
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.resolve() == "auto"
    with use_backend("reference"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(backends.resolve()))
        thread.start()
        thread.join()
        assert seen == ["auto"]


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU on which nobody asked for Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.usefixtures("no_gpu")
def test_an_explicit_backend_never_falls_back(name, monkeypatch):
    with (
        pytest.raises(BackendUnavailableError, match=f"backend '{name}' can't run: .*kernels"),
        use_backend(name),
    ):
        pass
    with pytest.raises(BackendUnavailableError, match=name):
        make(name)
    with pytest.raises(BackendUnavailableError, match=name):
        vapt_fast.functional.prompt_projector(torch.zeros(1, 1, 2), torch.zeros(1), backend=name)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(BackendUnavailableError, match=f"VAPT_FAST_BACKEND '{name}' can't run"):
        run(make())


@pytest.mark.usefixtures("no_gpu")
def test_triton_gives_every_reason(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    (no_device,) = unavailable_reasons("triton")
    assert no_device == "its kernels need a CUDA GPU (or TRITON_INTERPRET=1, to run them slowly on CPU)"
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.5.1"))
    assert unavailable_reasons("triton") == [no_device]  # asked once a process
    forget()
    too_old, no_device = unavailable_reasons("triton")
    assert "triton 3.5.1 is too old" in too_old
    monkeypatch.setitem(sys.modules, "triton", None)
    forget()
    assert unavailable_reasons("triton") == ["triton is not installed", no_device]


@pytest.mark.usefixtures("h100")
def test_triton_needs_a_compute_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (reason,) = unavailable_reasons("triton")
    assert reason == "cuda:1 has compute capability 7.5, its kernels need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    forget()
    assert not unavailable_reasons("triton")


@pytest.fixture
def interpreting(monkeypatch):
    """The interpreter is asked for, but the kernels are made before: other tests compile them."""
    pytest.importorskip("triton", minversion="3.6")
    for op in OPS.values():
        op.load("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("interpreting")
def test_the_interpreter_makes_triton_available():
    assert not unavailable_reasons("triton")


def pool_arguments(device="cpu", dtype=torch.bfloat16, matrix=torch.float32):
    """Arguments of prompt_pool; tensors on a GPU that is not there are stand-ins."""
    x = torch.zeros(1, 2, 8, dtype=dtype)
    if device == "cuda":
        about = {"device": torch.device("cuda", 0), "dtype": dtype, "shape": x.shape, "requires_grad": False}
        x = types.SimpleNamespace(**about)
    elif device != "cpu":
        x = x.to(device)
    affine = (torch.ones(8), torch.zeros(8), None, None)
    return PoolArguments(x, None, None, torch.zeros(3, 2, dtype=matrix), *affine, 0, 1e-6, 1e-5, dtype)


def pool_choice(backend, **options):
    return OPS["prompt_pool"].choose(backend, pool_arguments(**options))


def test_an_implementation_is_one_file_with_three_functions():
    pytest.importorskip("triton", minversion="3.6")
    for op in OPS.values():
        assert callable(op.load("torch").compute)
        for name in op.implementations:
            module = op.load(name)
            assert all(callable(getattr(module, f)) for f in ("forward", "backward", "unsupported_reasons"))


@pytest.mark.usefixtures("interpreting")
def test_the_device_and_the_arguments_have_a_say():
    with use_backend("triton"):
        assert pool_choice(None) == "triton"
        with pytest.raises(
            BackendUnavailableError, match=r"prompt_pool can't run on backend 'triton': .*got meta"
        ):
            pool_choice(None, device="meta")
        with pytest.raises(BackendUnavailableError, match="'triton': matrix must be float32 or float64, got"):
            pool_choice(None, matrix=torch.float16)
    assert pool_choice("torch") == pool_choice("auto") == "torch"
    with pytest.raises(ValueError, match=r"backend must be one of .*got 'flash'"):
        pool_choice("flash")


def measured(**changes):
    """An entry for prompt_pool on Triton, for one architecture."""
    return Measurement("triton", 2.0, "one against two", inheriting=(), **changes)


def measure(monkeypatch, *entries):
    monkeypatch.setattr(OPS["prompt_pool"], "measured", entries)


@pytest.mark.usefixtures("h100")
def test_auto_takes_the_first_entry_that_holds(monkeypatch):
    measure(monkeypatch)
    assert pool_choice("auto", device="cuda") == "torch"
    measure(monkeypatch, measured())
    assert pool_choice("auto", device="cuda") == "triton"
    assert pool_choice("auto", device="cpu") == "torch"
    assert pool_choice("auto", device="cuda", dtype=torch.float32) == "torch"
    few_rows = measured(fits=lambda args: args.matrix.shape[0] < 3)
    measure(monkeypatch, few_rows)
    assert pool_choice("auto", device="cuda") == "torch"
    measure(monkeypatch, few_rows, measured())
    assert pool_choice("auto", device="cuda") == "triton"
    assert pool_choice("auto", device="cuda", matrix=torch.float16) == "torch"  # which no kernel takes
    assert not backends._said


@pytest.mark.usefixtures("h100")
def test_auto_takes_torch_under_forward_mode_and_transforms(monkeypatch):
    measure(monkeypatch, measured())
    chosen = []

    def f(x):
        chosen.append(pool_choice("auto", device="cuda"))
        return x.sum()

    torch.func.vmap(f)(torch.zeros(2, 3))
    torch.func.grad(f)(torch.zeros(3))
    with torch.autograd.forward_ad.dual_level():
        f(torch.zeros(3))
    f(torch.zeros(3))
    assert chosen == ["torch", "torch", "torch", "triton"]


@pytest.mark.usefixtures("h100")
def test_an_op_without_kernels_of_a_backend_runs_on_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setitem(
        sys.modules, "vapt_fast._C", types.SimpleNamespace(unsupported_because=lambda device: "")
    )
    assert "cuda" not in OPS["prompt_pool"].implementations
    assert pool_choice("cuda", device="cuda") == "torch"
    monkeypatch.setitem(sys.modules, "vapt_fast._C", None)  # but no backend that can't run at all
    forget()
    with pytest.raises(BackendUnavailableError, match="backend 'cuda' can't run"):
        pool_choice("cuda", device="cuda")


@pytest.mark.usefixtures("h100")
def test_auto_takes_the_next_where_the_fastest_can_not_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "vapt_fast._C", None)
    missing = Measurement("cuda", 3.0, "one against three", inheriting=())
    measure(monkeypatch, missing, measured())
    with pytest.warns(RuntimeWarning, match="'cuda', the fastest on this GPU, can't run: ") as said:
        assert [pool_choice("auto", device="cuda") for _ in range(2)] == ["triton"] * 2
    assert len(said) == 1


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_auto_takes_kernels_for_what_a_model_computes_in_16_bits(dtype, capability, monkeypatch):
    """With the arguments that the ops of a model in ``dtype`` are called with, as if on a GPU."""
    chosen = {}
    monkeypatch.setattr(Op, "unsupported_reasons", lambda *args: [])

    def record(op, backend, args):
        class OnGpu(type(args)):
            def __getitem__(self, index):
                device = torch.device("cuda", 0)
                return (
                    types.SimpleNamespace(device=device, dtype=args[0].dtype) if index == 0 else args[index]
                )

        chosen[op.name] = op._fastest(OnGpu(*args))
        return "torch"

    monkeypatch.setattr("vapt_fast.ops.device.capability", lambda device: capability)
    monkeypatch.setattr("vapt_fast.ops.device.unavailable_reasons", lambda name: [])
    monkeypatch.setattr(Op, "choose", record)
    model = AdaptiveViT("test_vit", prompts=PromptConfig(num_prompts=3), num_classes=2).to(dtype).train()
    model(torch.zeros(1, 3, *model._image_size, dtype=dtype)).sum().backward()
    kernels = {"add_norm": "triton", "prompt_pool": "triton", "prompt_projector": "triton"}
    kernels |= {"prompt_attention_packed": "triton", "absorbed_attention": "triton", "mlp": "torch"}
    if capability == (9, 0):
        kernels |= {"prompt_attention_packed": "cuda", "mlp": "cuda"}
    assert chosen == (dict.fromkeys(kernels, "torch") if dtype == torch.float32 else kernels)
    assert not backends._said


@pytest.mark.parametrize(
    ("num_keys", "bias", "fits"),
    [(350, None, True), (351, None, False), (1, torch.zeros(1, 9, 9), False)],
)
def test_attention_over_many_keys_or_with_a_bias_was_not_measured(num_keys, bias, fits):
    q, k, prompts = (torch.zeros(1, n, 1, 8, dtype=torch.bfloat16) for n in (9, num_keys, 50))
    for entry in OPS["prompt_attention"].measured:
        assert entry.fits(AttentionArguments(q, k, k, prompts, prompts, bias, None, 1.0)) == fits


@pytest.mark.parametrize(("dim", "fitting"), [(64, ["cuda", "triton"]), (72, ["triton"])])
def test_attention_of_wide_heads_was_not_measured_in_cuda(dim, fitting):
    qkv, prompt_kv = (torch.zeros(1, 9, n * dim, dtype=torch.bfloat16) for n in (3, 2))
    packed = PackedArguments(qkv, prompt_kv, None, None, 1, 1, 1.0)
    separate = AttentionArguments(*unpack(qkv, prompt_kv, 1, 1), None, None, 1.0)
    for name, args in (("prompt_attention", separate), ("prompt_attention_packed", packed)):
        assert [entry.implementation for entry in OPS[name].measured if entry.fits(args)] == fitting


def test_every_measurement_names_an_implementation_and_says_what_was_compared():
    text = report()
    for op in OPS.values():
        for entry in op.measured:
            assert entry.implementation in op.implementations
            assert entry.ratio > 1
            assert "against" in entry.compared
            assert str(entry) in text
    assert "not measured there, on sm_80, sm_86, sm_89, sm_100, sm_120" in text


def test_bad_names(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of .*got 'fast'"), use_backend("fast"):
        pass
    with pytest.raises(TypeError, match=r"backend must be a str.*got 3"):
        make(3)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"VAPT_FAST_BACKEND must be one of"):
        run(make())


def test_report_names_every_backend_with_its_reason():
    text = report()
    assert vapt_fast.__version__ in text
    for name in backends.BACKENDS:
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        reasons = unavailable_reasons(name)
        assert all(reason in line for reason in reasons)
        assert ("no:" in line) == bool(reasons)
    for op in OPS.values():
        line = next(line for line in text.splitlines() if line.strip().startswith(op.name))
        assert ", ".join(op.implementations) in line


def test_images_with_parameters_of_their_own_were_not_measured():
    """So "auto" does not choose a kernel for a batch of several adapters."""
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    shared = {"matrix": torch.randn(3, 4), "weight": torch.ones(8)}
    own = {"matrix": torch.randn(2, 3, 4), "weight": torch.ones(2, 8)}
    (pool,) = OPS["prompt_pool"].measured
    blank = dict.fromkeys(PoolArguments._fields) | {"x": x, "dtype": x.dtype}
    for changes, fits in ((shared, True), (shared | {"matrix": own["matrix"]}, False), (own, False)):
        assert pool.fits(PoolArguments(**blank | changes)) is fits
