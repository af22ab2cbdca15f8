"""Tests of the Triton kernels in Triton's interpreter.

Triton decides when a kernel is defined whether it is interpreted or compiled, for the whole process: these
tests need TRITON_INTERPRET=1 and a process of their own, which tests/test_triton.py gives them.
"""

import os

import pytest
import torch
from interpreter import quick_calls

from vapt_fast import use_backend

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def on_triton():
    """Every op that has a Triton kernel runs it, unless it is told otherwise."""
    with use_backend("triton"):
        yield


@pytest.fixture(scope="session", autouse=True)
def quick():
    with quick_calls():
        yield


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN."""
    empty = torch.empty

    def empty_and_nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty_and_nan)
