"""The machine code of the CUDA kernels in vapt_fast._C, which takes no GPU to read."""

from __future__ import annotations

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
            sizes.setdefault(kernel.rstrip(":"), {})[architecture] = int(re.search(r"STACK:(\d+)", usage)[1])
    names = _readable(list(sizes))
    return {names[kernel]: of for kernel, of in sizes.items()}


def instructions(native: ModuleType, architecture: str) -> dict[str, Counter[str]]:
    """Kernel -> how often which instruction of the machine code of one architecture occurs in it."""
    dump = _dump(native, "-sass", "-arch", architecture)
    code = {
        kernel: Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body, re.MULTILINE))
        for kernel, body in _by("Function : ", dump)
    }
    names = _readable(list(code))
    return {names[kernel]: counts for kernel, counts in code.items()}


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


def _readable(symbols: list[str]) -> dict[str, str]:
    """Symbol -> "prompt_pool_forward normalise<BFloat16>": its file, its function."""
    command = [find_tool("c++filt"), "--no-params"]
    demangled = subprocess.run(
        command, input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # nvcc names the unnamed namespace of a file by the file.
    files = [re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_[0-9a-f]{8}", symbol)[1] for symbol in symbols]
    clean = (re.sub(r"vapt_fast::(\(anonymous namespace\)::)?", "", name) for name in demangled)
    return {s: f"{file} {name}" for s, file, name in zip(symbols, files, clean, strict=True)}
