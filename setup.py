"""The project's packages and the build of its CUDA kernels, vapt_fast._C. All else is in pyproject.toml.

The build needs nvcc, a C++ compiler, CMake, Ninja, pybind11 and CUTLASS's headers, and nothing of PyTorch.
Where it fails, the install succeeds without ``_C``, says so, and leaves the reason in
vapt_fast/_C_missing.txt, which ``vapt-fast info`` shows.

docs/installation.md has the environment variables that change this.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = "vapt_fast._C"
NOTE = "_C_missing.txt"


class CannotBuildError(Exception):
    """The kernels can't be built here; says why and what to do."""


class BuildNative(build_ext):
    """Builds vapt_fast._C, or leaves a note why there is none."""

    def run(self) -> None:
        """Build the module into the package, or leave a note."""
        setting = os.environ.get("VAPT_FAST_CUDA")
        if setting not in (None, "0", "1"):
            raise SystemExit(f"VAPT_FAST_CUDA must be 0, 1 or unset, got {setting!r}")
        module = ROOT / self.get_ext_fullpath(NATIVE)
        note = module.with_name(NOTE)
        module.parent.mkdir(parents=True, exist_ok=True)
        for left_by_the_last_build in (module, note):
            left_by_the_last_build.unlink(missing_ok=True)
        try:
            if setting == "0":
                raise CannotBuildError("VAPT_FAST_CUDA=0 was set when it was installed; unset it")
            shutil.copyfile(build(), module)
        except CannotBuildError as error:
            if setting == "1":
                raise SystemExit(f"VAPT_FAST_CUDA=1, but the CUDA kernels can't be built: {error}") from error
            note.write_text(f"{error}\n")
            self.warn(f"installing without the CUDA kernels: {error}")


def build() -> Path:
    """Build the module, only what changed, and say where it is."""
    nvcc, jobs = find_nvcc(), number_of_jobs()
    # With another compiler CMake forgets its options, and Ninja compiles nothing again for a new version.
    compiler = hashlib.sha256(f"{nvcc} {run(nvcc, '--version')}".encode()).hexdigest()[:8]
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuildError("pybind11 is missing; install it, or build with isolation") from error
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{compiler}"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "VAPT_FAST_CUTLASS": cutlass(),
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    run(cmake, "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", *definitions)
    run(cmake, "--build", folder, "--parallel", jobs)
    run(sys.executable, "-c", "import _C", cwd=folder)  # no symbol is missing, with or without a driver
    (module,) = folder.glob("_C.*")
    return module


def find_nvcc() -> str:
    """The path of nvcc: of CUDA_HOME or CUDA_PATH, where one is set, else of PATH or /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home is not None:
            nvcc = shutil.which("nvcc", path=str(Path(home, "bin")))
            if nvcc is None:
                raise CannotBuildError(f"there is no bin/nvcc in {variable}={home}; correct or unset it")
            return nvcc
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise CannotBuildError(
            "there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda; install the CUDA toolkit or "
            "set CUDA_HOME"
        )
    return nvcc


def cutlass() -> Path:
    """The headers of nvidia-cutlass, where they stay: pip installs what a build requires anew each time."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None or package.origin is None:
        raise CannotBuildError("nvidia-cutlass is missing; install it, or build with isolation")
    headers = ROOT / "build" / f"cutlass-{version('nvidia-cutlass')}"
    if not headers.exists():
        unfinished = headers.with_suffix(".unfinished")
        shutil.copytree(Path(package.origin).parent / "source" / "include", unfinished, dirs_exist_ok=True)
        unfinished.rename(headers)
    return headers


def find_tool(name: str) -> str:
    """The path of a program on PATH."""
    path = shutil.which(name)
    if path is None:
        raise CannotBuildError(f"{name} is missing; install it, or build with isolation")
    return path


def number_of_jobs() -> int:
    """How many compilers run at once: MAX_JOBS, else the number of CPUs."""
    given = os.environ.get("MAX_JOBS")
    if given is None:
        count = os.cpu_count()
        return 1 if count is None else count
    if not given.isdecimal() or int(given) == 0:
        raise SystemExit(f"MAX_JOBS must be a positive number, got {given!r}")
    return int(given)


def run(*command: object, cwd: Path = ROOT) -> str:
    """Run a command, show and return its output."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(result.stdout, flush=True)
    if result.returncode:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
        raise CannotBuildError(
            f"{' '.join(words[:2])} ended with {result.returncode} ({said}); all that it said is shown by "
            "VAPT_FAST_CUDA=1 pip install --verbose"
        )
    return result.stdout


setup(
    packages=[*find_packages(include=["vapt_fast", "vapt_fast.*"]), "vapt_fast.kernels"],
    package_dir={"vapt_fast.kernels": "kernels"},
    package_data={"vapt_fast": ["py.typed", "**/*.safetensors", "ops/tuned.json"]},
    ext_modules=[Extension(NATIVE, sources=[])],
    cmdclass={"build_ext": BuildNative},
)
