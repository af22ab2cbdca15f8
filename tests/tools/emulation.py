"""The CUDA kernels compiled for a CPU, see csrc/emulation, with the compiler that the tests find."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from ctypes import c_char, c_int32
from pathlib import Path

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++")
DTYPES = {torch.float16: 0, torch.bfloat16: 1}
OK, INVALID, UNSUPPORTED = range(3)
SANITIZERS = {
    # Without optimisation it compiles in a fifth of the time.
    "address,undefined": ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}


def build(output: Path, sources: list[Path], *flags: str) -> Path:
    """Compile ``sources`` with ``flags``, the emulation's runtime without sanitizers, and link them."""
    includes = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'emulation'}"]
    runtime = output.with_suffix(".runtime.o")
    common = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", *includes]
    for more, arguments in [
        ((), ["-c", str(CSRC / "emulation" / "emulation.cpp"), "-o", str(runtime)]),
        (flags, ["-x", "c++", *map(str, sources), "-x", "none", str(runtime), "-o", str(output)]),
    ]:
        subprocess.run([*common, "-Wno-unknown-pragmas", *more, *arguments], check=True)
    return output


def built(factory: pytest.TempPathFactory, name: str, sources: list[Path], *flags: str) -> Path:
    """``build``, once for all processes of the tests; without a compiler the test is skipped."""
    if COMPILER is None:
        pytest.skip("there is no g++ for the kernels")
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # it has a folder of its own beside the others'
        folder = folder.parent
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = folder / name
        if not output.exists():
            build(output, sources, *flags)
    return output


def library(factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The launchers, see csrc/emulation/exports.cpp."""
    sources = [*CSRC.glob("*.cu"), CSRC / "emulation" / "exports.cpp"]
    return ctypes.CDLL(str(built(factory, "kernels.so", sources, "-shared")))


class Status(ctypes.Structure):
    _fields_ = (("code", c_int32), ("message", c_char * 240))


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory full of NaN."""
    return torch.full(shape, float("nan"), dtype=dtype)
