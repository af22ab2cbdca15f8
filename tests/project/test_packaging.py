"""What is shipped, and what pip makes of it with nvcc, without, and with one that fails."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH')}:/usr/local/cuda/bin")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def build(source, what, out):
    """The one file that setuptools makes of the project in ``source``: ``what`` is "wheel" or "sdist"."""
    if int(version("setuptools").partition(".")[0]) < 77:  # not imported: distutils may be, in its place
        pytest.skip("needs setuptools 77")
    out.mkdir()
    code = f"from setuptools.build_meta import build_{what} as build; build({str(out)!r})"
    result = run(sys.executable, "-c", code, cwd=source, env=os.environ | {"VAPT_FAST_CUDA": "0"})
    assert result.returncode == 0, result.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, built in a copy of the project, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "tests", "_C*")
    shutil.copytree(ROOT, folder / "project", ignore=ignored)
    with tarfile.open(build(folder / "project", "sdist", folder / "made")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def test_the_sdist_and_its_wheel_hold_everything(sdist, tmp_path):
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "vapt_fast").rglob("*.py")}
    own.add("vapt_fast/py.typed")  # tells type checkers to read the annotations
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("[!.]*") if path.is_file()}
    kernels = {f"vapt_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {str(path.relative_to(sdist)) for path in sdist.rglob("*")} >= own | sources | {"setup.py"}
    with zipfile.ZipFile(build(sdist, "wheel", tmp_path / "made")) as wheel:
        names = set(wheel.namelist())
    assert names >= own | kernels
    assert not any(name.startswith(("kernels/", "csrc/")) for name in names)


# ---- installs, in environments of their own


class Environment:
    """A virtual environment that sees the packages of the running one, but has its own vapt_fast."""

    def __init__(self, folder, project):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.project, self.python = project, folder / "bin" / "python"
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "running.pth").write_text(sysconfig.get_path("purelib"))
        self.package = site_packages / "vapt_fast"

    def install(self, *options, fails=False, **variables):
        """The output of pip."""
        # pip sees the running environment's vapt_fast, and would want to uninstall it.
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", "--verbose", "--no-deps"]
        variables = {k: v for k, v in os.environ.items() if not k.startswith("VAPT_FAST")} | variables
        result = run(*command, "--ignore-installed", *options, self.project, env=variables)
        output = result.stdout + result.stderr
        assert (result.returncode != 0) == fails, output
        return output

    def run(self, *arguments):
        return subprocess.check_output([self.python, *arguments], cwd="/", text=True)


@pytest.fixture
def environment(sdist, tmp_path):
    """One with an unpacked sdist that nobody has built before."""
    pytest.importorskip("pip")
    return Environment(tmp_path / "environment", shutil.copytree(sdist, tmp_path / "project"))


@pytest.mark.full
@needs_nvcc
def test_an_install_with_nvcc_has_the_kernels(environment):
    assert "Building CUDA object" in environment.install(VAPT_FAST_CUDA="1")
    (module,) = environment.package.glob("_C*")
    assert module.suffix == ".so"
    libraries = subprocess.check_output(["ldd", module], text=True)
    assert "torch" not in libraries
    assert "cuda" not in libraries
    code = "import torch; from vapt_fast import _C; print(_C.__file__)"
    assert environment.run("-c", code).strip() == str(module)
    assert "for sm_90a" in environment.run("-m", "vapt_fast", "info")
    assert "Building CUDA object" not in environment.install(VAPT_FAST_CUDA="1")  # none has changed


def fake_nvcc(folder, *lines):
    """A CUDA_HOME with a script for nvcc."""
    script = folder / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text("\n".join(("#!/bin/sh", *lines, "")))
    script.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        pytest.param([], "there is no bin/nvcc in CUDA_HOME={home}; correct or unset it", id="no nvcc"),
        pytest.param(
            ["echo nvcc fatal error: no licence", "exit 1"],
            "{home}/bin/nvcc --version ended with 1 (nvcc fatal error: no licence); ",
            id="an nvcc that fails",
            marks=pytest.mark.full,
        ),
    ],
)
def test_an_install_without_kernels_says_why(environment, tmp_path, lines, reason):
    """And if they are a must, it fails for that reason."""
    home = fake_nvcc(tmp_path / "cuda", *lines) if lines else tmp_path
    reason = reason.format(home=home)
    # In isolation it is the same, and takes longer: nothing is built.
    output = environment.install("--no-build-isolation", CUDA_HOME=str(home))
    assert f"installing without the CUDA kernels: {reason}" in output
    (note,) = environment.package.glob("_C*")
    assert note.suffix == ".txt"
    info = environment.run("-m", "vapt_fast", "info")
    assert f"installed without its compiled kernels: {reason}" in info
    output = environment.install("--no-build-isolation", fails=True, CUDA_HOME=str(home), VAPT_FAST_CUDA="1")
    assert f"VAPT_FAST_CUDA=1, but the CUDA kernels can't be built: {reason}" in output


@pytest.mark.full
@needs_nvcc
def test_an_install_with_kernels_that_do_not_compile(environment, tmp_path):
    for name in ("first", "second"):  # with another compiler in the same checkout everything begins anew
        compile_nothing = f'case "$*" in *csrc/*.cu*) echo "a.cu(1): error: no {name} thing"; exit 1;; esac'
        home = fake_nvcc(tmp_path / name, compile_nothing, f'exec {NVCC} "$@"')
        environment.install(CUDA_HOME=str(home))
        info = environment.run("-m", "vapt_fast", "info")
        assert "installed without its compiled kernels: " in info
        assert f"cmake --build ended with 1 (a.cu(1): error: no {name} thing)" in info


@pytest.mark.full
def test_an_install_that_does_not_want_them(environment):
    environment.install("--no-build-isolation", VAPT_FAST_CUDA="0")
    info = environment.run("-m", "vapt_fast", "info")
    assert "kernels: VAPT_FAST_CUDA=0 was set when it was installed" in info


@pytest.mark.parametrize(("name", "value"), [("VAPT_FAST_CUDA", "yes"), ("MAX_JOBS", "0")])
@needs_nvcc
def test_settings_that_mean_nothing(sdist, tmp_path, name, value):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    result = run(*command, cwd=sdist, env=os.environ | {name: value})
    assert result.returncode != 0
    assert f"{name} must be" in result.stderr
    assert repr(value) in result.stderr
