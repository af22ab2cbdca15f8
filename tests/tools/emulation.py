"""vapt_fast._C compiled for a CPU (csrc/emulation), with the compiler that the tests find.

Environment:
    VAPT_FAST_TEST_CSRC: other sources than those of csrc, as mutants are.
    VAPT_FAST_TEST_SANITIZER: one of SANITIZERS, for the kernels; its library must have been loaded first.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(os.environ.get("VAPT_FAST_TEST_CSRC", Path(__file__).parents[2] / "csrc"))
WARNINGS = ("-w",) if "VAPT_FAST_TEST_CSRC" in os.environ else ("-Wall", "-Wextra", "-Werror")
RUNTIME = sorted((CSRC / "emulation").glob("*.cpp"))
BUILD = CSRC.parent / "build" / "emulation"
COMPILER = shutil.which("g++")
COMMON = ("-std=c++20", "-O1", "-fPIC")
SANITIZERS = {
    "": (),
    # Without optimisation it compiles in a fifth of the time.
    "address": ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-g1", "-fsanitize=thread"),
}
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}


def _command(*flags: str) -> list[str]:
    if COMPILER is None:
        pytest.skip("there is no g++ for the kernels")
    return [COMPILER, *COMMON, f"-I{CSRC}", *flags]


def _made(name: str, contents: str, command: list[str]) -> Path:
    """What ``command`` writes to its ``-o``; only if it has not been made of the same ``contents`` before."""
    import fcntl  # not on Windows

    folder = BUILD / hashlib.sha256(contents.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # other processes need the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            subprocess.run([*command, "-o", str(folder / "unfinished")], check=True)
            (folder / "unfinished").replace(folder / name)
    return folder / name


def _object(source: Path, *flags: str) -> Path:
    command = _command(*flags, *WARNINGS, "-Wno-unknown-pragmas", "-x", "c++")
    # What it includes of csrc, and not of the system.
    rule = subprocess.run([*command, "-MM", str(source)], capture_output=True, text=True, check=True).stdout
    files = rule.replace("\\\n", " ").split()[1:]
    contents = "".join([sys.version, *COMMON, *flags, *(Path(file).read_text() for file in files)])
    return _made(f"{source.stem}.o", contents, [*command, "-c", str(source)])


def _linked(name: str, objects: list[Path], *flags: str) -> Path:
    return _made(name, " ".join(map(str, [*flags, *objects])), [*_command(*flags), *map(str, objects)])


def program(source: Path, sanitizer: str = "") -> Path:
    """The program of one source and the emulation's runtime."""
    flags = SANITIZERS[sanitizer]
    objects = [_object(source, *flags), *map(_object, RUNTIME)]
    return _linked(source.stem, objects, *flags)


@functools.cache
def module() -> ModuleType:
    """vapt_fast._C for the CPU: the kernels with the sanitizer, if there is one, all else without."""
    pybind11 = pytest.importorskip("pybind11")
    flags = SANITIZERS[os.environ.get("VAPT_FAST_TEST_SANITIZER", "")]
    includes = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"))
    constants = ('-DVAPT_FAST_ARCHITECTURES="80-virtual"', "-DVAPT_FAST_RUNTIME_VERSION=13000")
    folders = [path for path in CSRC.iterdir() if path.name not in ("emulation", "mlp")]  # which is CUTLASS's
    bindings = (CSRC / "module.cpp", *(file for path in folders for file in path.glob("bindings.cpp")))
    kernels = sorted(file for path in folders for file in path.glob("*.cu"))
    objects = [
        *(_object(file, "-fvisibility=hidden", *flags) for file in kernels),
        *(_object(file, "-fvisibility=hidden", *includes, *constants) for file in bindings),
        *(_object(file, "-fvisibility=hidden") for file in RUNTIME),
    ]
    path = _linked(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", objects, "-shared", *flags)
    spec = importlib.util.spec_from_file_location("_C", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def emulator() -> ctypes.CDLL:
    """What controls the emulation, the last functions in emulation.cpp."""
    library = ctypes.CDLL(module().__file__)
    library.bank_conflicts.restype = ctypes.c_int64
    for name in ("float16", "bfloat16"):
        decode, encode = getattr(library, f"from_{name}"), getattr(library, f"to_{name}")
        decode.argtypes, decode.restype = [ctypes.c_uint16], ctypes.c_float
        encode.argtypes, encode.restype = [ctypes.c_float], ctypes.c_uint16
    return library


@contextmanager
def device(shared_memory: int = 227 * 1024, clusters: int = 2) -> Iterator[None]:
    """Another device: bytes of shared memory per block, clusters that run at once."""
    try:
        emulator().set_limits(ctypes.c_int64(shared_memory), ctypes.c_int64(clusters))
        yield
    finally:
        emulator().set_limits(ctypes.c_int64(227 * 1024), ctypes.c_int64(2))


def run_sanitized(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python on ``arguments``, where ``module`` has the kernels with a sanitizer."""
    libraries = []
    for name in (LIBRARIES[sanitizer], "libstdc++.so"):  # without this one they find no __cxa_throw
        command = [COMPILER, f"-print-file-name={name}"]
        libraries.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    environment = {
        "VAPT_FAST_TEST_SANITIZER": sanitizer,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
