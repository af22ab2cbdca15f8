"""Mutation tests of prompt_attention's CUDA kernels, by hand: small changes of the source have to be noticed.

``python tests/cuda_mutants.py [--count N] [--seed N]`` changes the kernels in N places, one at a time. It
compiles each mutant for a CPU (see csrc/emulation), runs a few quick checks on it, then AddressSanitizer and
ThreadSanitizer, and prints what noticed it. That takes a few seconds a mutant. See cuda_mutants.md.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from ctypes import c_int64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulation
import torch
from emulation import CSRC, GRADS, INPUTS, INVALID, OK, Kernels, Tensor4
from ops import attention_formula

SOURCES = [CSRC / "prompt_attention.cu"]
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


# ---- checks of a library: what is wrong, or None

SIZES = [
    # B, queries, tokens, prompts, heads, groups, d, shared
    (2, 37, 20, 5, 4, 2, 72, False),
    (1, 150, 33, 16, 1, 1, 64, True),
    (2, 18, 47, 1, 1, 1, 8, True),
    (1, 5, 290, 3, 2, 1, 64, False),
    (1, 3, 0, 33, 1, 1, 24, False),
    (1, 16, 30, 150, 1, 1, 128, False),
]


def inside(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the midst of memory full of NaN."""
    batch, rows, heads, dim = shape
    memory = torch.full((batch + 1, rows + 1, heads + 1, dim + 8), float("nan"), dtype=dtype)
    return memory[:batch, :rows, :heads, :dim]


def around(tensor: torch.Tensor) -> torch.Tensor:
    """What of ``inside`` is not the tensor."""
    mask = torch.ones(tensor._base.shape, dtype=torch.bool)
    mask[tuple(slice(length) for length in tensor.shape)] = False
    return tensor._base[mask]


def values(sizes: tuple[int, ...]) -> Callable[[Kernels], str | None]:
    """Results against the formula, strided tensors, and nothing written beside them."""
    batch, queries, tokens, prompts, heads, groups, dim, shared = sizes
    torch.manual_seed(0)
    one = 1 if shared else batch
    shapes = [
        (batch, queries, heads, dim),
        *[(batch, tokens, groups, dim)] * 2,
        *[(one, prompts, groups, dim)] * 2,
    ]
    tensors = [inside(shape, torch.float16).copy_(torch.randn(shape)) for shape in shapes]
    grad_out = inside(shapes[0], torch.float16).copy_(torch.randn(shapes[0]))
    leaves = [t.double().requires_grad_() for t in tensors]
    exact = attention_formula(*leaves, scale=0.3)
    exact_grads = torch.autograd.grad(exact, leaves, grad_out.double())
    expected = [exact.detach(), *exact_grads]

    def check(kernels: Kernels) -> str | None:
        arguments, _, lse = kernels.forward_arguments(tensors, 0.3)
        out = inside(shapes[0], torch.float16)
        arguments.out = Tensor4.of(out, batch)
        if kernels.launch("prompt_attention_forward", arguments).code != OK:
            return "forward refused"
        grads = [
            inside((batch, *t.shape[1:]), torch.float32 if one < batch and i > 2 else torch.float16)
            for i, t in enumerate(tensors)
        ]
        arguments, _ = kernels.backward_arguments(tensors, 0.3, out, lse, grad_out)
        for name, grad in zip(GRADS, grads, strict=True):
            setattr(arguments, name, Tensor4.of(grad, batch))
        if kernels.launch("prompt_attention_backward", arguments).code != OK:
            return "backward refused"
        alone = kernels.backward(tensors, 0.3, out, lse, grad_out, prompts_only=True)[3:]
        summed = [
            g.sum(dim=0, keepdim=True) if g.shape != t.shape else g
            for g, t in zip(grads, tensors, strict=True)
        ]
        for name, mine, right in zip(
            ("out", *GRADS, *GRADS[3:]), (out, *summed, *alone), (*expected, *expected[4:]), strict=True
        ):
            error = (mine.double() - right).abs()
            if not bool(
                (error <= 3 * torch.finfo(torch.float16).eps * right.abs().max()).all()
                if mine.numel()
                else True
            ):
                return f"{name} is wrong"
        if not all(around(t).isnan().all() for t in (out, *grads)):
            return "something is written beside the results"
        return None

    return check


def overflow(kernels: Kernels) -> str | None:
    """Scores of -inf, in the first chunk of keys or in the last one, hide them and no others."""
    none = torch.zeros(1, 0, 1, 8, dtype=torch.bfloat16)
    for hidden in (slice(40), slice(30, 70)):
        q, k, v = torch.full((1, 1, 1, 8), 1e20), torch.zeros(1, 70, 1, 8), torch.ones(1, 70, 1, 8)
        k[:, hidden], v[:, hidden] = -1e20, 0
        out, _ = kernels.forward((*(t.bfloat16() for t in (q, k, v)), none, none), 1.0)
        if not bool((out == 1).all()):
            return "a score of -inf is wrong"
    return None


def extremes(kernels: Kernels) -> str | None:
    """Gradients are finite where lse is far below -128, and exp2 of a padded key's 0 less lse is inf."""
    for keys, dim in ((22, 32), (150, 128)):  # in one pass, in two
        q, k = (torch.full((1, rows, 1, dim), size).half() for rows, size in ((5, 20.0), (keys, -20.0)))
        none = torch.zeros(1, 0, 1, dim).half()
        tensors = [q, k, torch.ones(k.shape).half(), none, none]
        out, lse = kernels.forward(tensors, 1.0)
        grads = kernels.backward(tensors, 1.0, out, lse, torch.ones_like(out))
        if not all(t.isfinite().all() for t in (out, *grads)):
            return "an extreme score gives no finite gradient"
    return None


def passes(kernels: Kernels) -> str | None:
    """With less shared memory the keys take more passes, no more than they must, and all is the same."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, rows, heads, 64).half() for rows, heads in ((37, 4), (60, 2), (60, 2))]
    tensors += [torch.randn(2, 12, 2, 64).half() for _ in range(2)]
    out, lse = kernels.forward(tensors, 0.3)
    expected = kernels.backward(tensors, 0.3, out, lse, out)
    try:
        for kernels.shared_memory in (26 * 1024, 48 * 1024, 56 * 1024):  # for 16, 48 and all keys at a time
            kernels.library.set_shared_memory_limit(c_int64(kernels.shared_memory))
            arguments, grads = kernels.backward_arguments(tensors, 0.3, out, lse, out)
            if kernels.launch("prompt_attention_backward", arguments).code != OK:
                return "backward refused"
            if not all(map(torch.equal, grads, expected)):
                return "less shared memory makes a difference"
            if (arguments.keeps[-1].numel() > 0) != (kernels.shared_memory < 56 * 1024):
                return "one pass would do"
            arguments.workspace = None
            status = kernels.launch("prompt_attention_backward", arguments)
            if (status.code == OK) != (arguments.keeps[-1].numel() == 0):
                return "no workspace is taken"
    finally:
        kernels.shared_memory = 227 * 1024
        kernels.library.set_shared_memory_limit(c_int64(kernels.shared_memory))
    return None


def banks(kernels: Kernels) -> str | None:
    """No two rows of a matrix lie in the same banks of shared memory."""
    return "rows lie in the same banks" if kernels.bank_conflicts() else None


def refusals(kernels: Kernels) -> str | None:
    """Rows that begin at no multiple of 16 bytes are refused, heads of 72 channels are not."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 4, 2, 72).half() for _ in INPUTS]
    for field, step in (("data", 2), ("batch", 4), ("token", 4), ("head", 4)):
        arguments, _, _ = kernels.forward_arguments(tensors, 0.3)
        setattr(arguments.q, field, getattr(arguments.q, field) + step)
        if kernels.launch("prompt_attention_forward", arguments).code != INVALID:
            return f"a wrong {field} is taken"
    arguments, _, _ = kernels.forward_arguments([t[..., :8].contiguous() for t in tensors], 0.3)
    if kernels.launch("prompt_attention_forward", arguments).code != OK:
        return "a right stride is refused"
    arguments, _, _ = kernels.forward_arguments([t[:1] for t in tensors], 0.3)
    arguments.q.batch = 1
    if kernels.launch("prompt_attention_forward", arguments).code != OK:
        return "the stride of a single image is refused"
    return None


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
    (1, 37, 20, 5, 2, 1, 72, 0, 227),
    (2, 17, 47, 16, 4, 2, 64, 1, 40),
    (1, 3, 150, 3, 1, 1, 128, 0, 227),
]


def noticed(folder: Path) -> str | None:
    """What is wrong with the kernels in ``folder``; None if nothing is noticed."""
    sources, exports = [folder / source.name for source in SOURCES], CSRC / "emulation" / "exports.cpp"
    library = emulation.build(folder / "attention.so", [*sources, exports], "-O0", "-w", "-shared")

    def first_failure() -> str | None:
        kernels = Kernels(library)
        checks = [*(values(sizes) for sizes in SIZES), overflow, extremes, refusals, banks, passes]
        return next(filter(None, (check(kernels) for check in checks)), None)

    program = [*sources, CSRC / "emulation" / "attention.cpp"]
    return noticed_by(first_failure) or noticed_by_sanitizers(folder, program, SANITIZED)


# ---- the program

NO_MUTANT = "it does not compile"


def _tried(noticed: Callable[[Path], str | None], sources: list[Path], mutant: Mutant | None) -> str | None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a compiler says of a mutant is of no use
    with tempfile.TemporaryDirectory() as name:
        for source in sources:
            mutated = mutant is not None and mutant.source == source
            Path(name, source.name).write_text(mutant.text if mutated else source.read_text())
        try:
            return noticed(Path(name))
        except subprocess.CalledProcessError:
            return NO_MUTANT


def run(noticed: Callable[[Path], str | None], sources: list[Path], description: str) -> None:
    """The program for the kernels in ``sources``, given what is wrong with those in a folder."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="chooses them")
    arguments = parser.parse_args()
    every = [mutant for source in sources for mutant in mutants(source)]
    picked = random.Random(arguments.seed).sample(every, min(arguments.count, len(every)))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        wrong = pool.submit(_tried, noticed, sources, None).result()
        if wrong:
            raise SystemExit(f"the kernels themselves: {wrong}")
        running = [(mutant, pool.submit(_tried, noticed, sources, mutant)) for mutant in picked]
        tried: list[Any] = []
        for mutant, result in running:
            if result.result() != NO_MUTANT:
                tried.append(result.result())
                print(f"{mutant}\n    {tried[-1] or 'SURVIVED'}", flush=True)
    count = sum(how is not None for how in tried)
    print(f"{count} of {len(tried)} mutants were noticed; there are {len(every)} places to change")


if __name__ == "__main__":
    run(noticed, SOURCES, __doc__)
