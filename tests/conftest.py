"""What every test runs under."""

import gc
import importlib
import importlib.util
import os
import pkgutil
from unittest import mock

import pytest
import torch

# Until pytest_collection_finish: nothing of what is imported is garbage.
gc.disable()

# The models are tiny: threads would only wait for each other.
torch.set_num_threads(1)

# Triton decides when it is imported, and again when a kernel is decorated, whether kernels are interpreted.
# Without a GPU they are, for the whole process; tests that compile kernels do so in a process of their own.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        from vapt_fast import kernels

        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"vapt_fast.kernels.{module.name}")


@pytest.fixture(autouse=True)
def planned_anew():
    """Have the ops ask anew what can run: tests change the machine."""
    from vapt_fast.ops.plan import PLANS

    PLANS.clear()


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked ``nightly`` unless the expression of -m, or a test's own id, asks for it."""
    if "nightly" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


def pytest_collection_finish():
    """Leave what the libraries and the tests consist of, a million objects, out of garbage collections."""
    gc.freeze()
    gc.enable()


def pytest_report_header():
    """Say which tests of Triton's kernels this machine runs."""
    from vapt_fast.ops.device import triton_missing_reasons

    if reasons := triton_missing_reasons():
        return f"tests/kernels/interpreted is left out: {reasons[0]}"
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's kernels are compiled: TRITON_INTERPRET=1 runs tests/kernels/interpreted instead"
    return "Triton's kernels are interpreted"
