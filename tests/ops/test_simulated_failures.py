"""What happens where the kernels can't run: "auto" gives PyTorch's result and says so once, a name raises."""

import os
import sys
import types
import warnings

import pytest
import torch
from op_cases import assert_same_results, attention_case, pool_case, results

from vapt_fast import BackendUnavailableError
from vapt_fast.ops.base import OPS
from vapt_fast.ops.measurement import Measurement

CASES = {"prompt_attention": attention_case, "prompt_pool": pool_case}


@pytest.fixture
def faster(h100, monkeypatch):
    """The same machine, on which the Triton kernels were measured to be better, whatever they are given.

    Tensors are on the CPU and say that they are on its GPU.
    """
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0), raising=False)
    for name in CASES:
        entry = Measurement("triton", 2.0, "one against two", fits=lambda args: True)
        monkeypatch.setattr(OPS[name], "measured", (entry,))


def make(op, **sizes):
    torch.manual_seed(0)
    function, _, tensors, options = CASES[op](**sizes)
    return function, tensors, options


def no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    return "triton is not installed"


def old_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.5.1"))
    return r"triton 3\.5\.1 is too old, its kernels need 3\.6"


def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    return r"compute capability 7\.5"


def no_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    return "Triton finds no C compiler: install gcc or clang, or set CC"


def read_only_cache(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/sys/vapt_fast")  # nobody can make a folder there
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/proc/sys")  # root may, it is told
    return "Triton can't write to its cache /proc/sys/vapt_fast: set TRITON_CACHE_DIR"


def new_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (13, 0))
    return r"nothing is known of GPUs of compute capability 13\.0"


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("failure", [no_triton, old_triton, old_gpu, no_compiler, read_only_cache, new_gpu])
@pytest.mark.usefixtures("faster")
def test_auto_gives_the_result_of_torch_and_one_warning(failure, op, monkeypatch):
    message = failure(monkeypatch)
    case = function, tensors, options = make(op)
    with pytest.warns(RuntimeWarning, match=message) as said:
        actual = [results(*case), results(*case)]
    assert len(said) == 1
    for each in actual:
        assert_same_results(each, results(function, tensors, options | {"backend": "torch"}), 0)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("failure", [no_triton, old_triton, old_gpu, no_compiler, read_only_cache])
@pytest.mark.usefixtures("faster")
def test_a_backend_by_name_raises(failure, op, monkeypatch):
    message = failure(monkeypatch)
    function, tensors, options = make(op)
    with pytest.raises(BackendUnavailableError, match=message):
        function(*tensors, **options, backend="triton")


def wide_heads():
    return make("prompt_attention", dim=192)


def narrow_matrix():
    function, tensors, options = make("prompt_pool")
    return function, [tensors[0], tensors[1].half(), *tensors[2:]], options


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (wide_heads, r"prompt_attention can't run on backend 'triton': .*heads must have 1 to 128 channels"),
        (narrow_matrix, r"prompt_pool can't run on backend 'triton': .*matrix must be float32 or float64"),
    ],
)
@pytest.mark.usefixtures("faster")
def test_arguments_that_no_kernel_takes(case, message):
    """Nothing is amiss on this machine, so nothing is said."""
    function, tensors, options = case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = results(function, tensors, options)
    assert_same_results(actual, results(function, tensors, options | {"backend": "torch"}), 0)
    with pytest.raises(BackendUnavailableError, match=message):
        function(*tensors, **options, backend="triton")
