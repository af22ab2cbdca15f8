"""Mutation tests of prompt_pool's CUDA kernels: each small change of a source has to be noticed.

``python tests/cuda_mutants_pool.py`` compiles each mutant in cuda_mutants_pool.txt for a CPU (see
csrc/emulation), runs the quickest tests of test_cuda_emulation_pool.py on it, then AddressSanitizer and
ThreadSanitizer, and writes to cuda_mutants_pool.json what noticed it. It takes a few seconds a mutant. While
the kernels do not change, those that the table has as noticed are not run again.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import emulation
import test_cuda_emulation_pool as tests
import torch
from cuda_mutants import mutants, source_hash
from emulation import CSRC
from emulation_pool import PoolKernels

SOURCES = [CSRC / name for name in ("prompt_pool.cuh", "prompt_pool_forward.cu", "prompt_pool_backward.cu")]
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
    "layouts": for_both(tests.test_layouts_make_no_difference),
    "absent gradients": for_both(tests.test_absent_gradients_and_gain),
    "no rows": for_both(tests.test_no_rows),
    "far from zero": for_both(
        lambda kernels: tests.test_float32_tokens_as_under_autocast(kernels, torch.float16, 1e4)
    ),
    "many images": for_both(tests.test_many_images_share_a_chunk),
}

SANITIZED = [
    (0, 1, 1, 1, 1, 1, 9, 136, 3),
    (0, 0, 1, 1, 1, 60, 6, 8, 129),
    (0, 1, 1, 0, 3, 1, 20, 136, 17),
]
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


def noticed_by_sanitizers(folder: Path, sources: list[Path]) -> str | None:
    for name, flags in SANITIZERS.items():
        program = emulation.build(folder / name, [*sources, CSRC / "emulation" / "pool.cpp"], *flags)
        for words in SANITIZED:
            command = [program, *map(str, words)]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.stderr or ran.stdout != "finite\n":
                return name
    return None


def noticed(before: str = "", after: str = "") -> str | None:
    """What notices ``after`` in the place of ``before``, which is in one of the sources; None if nothing."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in SOURCES:
            (folder / source.name).write_text(source.read_text().replace(before or "\0", after))
        sources = [folder / source.name for source in SOURCES if source.suffix == ".cu"]
        exports = CSRC / "emulation" / "exports_pool.cpp"
        library = emulation.build(folder / "pool.so", [*sources, exports], "-O0", "-w", "-shared")
        return noticed_by_tests(library) or noticed_by_sanitizers(folder, sources)


def main() -> None:
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    known = known["noticed"] if known.get("source") == source_hash(*SOURCES) else {}
    table = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.submit(noticed).result()
        if found:
            raise SystemExit(f"the kernels themselves: {found}")
        running = {
            mutant.name: pool.submit(noticed, mutant.before, mutant.after)
            for mutant in mutants(LIST)
            if known.get(mutant.name) is None
        }
        for mutant in mutants(LIST):
            table[mutant.name] = known.get(mutant.name) or running[mutant.name].result()
            if mutant.name in running:
                print(mutant.name, "=>", table[mutant.name], flush=True)
    TABLE.write_text(json.dumps({"source": source_hash(*SOURCES), "noticed": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
