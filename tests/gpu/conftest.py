"""Tests of what only a GPU can show: compiled kernels, determinism, sizes, streams, CUDA graphs, memory.

They are marked ``gpu`` and skipped, with the reason, where there is none. New tensors are on the GPU.
"""

import os

import pytest
import torch

from vapt_fast.ops import device

HERE = os.path.dirname(__file__)


def pytest_collection_modifyitems(items):
    missing = not torch.cuda.is_available()
    for item in items:
        if str(item.path).startswith(HERE):
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"):
        yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        # After a kernel's bad access nothing runs in this process any more. pytest-xdist starts another one
        # and says which test it was.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise
    torch.cuda.empty_cache()


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Each backend that has kernels of its own."""
    reasons = device.unavailable_reasons(request.param)
    if reasons:
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param
