"""Mutation tests of the CUDA kernels, by hand or nightly: small changes of a source have to be noticed.

``python tests/tools/cuda_mutants.py [--count N] [--seed N]`` changes the kernels in N places, one at a time,
in a copy of csrc. It runs the tests of what they compute on each mutant, compiled for a CPU (csrc/emulation),
at last under sanitizers, and prints which test noticed it. That takes about a minute a mutant and processor.
See cuda_mutants.md.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = {op: f"tests/kernels/test_cuda_{op}.py" for op in ("prompt_attention", "prompt_pool")}
CPU_SECONDS = 300  # of each process of a mutant, whose tests take a minute if it does not hang
NO_MUTANT = "it does not compile"

# What is replaced, and by what. In the kernels operators stand between spaces, a template's brackets don't.
CHANGES = {
    **{" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != "},
    **{" && ": " || ", " || ": " && "},
    **{" + ": " - ", " - ": " + ", " * ": " + ", " / ": " * ", " % ": " / "},
    **{" += ": " = ", " *= ": " = ", ": 0.0f": ": 1.0f"},
    **dict.fromkeys(("sync_threads();", "sync_cluster();", "sync_warp();", "cp_async_commit();"), ";"),
    **dict.fromkeys(("fence_shared();", "wgmma_fence();", "wgmma_commit();"), ";"),
    **dict.fromkeys(("continue;", "return;", "break;"), ";"),
}


def sources() -> list[Path]:
    """The files of the kernels, and of what launches them."""
    return sorted(source for op in TESTS for source in (ROOT / "csrc").glob(f"{op}/*.cu*"))


@dataclass(frozen=True)
class Mutant:
    """One change of a source file: in which line, what that is then, and the file's whole text."""

    source: Path
    line: int
    after: str
    text: str

    def __str__(self) -> str:
        return f"{self.source.relative_to(ROOT)}:{self.line}: {self.after.strip()}"


def mutants(source: Path) -> Iterator[Mutant]:
    """Every change of CHANGES to the kernels of ``source``: to no comment, directive, constant or message."""
    lines = source.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if re.search(r'^#|"|constexpr|template', code):
            continue
        for before, after in CHANGES.items():
            for found in re.finditer(re.escape(before), code):
                changed = line[: found.start()] + after + line[found.end() :]
                text = "".join([*lines[:number], changed, *lines[number + 1 :]])
                yield Mutant(source, number + 1, changed, text)


def noticed(mutant: Mutant | None) -> str | None:
    """Return which test fails first on a mutant, or on the kernels as they are; None if all pass."""
    tests = TESTS.values() if mutant is None else [TESTS[mutant.source.parent.name]]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "csrc", Path(folder, "csrc"))
        if (ROOT / "build" / "emulation").exists():  # what does not depend on the mutant
            shutil.copytree(ROOT / "build" / "emulation", Path(folder, "build", "emulation"))
        if mutant is not None:
            Path(folder, mutant.source.relative_to(ROOT)).write_text(mutant.text)
        environment = os.environ | {"VAPT_FAST_TEST_CSRC": str(Path(folder, "csrc")), "COLUMNS": "500"}
        # By the processor's time: by the clock, a busy machine would take any mutant for one that hangs.
        limited = ["sh", "-c", f'ulimit -S -t {CPU_SECONDS} && exec "$@"', "sh"]
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", *tests]
        ran = subprocess.run([*limited, *pytest], cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode == -signal.SIGXCPU:
        return "it hangs"
    if ran.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(.*)", ran.stdout, re.MULTILINE)
    if failed is None:
        return "it crashes"
    return NO_MUTANT if "CalledProcessError" in failed[1] else failed[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="chooses them")
    arguments = parser.parse_args()
    every = [mutant for source in sources() for mutant in mutants(source)]
    picked = random.Random(arguments.seed).sample(every, min(arguments.count, len(every)))
    wrong = noticed(None)
    if wrong:
        raise SystemExit(f"the kernels themselves: {wrong}")
    tried = survived = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, how in zip(picked, pool.map(noticed, picked), strict=True):
            if how != NO_MUTANT:
                tried, survived = tried + 1, survived + (how is None)
                print(f"{mutant}\n    {how or 'SURVIVED'}", flush=True)
    print(f"{tried - survived} of {tried} mutants were noticed; there are {len(every)} places to change")


if __name__ == "__main__":
    main()
