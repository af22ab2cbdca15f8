"""vapt_fast._C, the compiled CUDA kernels: whether this installation has them, and which GPUs they run on."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["compiled_by", "device_lacks", "missing_because", "native"]

NOTE = Path(__file__).parent.parent / "_C_missing.txt"  # setup.py leaves it where there is no _C
INSTALL_AGAIN = "install it again with pip install --force-reinstall --no-deps --no-cache-dir"


def native() -> ModuleType:
    """vapt_fast._C.

    Raises:
        ImportError: this installation has none, see ``missing_because``.
    """
    module = sys.modules.get("vapt_fast._C")  # importing it again takes longer, and each launch asks for it
    return importlib.import_module("vapt_fast._C") if module is None else module


def missing_because() -> list[str]:
    """Why this installation has no vapt_fast._C; empty if it has."""
    try:
        native()
    except ModuleNotFoundError:
        why = NOTE.read_text().strip() if NOTE.exists() else "pip install, which builds them, was not run"
        return [f"vapt_fast was installed without its compiled kernels: {why}; then {INSTALL_AGAIN}"]
    except ImportError as error:
        return [f"vapt_fast._C can't be imported: {error}"]
    return []


@functools.cache
def device_lacks(index: int) -> list[str]:
    """Why CUDA device ``index`` can't run the compiled kernels, by the CUDA runtime; empty if it can.

    It may have no code of them, or the driver may be too old for it.
    """
    with torch.cuda.device(index):  # which it makes current
        why = native().unsupported_because(index)
    if not why:
        return []
    compiled = f"compiled by CUDA {compiled_by()} for {native().architectures.replace(',', ', ')}"
    remedy = f"update the driver, or set VAPT_FAST_CUDA_ARCHS and {INSTALL_AGAIN}"
    return [f"its kernels, {compiled}, don't run on cuda:{index}: {why}; {remedy}"]


def compiled_by() -> str:
    """The version of CUDA, as 13.0."""
    version = native().runtime_version
    return f"{version // 1000}.{version % 1000 // 10}"
