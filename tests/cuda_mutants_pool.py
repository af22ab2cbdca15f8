"""Mutation tests of prompt_pool's CUDA kernels, by hand: small changes of a source have to be noticed.

``python tests/cuda_mutants_pool.py [--count N] [--seed N]`` is to prompt_pool what cuda_mutants.py is to
prompt_attention. Its checks are the quickest tests of test_cuda_emulation_pool.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import emulation
import test_cuda_emulation_pool as tests
import torch
from cuda_mutants import noticed_by, noticed_by_sanitizers, run
from emulation import CSRC
from emulation_pool import PoolKernels

SOURCES = [CSRC / name for name in ("prompt_pool.cuh", "prompt_pool_forward.cu", "prompt_pool_backward.cu")]

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

SANITIZED = [
    (0, 1, 1, 1, 1, 1, 1, 9, 136, 3),
    (0, 0, 1, 1, 1, 1, 60, 6, 8, 129),
    (0, 1, 1, 0, 0, 3, 1, 20, 136, 17),
]


def noticed(folder: Path) -> str | None:
    """What is wrong with the kernels in ``folder``; None if nothing is noticed."""
    sources = [folder / source.name for source in SOURCES if source.suffix == ".cu"]
    exports = CSRC / "emulation" / "exports_pool.cpp"
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


if __name__ == "__main__":
    run(noticed, SOURCES, __doc__)
