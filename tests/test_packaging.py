"""What is shipped: the kernels come along as vapt_fast.kernels, in the wheel and in the sdist."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = {f"vapt_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


def build(source, what, out):
    """The one file that setuptools makes of the project in ``source``: ``what`` is "wheel" or "sdist"."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools.build_meta import build_{what} as build; build({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (file,) = out.iterdir()
    return file


@pytest.fixture
def sdist(tmp_path):
    """The sdist, built in a copy of the project, unpacked."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "tests"))
    (tmp_path / "sdist").mkdir()
    with tarfile.open(build(copy, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    return folder


def test_the_wheel_of_the_sdist_holds_every_module(sdist, tmp_path):
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(build(sdist, "wheel", tmp_path / "wheel")) as wheel:
        names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vapt_fast").rglob("*.py")}
    assert names >= KERNELS | modules
    assert not any(name.startswith("kernels/") for name in names)
