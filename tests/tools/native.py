"""The machine code of the CUDA kernels in vapt_fast._C, which takes no GPU to read."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import ModuleType


def find_tool(name: str) -> str | None:
    """Where a tool for binaries is: on the PATH, in the CUDA toolkit, or in Triton, which brings some."""
    folders = [os.environ["PATH"], "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


MISSING = [name for name in ("cuobjdump", "nvdisasm", "c++filt") if find_tool(name) is None]


def stacks(native: ModuleType) -> dict[str, dict[str, int]]:
    """Kernel -> architecture -> bytes of a thread's stack, which is where spilled registers go."""
    sizes: dict[str, dict[str, int]] = {}
    for architecture, dump in _by("arch = ", _dump(native, "--dump-resource-usage")):
        for kernel, usage in _by("Function ", dump):
            sizes.setdefault(_readable(kernel.rstrip(":")), {})[architecture] = int(
                re.search(r"STACK:(\d+)", usage)[1]
            )
    return sizes


def instructions(native: ModuleType, architecture: str) -> dict[str, Counter[str]]:
    """Kernel -> how often which instruction of the machine code of one architecture occurs in it."""
    pattern = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)"
    return {
        _readable(kernel): Counter(re.findall(pattern, body, re.MULTILINE))
        for kernel, body in _by("Function : ", _dump(native, "-sass", "-arch", architecture))
    }


def _dump(native: ModuleType, *options: str) -> str:
    path = os.pathsep.join((str(Path(find_tool("nvdisasm")).parent), os.environ["PATH"]))
    command = [find_tool("cuobjdump"), *options, native.__file__]
    result = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    return result.stdout


def _by(heading: str, dump: str) -> list[tuple[str, str]]:
    """The parts of a dump that begin with ``heading``: the rest of its line, what follows."""
    parts = dump.split(heading)[1:]
    return [(line.strip(), body) for line, _, body in (part.partition("\n") for part in parts)]


@functools.cache
def _readable(symbol: str) -> str:
    """A kernel's name with its template's arguments, without namespaces."""
    name = subprocess.run(
        [find_tool("c++filt"), "--no-params", symbol], capture_output=True, text=True, check=True
    ).stdout.strip()
    return re.sub(r"(\w+|\(anonymous namespace\))::", "", name.removeprefix("void "))
