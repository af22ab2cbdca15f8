"""The CUDA kernels on a CPU."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import emulation
import pytest
import torch

from vapt_fast import use_backend
from vapt_fast.ops import backend, device
from vapt_fast.ops.base import OPS
from vapt_fast.ops.prompt_attention import cuda as attention


@pytest.fixture
def on_emulation(monkeypatch):
    """The CUDA kernels but CUTLASS's run, on CPU tensors. Memory that was not written holds NaN."""
    monkeypatch.setattr(OPS["mlp"], "implementations", ())
    monkeypatch.setitem(sys.modules, "vapt_fast._C", emulation.module())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(device, "unsupported_reasons", lambda name, device: [])
    monkeypatch.setattr(backend, "unavailable_reasons", lambda name: [])
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    try:
        with use_backend("cuda"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def launching(monkeypatch):
    """``with launching(name=value) as launches``: names and arguments of launches, some changed."""
    launch = attention.launch

    @contextmanager
    def launching(**changes):
        launches = []

        def record(name, on, **arguments):
            launches.append((name, arguments | changes))
            launch(name, on, **arguments | changes)

        with monkeypatch.context() as patch:
            patch.setattr(attention, "launch", record)
            yield launches

    return launching
