"""vapt_fast._C, the compiled CUDA kernels: whether this installation has them, and which GPUs they run on."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["device_lacks", "driver_lacks", "missing_because", "native", "readable"]

NOTE = Path(__file__).parent.parent / "_C_missing.txt"  # setup.py leaves it where there is no _C
EMBEDDED = ((8, 7),)  # Jetson, which shares no machine code with other GPUs of its generation
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
def driver_version() -> int:
    """The newest CUDA that the NVIDIA driver serves, 13000 for 13.0; 0 without a driver.

    Asked of the driver itself: the CUDA runtime would initialise it, and then this process can't be forked.
    """
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def driver_lacks() -> list[str]:
    """What the NVIDIA driver lacks to run the compiled kernels; empty if nothing."""
    driver, runtime = driver_version(), native().runtime_version
    if driver == 0:
        return ["there is no NVIDIA driver"]
    if driver // 1000 < runtime // 1000:  # within a major version an older driver runs newer kernels
        return [f"the NVIDIA driver serves CUDA {readable(driver)}, its kernels need {readable(runtime)}"]
    return []


def device_lacks(capability: tuple[int, int]) -> list[str]:
    """What a GPU of compute ``capability`` lacks to run the compiled kernels; empty if nothing."""
    architectures, needed = native().architectures, native().runtime_version
    machine_code, ptx = _code_for(architectures, capability)
    if machine_code or (ptx and driver_version() >= needed):
        return []
    given = ".".join(map(str, capability))
    if ptx:  # only a driver as new as the compiler takes it
        why = (
            f"its kernels have no machine code for compute capability {given}, only PTX, which takes a "
            f"driver of CUDA {readable(needed)}; this one serves {readable(driver_version())}"
        )
    else:
        compiled = architectures.replace(",", ", ")
        why = f"its kernels were compiled for {compiled}, not for compute capability {given}"
    return [f"{why}; set VAPT_FAST_CUDA_ARCHS and {INSTALL_AGAIN}"]


@functools.cache
def _code_for(architectures: str, capability: tuple[int, int]) -> tuple[bool, bool]:
    """Whether there is machine code for a GPU of compute ``capability``, and PTX, which the driver compiles.

    Args:
        architectures: that were compiled for, as in CMAKE_CUDA_ARCHITECTURES but with commas.
    """
    machine_code = ptx = False
    for name in architectures.split(","):
        number, feature, form = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", name).groups()
        compiled = divmod(int(number), 10)
        if feature == "a":  # instructions of one GPU
            runs = capability == compiled
        elif feature == "f":  # of one generation
            runs = capability[0] == compiled[0] and capability >= compiled
        else:
            runs = capability >= compiled
        # Machine code holds for later minor versions.
        mixed = compiled != capability and (compiled in EMBEDDED or capability in EMBEDDED)
        same = capability[0] == compiled[0] and not mixed
        machine_code |= runs and same and form != "-virtual"
        ptx |= runs and form != "-real"
    return machine_code, ptx


def readable(version: int) -> str:
    """13000, a version of CUDA, as 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"
