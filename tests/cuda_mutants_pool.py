"""Mutation tests of prompt_pool's CUDA kernels: each small change of the source has to be noticed.

``python tests/cuda_mutants_pool.py`` compiles each mutant in cuda_mutants_pool.txt for a CPU (see
csrc/emulation), runs the quickest tests of test_cuda_emulation_pool.py on it, then AddressSanitizer and
ThreadSanitizer, and writes to cuda_mutants_pool.json what noticed it. It takes a few seconds a mutant.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import emulation
import test_cuda_emulation_pool as tests
import torch
from cuda_mutants import mutants, source_hash
from emulation import CSRC
from emulation_pool import PoolKernels

SOURCE = CSRC / "prompt_pool.cu"
LIST = Path(__file__).with_suffix(".txt")
TABLE = Path(__file__).with_suffix(".json")
SECONDS = 200  # for all tests of a mutant

Check = Callable[[PoolKernels], None]


def policy(one_pass: bool, **sizes: int) -> Check:
    """The policy for low precision, of one shape."""

    def check(kernels: PoolKernels) -> None:
        kernels.one_pass = one_pass
        cases = [tests.case(kernels, **sizes, seed=seed) for seed in range(3)]
        tests.assert_policy(tests.pool_case, cases, torch.float16)

    return check


def for_both(test: Callable[[PoolKernels, bool], None]) -> Check:
    """A test that takes turns with and without clusters."""

    def check(kernels: PoolKernels) -> None:
        for one_pass in (True, False):
            test(kernels, one_pass)

    return check


CHECKS: dict[str, Check] = {
    "2 images, 33 patches, 136 channels, 35 rows": policy(True, batch=2, patches=33, dim=136, rows=35),
    "the same in two passes": policy(False, batch=2, patches=33, dim=136, rows=35),
    "70 tokens, 24 channels, 3 rows": policy(False, batch=1, prefix=5, patches=65, dim=24, rows=3),
    "72 channels, 129 rows": policy(True, batch=1, patches=65, dim=72, rows=129),
    "129 rows in two passes": policy(False, batch=1, patches=3, dim=8, rows=129),
    "a small variance": for_both(tests.test_both_eps_where_the_variance_is_small),
    "clusters that do not fit": tests.test_clusters_only_where_they_fit,
    "constant rows": tests.test_constant_rows,
    "NaN": for_both(tests.test_nan_stays_in_its_image_and_a_prefix_token_out_of_what_is_pooled),
    "an image alone": for_both(tests.test_an_image_does_not_depend_on_the_others),
    "layouts": for_both(tests.test_layouts_make_no_difference),
    "absent gradients": tests.test_absent_gradients_and_gain,
    "far from zero": lambda kernels: tests.test_float32_tokens_as_under_autocast(
        kernels, torch.float16, False, 1e4
    ),
    "many images": tests.test_many_images_share_a_chunk,
}

SANITIZED = [(0, 1, 1, 1, 1, 1, 9, 136, 3), (0, 0, 1, 1, 1, 60, 6, 8, 129)]
SANITIZERS = {
    "AddressSanitizer": ("-O0", "-w", "-fsanitize=address"),
    "ThreadSanitizer": ("-O0", "-w", "-fsanitize=thread"),
}


def noticed_by_tests(library: Path) -> str | None:
    """The first of CHECKS that fails, in a process of its own: a mutant may do anything."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(SECONDS)
        said = "it crashes"
        try:
            said = _first_failure(ctypes.CDLL(str(library))) or "nothing"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return None if said == "nothing" else said or "it crashes or hangs"


def _first_failure(library: ctypes.CDLL) -> str | None:
    for name, check in CHECKS.items():
        try:
            check(PoolKernels(library))
        except (AssertionError, RuntimeError):
            return name
    return None


def noticed_by_sanitizers(folder: Path, source: Path) -> str | None:
    for name, flags in SANITIZERS.items():
        program = emulation.build(folder / name, [source, CSRC / "emulation" / "pool.cpp"], *flags)
        for words in SANITIZED:
            command = [program, *map(str, words)]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.stderr or ran.stdout != "finite\n":
                return name
    return None


def noticed(folder: Path, text: str) -> str | None:
    """What notices ``text`` in the source's place; None if nothing does."""
    source = folder / SOURCE.name
    source.write_text(text)
    exports = CSRC / "emulation" / "exports_pool.cpp"
    library = emulation.build(folder / "pool.so", [source, exports], "-O0", "-w", "-shared")
    return noticed_by_tests(library) or noticed_by_sanitizers(folder, source)


def main() -> None:
    text = SOURCE.read_text()
    torch.set_num_threads(1)
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        found = noticed(Path(folder), text)
        if found:
            raise SystemExit(f"the kernels themselves: {found}")
        for mutant in mutants(LIST):
            table[mutant.name] = noticed(Path(folder), text.replace(mutant.before, mutant.after))
            print(mutant.name, "=>", table[mutant.name], flush=True)
    TABLE.write_text(json.dumps({"source": source_hash(SOURCE), "noticed": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
