"""Which backend runs: the context manager, the model's own choice, the environment variable, the report."""

import sys
import threading
import types

import pytest
import torch

import vapt_fast
from vapt_fast import AdaptiveViT, BackendUnavailable, PromptConfig, reference, schedule, use_backend
from vapt_fast.backends import _dispatch
from vapt_fast.info import report


@pytest.fixture
def ran(monkeypatch):
    """Names of the forward passes that ran, in order."""
    calls = []
    for module, name in ((reference, "reference"), (schedule, "torch")):
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
        pytest.raises(BackendUnavailable, match=f"backend '{name}' can't run: .*kernels"),
        use_backend(name),
    ):
        pass
    with pytest.raises(BackendUnavailable, match=name):
        make(name)
    with pytest.raises(BackendUnavailable, match=name):
        vapt_fast.functional.prompt_projector(
            torch.zeros(1, 1, 2), torch.zeros(1, 2), torch.zeros(2, 1), backend=name
        )
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(BackendUnavailable, match=f"VAPT_FAST_BACKEND '{name}' can't run"):
        run(make())


@pytest.mark.usefixtures("no_gpu")
def test_triton_gives_every_reason(monkeypatch):
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
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (reason,) = _dispatch.unavailable_because("triton")
    assert reason == "cuda:1 has compute capability 7.5, its kernels need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not _dispatch.unavailable_because("triton")


def test_the_interpreter_makes_triton_available(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not _dispatch.unavailable_because("triton")


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_the_implementation_of_an_op(op, monkeypatch):
    pytest.importorskip("triton")
    cpu = torch.device("cpu")
    for name in ("auto", "reference", "torch"):
        assert _dispatch.choose(op, name, cpu) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    own = "triton" if op in _dispatch.TRITON_OPS else "torch"
    assert _dispatch.choose(op, "triton", cpu) == own
    with use_backend("triton"):
        assert _dispatch.choose(op, None, cpu) == own
        if own == "triton":
            with pytest.raises(BackendUnavailable, match=f"{op} can't run on backend 'triton': .*got meta"):
                _dispatch.choose(op, None, torch.device("meta"))


def test_auto_takes_what_was_measured(monkeypatch):
    """An entry of the table counts on a CUDA device that can run Triton kernels, and nowhere else."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(_dispatch, "AUTO_ON_TRITON", {})
    assert _dispatch.choose("prompt_pool", "auto", cuda) == "torch"
    monkeypatch.setattr(_dispatch, "AUTO_ON_TRITON", {"prompt_pool": "a measurement"})
    assert _dispatch.choose("prompt_pool", "auto", cuda) == "triton"
    assert _dispatch.choose("prompt_pool", "auto", torch.device("cpu")) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert _dispatch.choose("prompt_pool", "auto", cuda) == "torch"


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
    for op in _dispatch.OPS:
        line = next(line for line in text.splitlines() if line.strip().startswith(op))
        assert ("triton: triton" in line) == (op in _dispatch.TRITON_OPS)
