"""Mutation tests of the Triton kernels: each small change of a kernel's source has to be noticed.

``python tests/kill_mutants.py [FILE ...]`` makes the mutants of files of kernels/, runs a few quick checks on
each of them, prints which check notices it, and fails where more than 5% survive; mutants.md says which may.
It takes about a second a mutant, in a process of its own that is forked from this one: torch and the expected
results are there already.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
import torch.nn.functional as F
import vapt_fast.kernels
from interpreter import bfloat16, only_last_program, quick_calls
from kernel_cases import KERNELS, laid_out, precision_cases
from mutants import PER_FILE, Mutant, chosen
from op_cases import assert_policy
from shadow import no_overflow, shadow

from vapt_fast import functional

# Files of kernels/ -> the ops whose checks have to notice what is wrong with them.
FILES = {
    "add_norm": ["add_norm", "prompt_pool"],
    "prompt_pool": ["prompt_pool"],
    "prompt_projector": ["prompt_projector"],
    "prompt_attention": ["prompt_attention", "prompt_attention_packed"],
    "absorbed_attention": ["absorbed_attention"],
    "mlp": ["mlp"],
    "common": ["prompt_pool", "prompt_projector"],
}
CPU_SECONDS = 60
MOST_SURVIVORS = 0.05


# ---- checks

Check = Callable[[], None]


def _run(op: Callable, tensors: list, options: dict, layout: str | None = None) -> list[torch.Tensor]:
    """Outputs and gradients, with everything given in a memory layout."""

    def given(value: Any) -> Any:
        return value if layout is None else laid_out(value, layout)

    leaves = [given(t).detach().requires_grad_() for t in tensors]
    outputs = op(*leaves, **{name: given(value) for name, value in options.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, list(map(given, incoming)), materialize_grads=True)
    return [o.detach() for o in outputs] + list(grads)


def _assert_same(actual: list, expected: list, tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def values(op: str, layout: str, sizes: dict[str, Any]) -> Check:
    """In float64, under the shadow memory, against the formula."""
    torch.manual_seed(0)
    function, formula, tensors, options = KERNELS[op].make(**sizes)
    expected = _run(formula, tensors, options)

    def check() -> None:
        with shadow() as findings:
            actual = _run(function, tensors, options | {"backend": "triton"}, layout)
        if findings:
            raise AssertionError(str(findings[0]))
        _assert_same(actual, expected, 1e-10)

    return check


def far_apart(op: str, sizes: dict[str, Any], dim: int, stride: int) -> Check:
    """With ``stride`` between neighbours in a dimension of each tensor, under the shadow memory.

    What leaves 32 bits on the way raises.
    """
    torch.manual_seed(0)
    function, _, tensors, options = KERNELS[op].make(**sizes)
    tensors = [t.float() for t in tensors]
    options = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = _run(function, tensors, options | {"backend": "torch"})

    given = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor) and t.ndim > max(dim, 1)]
    farthest = max((tensor.shape[dim] - 1) * stride for tensor in given)

    def check() -> None:
        memory = torch.empty(farthest + 2**20)  # only the pages that are written take any
        starts = iter(range(0, 2**20, 2**14))

        def apart(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.ndim:
                return value
            strides = list(torch.empty(value.shape).stride())
            if value.ndim > max(dim, 1):
                strides[dim] = stride
            return memory[next(starts) :].as_strided(value.shape, strides).copy_(value)

        distant = {name: apart(value) for name, value in options.items()}
        with shadow() as findings, no_overflow():
            actual = _run(function, list(map(apart, tensors)), distant | {"backend": "triton"})
        if findings:
            raise AssertionError(str(findings[0]))
        _assert_same(actual, expected, 1e-4)

    return check


def precision(op: str, dtype: torch.dtype) -> Check:
    """The policy for low precision, with fewer seeds."""

    def on_triton(cases: Iterator[tuple]) -> Iterator[tuple]:
        for function, formula, tensors, options in cases:
            yield partial(function, backend="triton"), formula, tensors, options

    def check() -> None:
        with bfloat16():
            assert_policy(KERNELS[op].make, on_triton(precision_cases(op, 1.0, 3)), dtype)

    return check


def zero_prompts() -> None:
    """As they are at first: the derivative of relu at 0 is 0, as PyTorch has it."""
    torch.manual_seed(0)
    function, formula, (pooled, bias, *weights), options = KERNELS["prompt_projector"].make()
    tensors = [torch.zeros_like(pooled), torch.zeros_like(bias), *weights]
    actual = _run(function, tensors, options | {"backend": "triton"})
    _assert_same(actual, _run(formula, tensors, options), 1e-10)


def norm_of_the_rounded_sum() -> None:
    """What is normalised is the sum as it is returned, so that the backward sees the same."""
    torch.manual_seed(0)
    x, branch = torch.randn(2, 1, 4, 64).half()
    total, normed = functional.add_norm(x, branch, eps=1e-6, backend="triton")
    expected = F.layer_norm(total.double(), (64,), eps=1e-6).half()
    if (normed != expected).double().mean() > 0.02:
        raise AssertionError("not the norm of the rounded sum")


def bias_of_each_image() -> None:
    torch.manual_seed(0)
    function, formula, tensors, options = KERNELS["prompt_attention"].make(heads=2, groups=2)
    options["bias"] = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    actual = _run(function, tensors, options | {"backend": "triton"})
    _assert_same(actual, _run(formula, tensors, options), 1e-10)


def many_statistics() -> None:
    """More than 2^31 rows of queries, of which the last ones are computed."""
    tensors = [torch.ones(1, 64, 1, 1).half().expand(2**25 + 64, -1, -1, -1) for _ in range(5)]
    with no_overflow(), only_last_program(), torch.no_grad():
        out = functional.prompt_attention(*tensors, scale=1.0, backend="triton")
    _assert_same([out[-1]], [tensors[0][-1]], 0)


# Checks of one op alone.
ALONE = {
    "prompt_attention": {"bias of each image": bias_of_each_image, "many statistics": many_statistics},
    "add_norm": {"norm of the rounded sum": norm_of_the_rounded_sum},
    "prompt_projector": {"zero prompts": zero_prompts},
}


def checks(op: str) -> dict[str, Check]:
    """All checks of an op, those that notice most first."""
    quick = KERNELS[op].quick
    made = {
        f"{op} {' '.join(f'{k}={v}' for k, v in sizes.items())}": values(
            op, ("transposed", "padded rows")[i % 2], sizes
        )
        for i, sizes in enumerate(quick)
    }
    made |= ALONE.get(op, {})
    made |= {f"{op} far apart {i}": far_apart(op, *far) for i, far in enumerate(KERNELS[op].far)}
    return made | {
        f"{op} {str(dtype)[6:]}": precision(op, dtype) for dtype in (torch.float16, torch.bfloat16)
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
                with quick_calls():
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
