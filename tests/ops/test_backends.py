"""Which backend runs: the context manager, the model's own choice, the environment variable, the report."""

import importlib
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch

import vapt_fast
from vapt_fast import AdaptiveViT, BackendUnavailableError, PromptConfig, use_backend
from vapt_fast.backends import _dispatch, _measurements
from vapt_fast.forward import fused, reference
from vapt_fast.functional import _implementation
from vapt_fast.functional._implementation import choose
from vapt_fast.info import report


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
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "reference")
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
    assert _dispatch.resolve() == "auto"
    with use_backend("reference"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(_dispatch.resolve()))
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
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(BackendUnavailableError, match=f"VAPT_FAST_BACKEND '{name}' can't run"):
        run(make())


@pytest.mark.usefixtures("no_gpu")
def test_triton_gives_every_reason(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    assert _dispatch.unavailable_because("triton") == [
        "its kernels need a CUDA GPU (or TRITON_INTERPRET=1, to run them slowly on CPU)"
    ]
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.5.1"))
    too_old, no_device = _dispatch.unavailable_because("triton")
    assert "triton 3.5.1 is too old" in too_old
    assert "CUDA GPU" in no_device
    monkeypatch.setitem(sys.modules, "triton", None)
    assert _dispatch.unavailable_because("triton") == ["triton is not installed", no_device]


def test_triton_needs_a_compute_capability(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (reason,) = _dispatch.unavailable_because("triton")
    assert reason == "cuda:1 has compute capability 7.5, its kernels need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not _dispatch.unavailable_because("triton")


@pytest.fixture
def interpreting(monkeypatch):
    """The interpreter is asked for, but the kernels are made before: other tests compile them."""
    pytest.importorskip("triton", minversion="3.6")
    importlib.import_module("vapt_fast.backends.triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("interpreting")
def test_the_interpreter_makes_triton_available():
    assert not _dispatch.unavailable_because("triton")


POOL = (torch.zeros(1, 2, 4), torch.zeros(3, 2), torch.ones(4), torch.zeros(4), *[None] * 4, 0, 1e-6, 1e-5)


@pytest.fixture
def h100(monkeypatch):
    """Arguments of prompt_pool on a machine whose GPU has compute capability 9.0."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_dispatch, "_said", set())
    x = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    return (x, *POOL[1:])


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in _dispatch.IMPLEMENTATIONS.items() for name in names]
)
@pytest.mark.usefixtures("interpreting")
def test_an_implementation_is_looked_for_by_its_backend(op, name, monkeypatch):
    monkeypatch.setattr(_implementation, "_why_not", lambda *args: [])
    for lack in ("device_lacks", "unavailable_because"):
        monkeypatch.setattr(_dispatch, lack, lambda *args: [])
    assert choose(op, name, torch.zeros(1)) == name
    for other in ("auto", "torch"):
        assert choose(op, other, torch.zeros(1)) == "torch"
    assert callable(_implementation.function(op, name))
    if name != "torch":
        assert callable(_implementation.function(f"why_not_{op}", name))


@pytest.mark.usefixtures("interpreting")
def test_the_device_and_the_arguments_have_a_say():
    with use_backend("triton"):
        assert choose("prompt_pool", None, *POOL) == "triton"
        with pytest.raises(
            BackendUnavailableError, match=r"prompt_pool can't run on backend 'triton': .*got meta"
        ):
            choose("prompt_pool", None, POOL[0].to("meta"), *POOL[1:])
        with pytest.raises(BackendUnavailableError, match="'triton': matrix must be float32 or float64, got"):
            choose("prompt_pool", None, POOL[0], POOL[1].half(), *POOL[2:])
    with pytest.raises(ValueError, match=r"backend must be one of .*got 'flash'"):
        choose("prompt_pool", "flash", *POOL)


def measured(**changes):
    """An entry for prompt_pool on Triton, for one architecture and one dtype."""
    entry = _measurements.Measurement("prompt_pool", "triton", 2.0, "one against two", (torch.bfloat16,))
    return replace(entry, inheriting=(), **changes)


def measure(monkeypatch, *entries):
    monkeypatch.setattr(_measurements, "MEASUREMENTS", entries)


def test_auto_takes_the_first_entry_that_holds(h100, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    entry = measured()
    measure(monkeypatch)
    assert choose("prompt_pool", "auto", *h100) == "torch"
    measure(monkeypatch, entry)
    assert choose("prompt_pool", "auto", *h100) == "triton"
    assert choose("prompt_pool", "auto", *POOL) == "torch"  # on the CPU
    monkeypatch.setattr(h100[0], "dtype", torch.float32)
    assert choose("prompt_pool", "auto", *h100) == "torch"
    monkeypatch.setattr(h100[0], "dtype", torch.bfloat16)
    few_rows = replace(entry, fits=lambda x, matrix, *_: matrix.shape[0] < 3)
    measure(monkeypatch, few_rows)
    assert choose("prompt_pool", "auto", *h100) == "torch"
    measure(monkeypatch, few_rows, entry)
    assert choose("prompt_pool", "auto", *h100) == "triton"
    assert not _dispatch._said


def test_auto_passes_over_what_can_not_take_the_arguments(h100, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    measure(monkeypatch, measured())
    assert choose("prompt_pool", "auto", h100[0], h100[1].half(), *h100[2:]) == "torch"
    assert not _dispatch._said


def test_auto_takes_torch_under_forward_mode_and_transforms(h100, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    measure(monkeypatch, measured())
    chosen = []

    def f(x):
        chosen.append(choose("prompt_pool", "auto", *h100))
        return x.sum()

    torch.func.vmap(f)(torch.zeros(2, 3))
    torch.func.grad(f)(torch.zeros(3))
    with torch.autograd.forward_ad.dual_level():
        f(torch.zeros(3))
    f(torch.zeros(3))
    assert chosen == ["torch", "torch", "torch", "triton"]


@pytest.mark.parametrize("what", ["no triton", "old triton", "another GPU"])
def test_auto_degrades_with_one_warning(what, h100, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    measure(monkeypatch, measured())
    if what == "another GPU":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (13, 0))
        message = "nothing is known of GPUs of compute capability 13.0"
    elif what == "no triton":
        monkeypatch.setitem(sys.modules, "triton", None)
        message = "'triton', the fastest on this GPU, can't run: triton is not installed"
    else:
        monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.5.1"))
        message = "triton 3.5.1 is too old"
    with pytest.warns(RuntimeWarning, match=message) as said:
        chosen = [choose("prompt_pool", "auto", *h100) for _ in range(3)]
    assert chosen == ["torch"] * 3
    assert len(said) == 1


def test_auto_takes_the_next_where_the_fastest_can_not_run(h100, monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    monkeypatch.setitem(sys.modules, "vapt_fast._C", None)
    with pytest.warns(RuntimeWarning, match="'cuda', the fastest on this GPU, can't run: ") as said:
        assert [choose("prompt_pool", "auto", *h100) for _ in range(2)] == ["triton"] * 2
    assert len(said) == 1


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_auto_takes_kernels_for_what_a_model_computes_in_16_bits(dtype, capability, monkeypatch):
    """With the arguments that the ops of a model in ``dtype`` are called with."""
    called = []

    def record(op, backend, *args):
        called.append((op, args))
        return "torch"

    for module in (_implementation, sys.modules["vapt_fast.functional.prompt_attention"]):
        monkeypatch.setattr(module, "choose", record)
    model = AdaptiveViT("test_vit", prompts=PromptConfig(num_prompts=3), num_classes=2).to(dtype).train()
    model(torch.zeros(1, 3, *model._image_size, dtype=dtype)).sum().backward()
    monkeypatch.setattr(_dispatch, "capability", lambda device: capability)
    monkeypatch.setattr(_dispatch, "unavailable_because", lambda name: [])
    monkeypatch.setattr(_implementation, "_why_not", lambda *args: [])
    monkeypatch.setattr(_dispatch, "_said", set())
    cuda = torch.device("cuda", 0)
    chosen = {op: _implementation._fastest(op, cuda, args) for op, args in called}
    kernels = {"add_norm": "triton", "prompt_pool": "cuda", "prompt_projector": "triton"}
    kernels |= {"prompt_attention": "triton", "absorbed_attention": "triton", "mlp": "torch"}
    assert chosen == (dict.fromkeys(kernels, "torch") if dtype == torch.float32 else kernels)
    assert not _dispatch._said


@pytest.mark.parametrize(
    ("num_keys", "bias", "chosen"),
    [(350, None, "triton"), (351, None, "torch"), (1, torch.zeros(1, 9, 9), "torch")],
)
def test_attention_over_many_keys_or_with_a_bias_was_not_measured(num_keys, bias, chosen, h100, monkeypatch):
    monkeypatch.setattr(_dispatch, "unavailable_because", lambda name: [])
    monkeypatch.setattr(_implementation, "_why_not", lambda *args: [])
    k, prompts = torch.zeros(1, num_keys, 1, 8), torch.zeros(1, 50, 1, 8)
    assert choose("prompt_attention", "auto", h100[0], k, k, prompts, prompts, 1.0, bias) == chosen


def test_every_measurement_names_an_implementation_and_says_what_was_compared():
    for entry in _measurements.MEASUREMENTS:
        assert entry.implementation in _dispatch.IMPLEMENTATIONS[entry.op]
        assert entry.ratio > 1
        assert "against" in entry.compared
    text = report()
    assert all(str(entry) in text for entry in _measurements.MEASUREMENTS)
    assert "not measured there, on sm_80, sm_86, sm_89, sm_100, sm_120" in text


def test_bad_names(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of .*got 'fast'"), use_backend("fast"):
        pass
    with pytest.raises(TypeError, match=r"backend must be a str.*got 3"):
        make(3)
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"VAPT_FAST_BACKEND must be one of"):
        run(make())


def test_report_names_every_backend_with_its_reason():
    text = report()
    assert vapt_fast.__version__ in text
    for name in _dispatch.BACKENDS:
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        reasons = _dispatch.unavailable_because(name)
        assert all(reason in line for reason in reasons)
        assert ("no:" in line) == bool(reasons)
    for op, implementations in _dispatch.IMPLEMENTATIONS.items():
        line = next(line for line in text.splitlines() if line.strip().startswith(op))
        assert ", ".join(implementations) in line
