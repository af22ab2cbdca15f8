"""Mutation tests of the CUDA kernels, by hand: small changes of a source have to be noticed.

``python tests/cuda_mutants.py [--count N] [--seed N]`` changes the kernels in N places, one at a time. It
compiles each mutant for a CPU (see csrc/emulation), runs the quickest tests of test_cuda_emulation_pool.py,
then AddressSanitizer and ThreadSanitizer, and prints what noticed it. That takes a few
seconds a mutant. See cuda_mutants.md.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import emulation
import test_cuda_emulation_pool as tests
import torch
from emulation import CSRC
from emulation_pool import PoolKernels

SOURCES = [CSRC / name for name in ("prompt_pool.cuh", "prompt_pool_forward.cu", "prompt_pool_backward.cu")]
SECONDS = 200  # for all checks of a mutant

# ---- mutants

# What is replaced, and by what. In the kernels operators stand between spaces, a template's brackets don't.
CHANGES = {
    **{" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != "},
    **{" && ": " || ", " || ": " && "},
    **{" + ": " - ", " - ": " + ", " * ": " + ", " / ": " * ", " % ": " / "},
    **{" += ": " = ", " *= ": " = ", ": 0.0f": ": 1.0f"},
    **dict.fromkeys(("sync_threads();", "sync_cluster();", "sync_warp();", "commit_copies();"), ";"),
    **dict.fromkeys(("continue;", "return;", "break;"), ";"),
}


@dataclass(frozen=True)
class Mutant:
    """One change of a source file: in which line, what that is then, and the file's whole text."""

    source: Path
    line: int
    after: str
    text: str

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}: {self.after.strip()}"


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


# ---- checks of a library

Check = Callable[[PoolKernels], None]


def policy(one_pass: bool, **sizes: int) -> Check:
    """The policy for low precision, of one shape."""

    def check(kernels: PoolKernels) -> None:
        kernels.one_pass = one_pass
        cases = [tests.case(kernels, **sizes, seed=seed) for seed in range(3)]
        tests.assert_policy(tests.pool_case, cases, torch.float16)

    return check


def for_both(test: Callable[[PoolKernels], None]) -> Check:
    """A test that takes turns with and without clusters."""

    def check(kernels: PoolKernels) -> None:
        for kernels.one_pass in (True, False):
            test(kernels)

    return check


def fallbacks(kernels: PoolKernels) -> None:
    for sizes, on in tests.TOO_MUCH_FOR_A_CLUSTER:
        tests.test_clusters_only_where_they_fit_in_the_backward(kernels, sizes, on)


def agreement(kernels: PoolKernels) -> None:
    for sizes in tests.FOR_A_CLUSTER:
        tests.test_both_ways_of_the_backward_agree(kernels, sizes, torch.float16, torch.float32)


CHECKS: dict[str, Check] = {
    "2 images, 33 patches, 136 channels, 35 rows": policy(True, batch=2, patches=33, dim=136, rows=35),
    "the same in two passes": policy(False, batch=2, patches=33, dim=136, rows=35),
    "70 tokens, 24 channels, 3 rows": policy(False, batch=1, prefix=5, patches=65, dim=24, rows=3),
    "the same, 5 images, in one pass": policy(True, batch=5, prefix=5, patches=65, dim=24, rows=3),
    "72 channels, 129 rows": policy(True, batch=1, patches=65, dim=72, rows=129),
    "129 rows in two passes": policy(False, batch=1, patches=3, dim=8, rows=129),
    "a small variance": for_both(tests.test_both_eps_where_the_variance_is_small),
    "clusters that do not fit": tests.test_clusters_only_where_they_fit,
    "clusters that do not fit in the backward": fallbacks,
    "long tokens": tests.test_fewer_long_tokens_are_normalised_at_once,
    "banks": tests.test_rows_of_a_matrix_lie_in_different_banks,
    "one pass and two": agreement,
    "chunks of images": tests.test_chunks_of_images_change_no_image,
    "constant rows": for_both(tests.test_constant_rows),
    "NaN": for_both(tests.test_nan_stays_in_its_image_and_a_prefix_token_out_of_what_is_pooled),
    "NaN in the gradient": for_both(tests.test_nan_in_the_gradient_leaves_prefix_tokens_alone),
    "an image alone": for_both(tests.test_an_image_does_not_depend_on_the_others),
    "rounding of normed": for_both(tests.test_normed_is_rounded_once),
    "what is pooled": for_both(tests.test_what_is_pooled_is_without_the_affine_of_the_norm),
    "layouts": for_both(tests.test_layouts_make_no_difference),
    "absent gradients": for_both(tests.test_absent_gradients_and_factors),
    "no rows": for_both(tests.test_no_rows),
    "far from zero": for_both(
        lambda kernels: tests.test_float32_tokens_as_under_autocast(kernels, torch.float16, 1e4)
    ),
    "many images": for_both(tests.test_many_images_share_a_chunk),
}


def noticed_by(check: Callable[[], str | None]) -> str | None:
    """What ``check`` says, in a process of its own: a mutant may do anything."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(SECONDS)
        said = "it crashes"
        try:
            said = check() or "nothing"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return None if said == "nothing" else said or "it crashes or hangs"


def noticed_by_sanitizers(folder: Path, sources: list[Path], words: list[tuple[int, ...]]) -> str | None:
    """Which of them has something to say of a program that is run with each of ``words``."""
    for name in ("address", "thread"):
        program = emulation.build(folder / name, sources, "-O0", "-w", f"-fsanitize={name}")
        for arguments in words:
            command = [program, *map(str, arguments)]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.stderr or ran.stdout != "finite\n":
                return f"{name} sanitizer"
    return None


SANITIZED = [
    (0, 1, 1, 1, 1, 1, 1, 9, 136, 3),
    (0, 0, 1, 1, 1, 1, 60, 6, 8, 129),
    (0, 1, 1, 0, 0, 3, 1, 20, 136, 17),
]


def noticed(folder: Path) -> str | None:
    """What is wrong with the kernels in ``folder``; None if nothing is noticed."""
    sources = [folder / source.name for source in SOURCES if source.suffix == ".cu"]
    exports = CSRC / "emulation" / "exports.cpp"
    library = emulation.build(folder / "pool.so", [*sources, exports], "-O0", "-w", "-shared")

    def first_failure() -> str | None:
        loaded = ctypes.CDLL(str(library))
        for name, check in CHECKS.items():
            try:
                check(PoolKernels(loaded))
            except (AssertionError, RuntimeError):
                return name
        return None

    program = [*sources, CSRC / "emulation" / "pool.cpp"]
    return noticed_by(first_failure) or noticed_by_sanitizers(folder, program, SANITIZED)


# ---- the program

NO_MUTANT = "it does not compile"


def tried(mutant: Mutant | None) -> str | None:
    """What notices a mutant, or the kernels as they are."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a compiler says of a mutant is of no use
    with tempfile.TemporaryDirectory() as name:
        for source in SOURCES:
            mutated = mutant is not None and mutant.source == source
            Path(name, source.name).write_text(mutant.text if mutated else source.read_text())
        try:
            return noticed(Path(name))
        except subprocess.CalledProcessError:
            return NO_MUTANT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="chooses them")
    arguments = parser.parse_args()
    every = [mutant for source in SOURCES for mutant in mutants(source)]
    picked = random.Random(arguments.seed).sample(every, min(arguments.count, len(every)))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        wrong = pool.submit(tried, None).result()
        if wrong:
            raise SystemExit(f"the kernels themselves: {wrong}")
        running = [(mutant, pool.submit(tried, mutant)) for mutant in picked]
        results: list[str | None] = []
        for mutant, result in running:
            if result.result() != NO_MUTANT:
                results.append(result.result())
                print(f"{mutant}\n    {results[-1] or 'SURVIVED'}", flush=True)
    count = sum(how is not None for how in results)
    print(f"{count} of {len(results)} mutants were noticed; there are {len(every)} places to change")


if __name__ == "__main__":
    main()
