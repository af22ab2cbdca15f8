"""prompt_attention on cuDNN and on flash attention by name: which one runs, and every reason against it."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import assert_policy, attention_case, packed_case, results
from torch.nn.attention import SDPBackend, sdpa_kernel

from vapt_fast import BackendUnavailableError, functional, use_backend
from vapt_fast.backends import _dispatch
from vapt_fast.backends import torch as torch_backend

LIBRARIES = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
WHY_NOT = {
    "cudnn": torch_backend.why_not_prompt_attention_cudnn,
    "flash": torch_backend.why_not_prompt_attention_flash,
}


def half(make, **sizes):
    """A case of ``make`` in float16."""
    torch.manual_seed(0)
    op, _, tensors, options = make(**sizes)
    return op, [t.half() for t in tensors], options


@pytest.fixture
def asked(monkeypatch):
    """A GPU whose libraries take everything; what each was asked about, as (query, key, value, mask)."""
    questions = []
    monkeypatch.setattr(_dispatch, "device_lacks", lambda *args: [])
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *args: args[:4])
    for name in LIBRARIES:
        monkeypatch.setattr(
            torch.backends.cuda, f"can_use_{name}_attention", lambda params: questions.append(params) or True
        )
    return questions


@pytest.fixture
def ran(monkeypatch):
    """The libraries that each call of PyTorch's attention was allowed to use; the call itself is computed."""
    allowed = []
    real = F.scaled_dot_product_attention

    def record(*args, **kwargs):
        allowed.append([name for name, library in LIBRARIES.items() if is_enabled(library)])
        with sdpa_kernel(SDPBackend.MATH):
            return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return allowed


def is_enabled(library):
    return {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    }[library]()


@pytest.mark.parametrize("make", [attention_case, packed_case], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", LIBRARIES)
def test_one_library_alone(name, make, asked, ran):
    op, tensors, options = half(make, groups=2)
    actual = results(op, tensors, options | {"backend": name})
    assert ran == [[name]]
    expected = results(op, tensors, options | {"backend": "torch"})
    assert ran[1] == list(LIBRARIES)  # no longer than the call
    for ours, theirs in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize("shared", [False, True])
def test_a_library_is_asked_about_the_tensors_that_it_would_get(shared, asked, ran):
    sizes = {"batch": 2, "queries": 5, "tokens": 7, "heads": 4, "groups": 2, "dim": 8, "prompts": 3}
    op, tensors, options = half(attention_case, **sizes, shared=shared, bias=True)
    op(*tensors, **options, backend="cudnn")
    ((query, key, value, mask),) = asked
    assert query.shape == (2, 4, 5, 8)
    assert key.shape == value.shape == (2, 4, 10, 8)
    assert mask.shape == (1, 4, 5, 10)
    assert {t.dtype for t in (query, key, value, mask)} == {torch.float16}


def test_autocast_counts(asked, ran):
    op, tensors, options = half(attention_case)
    tensors = [t.float() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        assert op(*tensors, **options, backend="flash").dtype == torch.bfloat16
    assert asked[0][0].dtype == torch.bfloat16


# ---- what they refuse


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_cpu(name):
    op, tensors, options = half(attention_case)
    message = f"prompt_attention can't run on backend '{name}': its kernels run on CUDA tensors; got cpu"
    with pytest.raises(BackendUnavailableError, match=message):
        op(*tensors, **options, backend=name)


def test_every_reason(asked):
    _, _, tensors, options = attention_case(bias=True)
    arguments = (*tensors, options["scale"], options["bias"])
    dtypes = "all tensors must be of one dtype, float16 or bfloat16, got torch.float64"
    assert WHY_NOT["flash"](*arguments) == ["flash attention adds no bias to scores", dtypes]
    assert WHY_NOT["cudnn"](*arguments) == [dtypes]
    tensors[1] = tensors[1].half()
    (reason,) = WHY_NOT["cudnn"](*tensors, 1.0, None)
    assert reason.endswith("got torch.float16, torch.float64")
    assert not asked


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_pytorch_refuses(name, asked, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", lambda params: False)
    op, tensors, options = half(attention_case)
    message = (
        rf"can_use_{name}_attention refuses torch.float16 queries \(2, 4, 5, 3\) and keys \(2, 4, 9, 3\)"
    )
    with pytest.raises(BackendUnavailableError, match=message):
        op(*tensors, **options, backend=name)


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_other_op_knows_them(name):
    with pytest.raises(ValueError, match=f"backend must be one of .*got '{name}'"):
        functional.mlp(torch.zeros(1, 1, 1), torch.zeros(1, 1), None, torch.zeros(1, 1), None, backend=name)
    with pytest.raises(ValueError, match=f"backend must be one of .*got '{name}'"), use_backend(name):
        pass


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN and flash attention run on CUDA GPUs")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_on_a_gpu(name, shared, dtype):
    def cases():
        for seed in range(3):
            torch.manual_seed(seed)
            op, formula, tensors, options = attention_case(
                queries=197, tokens=197, dim=64, prompts=50, shared=shared
            )
            yield op_on(op, name), formula, [t.cuda() for t in tensors], options

    assert_policy(attention_case, cases(), dtype)


def op_on(op, name):
    """``op``, by ``name`` where the tensors are on a GPU."""
    return lambda *tensors, **options: op(*tensors, **options, backend=name)
