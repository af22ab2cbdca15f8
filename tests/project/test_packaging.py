"""What is shipped, and what pip makes of it with nvcc, without, and with one that fails."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {f"vapt_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("[!.]*") if path.is_file()}
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "vapt_fast").rglob("*.py")}
TYPED = {"vapt_fast/py.typed"}  # tells type checkers to read the annotations
NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH')}:/usr/local/cuda/bin")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


def build(source, what, out):
    """The one file that setuptools makes of the project in ``source``: ``what`` is "wheel" or "sdist"."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools.build_meta import build_{what} as build; build({str(out)!r})"
    environment = os.environ | {"VAPT_FAST_CUDA": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, check=True, capture_output=True)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, built in a copy of the project, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "tests", "_C*")
    shutil.copytree(ROOT, folder / "project", ignore=ignored)
    (folder / "made").mkdir()
    with tarfile.open(build(folder / "project", "sdist", folder / "made")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def test_the_sdist_holds_everything(sdist):
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*")}
    assert names >= MODULES | SOURCES | TYPED | {"setup.py"}


def test_the_wheel_of_the_sdist_holds_every_module(sdist, tmp_path):
    with zipfile.ZipFile(build(sdist, "wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
    assert names >= KERNELS | MODULES | TYPED
    assert not any(name.startswith(("kernels/", "csrc/")) for name in names)


# ---- installs, in environments of their own


class Environment:
    """A virtual environment that sees the packages of the running one, but has its own vapt_fast."""

    def __init__(self, folder):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (self.site_packages,) = folder.glob("lib/python*/site-packages")
        self.site_packages.joinpath("running.pth").write_text(sysconfig.get_path("purelib"))

    def install(self, project, *options, **environment):
        """The output of pip, and whether it succeeded."""
        # pip sees the running environment's vapt_fast, and would want to uninstall it.
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", "--verbose", "--no-deps"]
        command += ["--ignore-installed", *options, project]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("VAPT_FAST")} | environment
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return result.stdout + result.stderr, result.returncode == 0

    def run(self, *arguments):
        command = [self.python, *arguments]
        return subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout

    def info(self):
        return self.run("-m", "vapt_fast", "info")


@pytest.fixture
def environment(tmp_path):
    pytest.importorskip("pip")
    return Environment(tmp_path / "environment")


@pytest.fixture
def project(sdist, tmp_path):
    """An unpacked sdist that nobody has built before."""
    return shutil.copytree(sdist, tmp_path / "project")


@pytest.mark.full
@needs_nvcc
def test_an_install_with_nvcc_has_the_kernels(project, environment):
    # PTX alone takes the least time.
    options = {"VAPT_FAST_CUDA": "1", "VAPT_FAST_CUDA_ARCHS": "80-virtual;90-virtual"}
    output, succeeded = environment.install(project, **options)
    assert succeeded, output
    assert "Building CUDA object" in output
    (module,) = (environment.site_packages / "vapt_fast").glob("_C*")
    assert module.suffix == ".so"
    libraries = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "torch" not in libraries
    assert "cuda" not in libraries
    code = "import torch; from vapt_fast import _C; print(_C.__file__, _C.architectures)"
    assert environment.run("-c", code).split() == [str(module), "80-virtual,90-virtual"]
    assert "for 80-virtual, 90-virtual" in environment.info()
    output, succeeded = environment.install(project, **options)
    assert succeeded, output
    assert "Building CUDA object" not in output  # none has changed


def assert_installs_without_kernels(environment, project, reason, **options):
    """The install succeeds, and says why it has no kernels; if they are a must, it fails for that reason."""
    # In isolation it is the same, and takes longer: nothing is built.
    pytest.importorskip("setuptools", minversion="77")
    output, succeeded = environment.install(project, "--no-build-isolation", **options)
    assert succeeded, output
    assert f"installing without the CUDA kernels: {reason}" in output
    (note,) = (environment.site_packages / "vapt_fast").glob("_C*")
    assert note.suffix == ".txt"
    assert f"installed without its compiled kernels: {reason}" in environment.info()
    output, succeeded = environment.install(project, "--no-build-isolation", **options, VAPT_FAST_CUDA="1")
    assert not succeeded
    assert f"VAPT_FAST_CUDA=1, but the CUDA kernels can't be built: {reason}" in output


def test_an_install_without_nvcc(project, environment, tmp_path):
    reason = f"there is no bin/nvcc in CUDA_HOME={tmp_path}; correct or unset it"
    assert_installs_without_kernels(environment, project, reason, CUDA_HOME=str(tmp_path))


def fake_nvcc(folder, *lines):
    """A CUDA_HOME with a script for nvcc."""
    script = folder / "cuda" / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text("\n".join(("#!/bin/sh", *lines, "")))
    script.chmod(0o755)
    return {"CUDA_HOME": str(folder / "cuda")}, script


def test_an_install_with_an_nvcc_that_fails(project, environment, tmp_path):
    home, script = fake_nvcc(tmp_path, "echo nvcc fatal error: no licence", "exit 1")
    reason = f"{script} --list-gpu-arch ended with 1 (nvcc fatal error: no licence); "
    assert_installs_without_kernels(environment, project, reason, **home)


@pytest.mark.full
@needs_nvcc
def test_an_install_with_kernels_that_do_not_compile(project, environment, tmp_path):
    for name in ("first", "second"):  # with another compiler in the same checkout everything begins anew
        compile_nothing = f'case "$*" in *csrc/*.cu*) echo "a.cu(1): error: no {name} thing"; exit 1;; esac'
        home, _ = fake_nvcc(tmp_path / name, compile_nothing, f'exec {NVCC} "$@"')
        output, succeeded = environment.install(project, **home, VAPT_FAST_CUDA_ARCHS="90a-real")
        assert succeeded, output
        info = environment.info()
        assert "installed without its compiled kernels: " in info
        assert f"cmake --build ended with 1 (a.cu(1): error: no {name} thing)" in info


def test_an_install_that_does_not_want_them(project, environment):
    pytest.importorskip("setuptools", minversion="77")
    output, succeeded = environment.install(project, "--no-build-isolation", VAPT_FAST_CUDA="0")
    assert succeeded, output
    assert "kernels: VAPT_FAST_CUDA=0 was set when it was installed" in environment.info()


@pytest.mark.parametrize(
    ("name", "value"), [("VAPT_FAST_CUDA", "yes"), ("VAPT_FAST_CUDA_ARCHS", "native"), ("MAX_JOBS", "0")]
)
@needs_nvcc
def test_settings_that_mean_nothing(project, tmp_path, name, value):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    environment = os.environ | {name: value}
    result = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert f"{name} must be" in result.stderr
    assert repr(value) in result.stderr
