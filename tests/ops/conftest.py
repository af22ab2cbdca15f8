"""Machines that are not there: what a process has found out about its GPU is forgotten between tests."""

import pytest
import torch
from op_cases import forget

from vapt_fast.ops import backend


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    monkeypatch.setattr(backend, "_said", set())
    forget()
    yield
    forget()


@pytest.fixture
def h100(monkeypatch):
    """A machine whose GPU has compute capability 9.0, and on which nobody asked for Triton's interpreter."""
    pytest.importorskip("triton", minversion="3.6")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
