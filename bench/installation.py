"""What bench/gpu.py needs of the machine that it finds: versions, tools, and what was built elsewhere.

Whatever is missing costs one sentence, and what can run without it runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from session import Session

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    from pip._vendor import tomli as tomllib
try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:
    from pip._vendor.packaging.requirements import Requirement

__all__ = ["check_packages", "check_tools", "find_tool", "install"]

ROOT = Path(__file__).resolve().parent.parent
TOOLKIT = "/usr/local/cuda/bin"

# What can't be had without them. All that vapt_fast itself requires is added to these.
OPTIONAL = {
    "pytest": "no gate and no benchmarks of the ops, and no tests",
    "pytest-benchmark": "no gate and no benchmarks of the ops",
    "pytest-xdist": "the tests run in one process",
    "matplotlib": "no pictures",
}


def requirements() -> dict[Requirement, str]:
    """Return the packages of pyproject.toml that a run needs, with what happens without each."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {Requirement(line): "vapt_fast may not import" for line in project["dependencies"]}
    extras = [Requirement(line) for of in project["optional-dependencies"].values() for line in of]
    return needed | {found: OPTIONAL[found.name] for found in extras if found.name in OPTIONAL}


def check_packages(session: Session, seconds: float) -> None:
    """Install, from the folder of wheels, what is missing or too old, and say what is not there either."""
    site = session.scratch / "wheels"
    lacking = {found: without for found, without in requirements().items() if _problem(found)}
    if lacking and session.wheels is not None:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
        for requirement in lacking:  # one by one: a wheel that is not there stops no other
            session.call(
                seconds / len(lacking), *pip, "--find-links", session.wheels, "--target", site, requirement
            )
        session.add_to_path(site)
        sys.path.insert(0, str(site))  # this process asks for them too
        lacking = {found: without for found, without in lacking.items() if _problem(found)}
    for requirement, without in lacking.items():
        session.missing(f"{_problem(requirement)}: {without}.")
    if lacking:
        names = shlex.join(str(requirement) for requirement in lacking)
        session.missing(
            f"Wheels to carry: python -m pip download --no-deps --dest WHEELS {names}, by Python "
            f"{sys.version_info.major}.{sys.version_info.minor} elsewhere; then give --wheels WHEELS here."
        )


def _problem(requirement: Requirement) -> str | None:
    """Return what is wrong with the installed version; None: nothing is."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed, and {requirement} is needed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} is installed, and {requirement} is needed"


def check_tools(session: Session) -> None:
    if not os.environ.get("CC") and not any(shutil.which(name) for name in ("gcc", "clang")):
        session.missing("There is no C compiler (gcc, clang or CC): Triton launches no kernels.")
    if find_tool("compute-sanitizer") is None:
        session.missing("There is no compute-sanitizer: nothing watches the kernels' memory.")


def find_tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit."""
    return shutil.which(name) or shutil.which(name, path=TOOLKIT)


def install(session: Session, seconds: float) -> str:
    """Make vapt_fast importable for the processes that follow, in a folder of its own; return how."""
    native = _carried(session)
    if native is not None:
        _link(session, native)
        digest = hashlib.sha256(native.read_bytes()).hexdigest()[:12]
        return f"links to this checkout, and {native.name} of {session.wheels} (sha256 {digest}...)"
    if _is_installed():
        return "this checkout was installed already"
    if find_tool("nvcc") is None and not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
        session.missing(
            "There is no nvcc: no CUDA kernels. Carry vapt_fast/_C*.so, or a wheel of this checkout, from a "
            f"machine that has nvcc and Python {sys.version_info.major}.{sys.version_info.minor}, in the "
            "folder of --wheels."
        )
    else:
        site = session.scratch / "site"
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
        environment = session.environment
        session.environment = environment | {"VAPT_FAST_CUDA": "1"}
        code, printed = session.call(seconds, *pip, "--no-build-isolation", "--target", site, ROOT)
        session.environment = environment
        if code == 0:
            session.add_to_path(site)
            return "pip install --no-build-isolation --target"
        why = "it took too long" if code is None else " ".join(printed.split())[-300:]
        session.missing(f"The CUDA kernels could not be compiled, so there are none: {why}")
    _link(session)
    return "links to this checkout"


def _carried(session: Session) -> Path | None:
    """Return the compiled kernels in the folder of wheels, by themselves or in a wheel of vapt_fast."""
    if session.wheels is None:
        return None
    for wheel in sorted(session.wheels.glob("vapt_fast-*.whl")):
        with zipfile.ZipFile(wheel) as file:
            members = [name for name in file.namelist() if Path(name).match("vapt_fast/_C.*")]
            file.extractall(session.scratch / "carried", members)
    found = [*sorted(session.wheels.glob("_C.*")), *(session.scratch / "carried").glob("vapt_fast/_C.*")]
    fitting = [path for path in found if path.name.partition(".")[2] in _suffixes()]
    if found and not fitting:
        session.missing(
            f"{found[0].name} of {session.wheels} is not for this Python ({EXTENSION_SUFFIXES[0]}): "
            "it is left out."
        )
    return fitting[0] if fitting else None


def _suffixes() -> list[str]:
    return [suffix.removeprefix(".") for suffix in EXTENSION_SUFFIXES]


def _link(session: Session, native: Path | None = None) -> None:
    """Put together the package of links to the sources of this checkout."""
    package = session.scratch / "links" / "vapt_fast"
    package.mkdir(parents=True)
    for path in (*(ROOT / "vapt_fast").iterdir(), ROOT / "kernels", *([native] if native else [])):
        if native is None or path == native or not path.name.startswith("_C"):
            (package / path.name).symlink_to(path)
    session.add_to_path(package.parent)


def _is_installed() -> bool:
    """Whether this checkout is installed, in editable mode."""
    try:
        origin = importlib.metadata.distribution("vapt_fast").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    return origin is not None and json.loads(origin)["url"] == ROOT.as_uri()
