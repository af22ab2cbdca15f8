"""Mutation tests of the Triton kernels: each small change of a kernel's source has to be noticed.

``python tests/tools/kill_mutants.py [FILE ...]`` makes mutants of files of kernels/, runs a few quick checks
on each, prints which check notices it, and fails where more than 5% survive; mutants.md says which may.
A mutant takes a second or two, in a process of its own that is forked from this one: torch is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
import vapt_fast.kernels
from interpreter import only_last_program, quick_calls
from kernel_cases import KERNELS
from kernel_checks import check_far_offsets, check_precision, check_values
from mutants import PER_FILE, Mutant, chosen
from op_cases import cls_case
from shadow import no_overflow

sys.path.append(str(Path(__file__).parents[1] / "kernels" / "interpreted"))
sys.path.append(str(Path(__file__).parents[1] / "ops"))

import test_attention
import test_norms
import test_projector
import test_prompt_lengths
import test_quantise

from vapt_fast import functional, use_backend

# Files of kernels/ -> the ops whose checks have to notice what is wrong with them.
FILES = {
    "add_norm": ["add_norm", "prompt_pool"],
    "prompt_pool": ["prompt_pool"],
    "prompt_projector": ["prompt_projector", "prompt_projector_in_registers"],
    "prompt_projector_in_registers": ["prompt_projector_in_registers"],
    "prompt_attention": ["prompt_attention", "prompt_attention_packed"],
    "absorbed_attention": ["absorbed_attention"],
    "mlp": ["mlp"],
    "fp8_linear": ["fp8_linear"],
    "common": ["prompt_pool", "prompt_projector", "absorbed_attention"],
}
CPU_SECONDS = 60
MOST_SURVIVORS = 0.05


Check = Callable[[], None]


def checks(op: str) -> dict[str, Check]:
    """All checks of an op, those that notice most first."""
    if op not in KERNELS:
        return {f"{op} {i}": check for i, check in enumerate(ALONE[op])}
    kernels = KERNELS[op]
    made: dict[str, Check] = {}
    for i, sizes in enumerate(kernels.quick):
        layout = ("transposed", "padded rows")[i % 2]
        made[f"{op} {' '.join(f'{k}={v}' for k, v in sizes.items())}"] = partial(
            check_values, op, sizes, layout
        )
    made |= {f"{op} alone {i}": check for i, check in enumerate(ALONE.get(op, ()))}
    made |= {f"{op} far apart {i}": partial(check_far_offsets, op, *far) for i, far in enumerate(kernels.far)}
    for dtype in (torch.float16, torch.bfloat16):
        made[f"{op} {str(dtype)[6:]}"] = partial(check_precision, op, dtype, count=3)
    return made


def many_statistics() -> None:
    """More than 2^31 rows of queries, of which the last ones are computed."""
    tensors = [torch.ones(1, 64, 1, 1).half().expand(2**25 + 64, -1, -1, -1) for _ in range(5)]
    with no_overflow(), only_last_program(), torch.no_grad():
        out = functional.prompt_attention(*tensors, scale=1.0, backend="triton")
    torch.testing.assert_close(out[-1], tensors[0][-1])


# Checks of one op alone: tests, and what would take too long as one.
ALONE: dict[str, list[Check]] = {
    "prompt_attention": [
        partial(test_attention.test_a_bias_may_be_of_each_image_or_of_all_heads, (2, 2, 5, 7)),
        many_statistics,
    ],
    "absorbed_attention": [
        partial(test_attention.test_numbers_of_prompts_far_apart_in_memory, cls_case),
        partial(test_prompt_lengths.test_gradients_of_padding_are_zero_whatever_comes_in, cls_case),
        test_attention.test_more_than_2_31_elements_of_absorbed_attention,
    ],
    "add_norm": [partial(test_norms.test_what_is_normalised_is_the_sum_as_it_is_returned, "triton")],
    "fp8_linear": [
        *(
            partial(test_quantise.test_the_same_as_torch, torch.bfloat16, (5, 272), layout)
            for layout in ("rows", "transposed", "every other")
        ),
        partial(test_quantise.test_the_same_as_torch, torch.float32, (33, 80), "transposed"),
        partial(test_quantise.test_the_same_as_torch, torch.float32, (2, 8208), "rows"),
        partial(test_quantise.test_of_the_gelu, torch.float32),
        test_quantise.test_odd_rows,
        test_quantise.test_far_apart,
    ],
    "prompt_projector": [partial(test_projector.test_prompts_of_zero, torch.float64, "relu")],
    "prompt_projector_in_registers": [
        *(partial(test_projector.in_registers, 3, check_values, sizes) for sizes in test_projector.CASES),
        *(partial(test_projector.in_registers, 3, check_far_offsets, *far) for far in test_projector.OWN.far),
    ],
}


# ---- running them

# The name of the check that notices a mutant, and how; None if none does.
Notice = tuple[str, str] | None


def noticed_by(source: str | None, file: str, suite: dict[str, Check]) -> Notice:
    """The first check of ``suite`` that fails with ``source`` in the place of a file; None is the file."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        notice: Notice = ("all", "it took the process down")
        try:
            notice = _first_failure(source, file, suite)
        finally:
            os.write(write, json.dumps(notice).encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "all", f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return json.loads(message)


def _first_failure(source: str | None, file: str, suite: dict[str, Check]) -> Notice:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with tempfile.TemporaryDirectory() as folder:
        if source is not None:
            Path(folder, f"{file}.py").write_text(source)
            vapt_fast.kernels.__path__.insert(0, folder)
        for name, check in suite.items():
            try:
                with quick_calls(), use_backend("triton"):
                    check()
            except Exception as error:
                how = next((line for line in str(error).splitlines() if line.strip()), "")
                return name, f"{type(error).__name__}: {how}"[:160]
    return None


def suite_of(file: str) -> dict[str, Check]:
    """The checks for a file of kernels/."""
    return {name: check for op in FILES[file] for name, check in checks(op).items()}


def survivors(file: str, picked: list[Mutant]) -> list[str]:
    """The names of those mutants ``picked`` that no check notices; prints what notices the others.

    Raises:
        AssertionError: the checks fail for the file as it is.
    """
    suite = suite_of(file)
    wrong = noticed_by(None, file, suite)
    if wrong:
        raise AssertionError(f"{file} fails as it is: {wrong}")
    if not noticed_by("raise ImportError('this file is read')", file, suite):
        raise AssertionError(f"mutants of {file} are not what runs")
    survived = []
    for mutant in picked:
        check, how = noticed_by(mutant.source, file, suite) or (None, None)
        print(f"{file}:{mutant.node.lineno} {mutant.name}\n    {check or 'SURVIVED'}: {how}", flush=True)
        if check is None:
            survived.append(mutant.name)
    return survived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="*", default=list(FILES), help="of kernels/, without .py")
    parser.add_argument("--count", type=int, default=PER_FILE, help="mutants of each file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    total = survived = 0
    for file in arguments.file:
        picked = chosen(file, arguments.count)
        names = survivors(file, picked)
        total, survived = total + len(picked), survived + len(names)
        noticed = len(picked) - len(names)
        print(f"{file}: {noticed} of {len(picked)} were noticed, all but", *names, sep="\n    ")
    if survived > MOST_SURVIVORS * total:
        sys.exit(f"{survived} of {total} mutants survived")


if __name__ == "__main__":
    main()
