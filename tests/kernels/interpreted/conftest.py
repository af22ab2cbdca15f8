"""Tests of the Triton kernels in Triton's interpreter, see tests/conftest.py."""

import os

import pytest
import torch

from vapt_fast.ops.device import triton_missing_reasons

if triton_missing_reasons() or (torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Every op that has a Triton kernel runs it, unless it is told otherwise."""
    from interpreter import quick_calls

    from vapt_fast import use_backend

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"), quick_calls():
        yield
