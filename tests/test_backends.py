"""Which backend runs: the context manager, the model's own choice, the environment variable, the report."""

import threading

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
    assert _dispatch.resolve() == "torch"
    with use_backend("reference"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(_dispatch.resolve()))
        thread.start()
        thread.join()
        assert seen == ["torch"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_explicit_backend_never_falls_back(name, monkeypatch):
    with (
        pytest.raises(BackendUnavailable, match=f"backend '{name}' can't run: .*kernels"),
        use_backend(name),
    ):
        pass
    with pytest.raises(BackendUnavailable, match=name):
        make(name)
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(BackendUnavailable, match=f"VAPT_FAST_BACKEND '{name}' can't run"):
        run(make())


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
