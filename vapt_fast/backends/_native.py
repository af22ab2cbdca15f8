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
EMBEDDED = ((8, 7),)  # Jetson, where machine code for other GPUs of the same generation does not run
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
    architectures = native().architectures.split(",")
    if any(_runs_on(name, capability) for name in architectures):
        return []
    given = ".".join(map(str, capability))
    return [
        f"its kernels were compiled for {', '.join(architectures)}, not for compute capability {given}; "
        f"set VAPT_FAST_CUDA_ARCHS and {INSTALL_AGAIN}"
    ]


@functools.cache
def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for one of CMAKE_CUDA_ARCHITECTURES runs on a GPU of compute ``capability``."""
    number, feature, form = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", architecture).groups()
    compiled = divmod(int(number), 10)
    if feature == "a":  # instructions of one GPU
        return capability == compiled
    if feature == "f" or form == "-real":  # machine code holds for later minor versions
        return capability[0] == compiled[0] and capability >= compiled and capability not in EMBEDDED
    return capability >= compiled  # there is PTX, which the driver compiles


def readable(version: int) -> str:
    """13000, a version of CUDA, as 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"
