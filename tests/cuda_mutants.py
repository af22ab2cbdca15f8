"""Mutation tests of prompt_attention's CUDA kernels: each small change of the source has to be noticed.

``python tests/cuda_mutants.py`` compiles each mutant in cuda_mutants.txt for a CPU (see csrc/emulation), runs
a few quick checks on it and writes to cuda_mutants.json which one noticed it: values, what is written, then
AddressSanitizer and ThreadSanitizer. It takes a few seconds a mutant. While the kernels do not change, those
that the table has as noticed are not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import c_int64
from dataclasses import dataclass
from pathlib import Path

import emulation
import torch
from emulation import CSRC, GRADS, INPUTS, INVALID, OK, Kernels, Tensor4
from ops import attention_formula

SOURCE = CSRC / "prompt_attention.cu"
LIST = Path(__file__).with_suffix(".txt")
TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Mutant:
    """What stands once in the source, what replaces it, and why that can't be noticed, if it can't."""

    before: str
    after: str
    excuse: str

    @property
    def name(self) -> str:
        return " -> ".join(" ".join(text.split()) for text in (self.before, self.after))


def mutants(path: Path = LIST) -> list[Mutant]:
    found = []
    for block in path.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if lines:
            found.append(Mutant(*("\n".join(x[1:] for x in lines if x[0] == mark) for mark in "-+=")))
    return found


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
    return None


def noticed_by_values(library: Path, checks: list) -> str | None:
    """In a process of its own: a mutant may do anything."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            kernels = Kernels(library)
            found = next(filter(None, (check(kernels) for check in checks)), None)
            os.write(write, (found or "nothing").encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return None if said == "nothing" else said or "it crashes or hangs"


SANITIZED = [
    (1, 37, 20, 5, 2, 1, 72, 0, 227),
    (2, 17, 47, 16, 4, 2, 64, 1, 40),
    (1, 3, 150, 3, 1, 1, 128, 0, 227),
]
SANITIZERS = {
    "AddressSanitizer": ("-O0", "-w", "-fsanitize=address"),
    "ThreadSanitizer": ("-O0", "-w", "-fsanitize=thread"),
}


def noticed_by_sanitizers(folder: Path, source: Path) -> str | None:
    for name, flags in SANITIZERS.items():
        program = emulation.build(folder / name, [source, CSRC / "emulation" / "attention.cpp"], *flags)
        for sizes in SANITIZED:
            ran = subprocess.run([program, *map(str, sizes)], capture_output=True, text=True, check=False)
            if ran.stderr:
                return name
    return None


def noticed(folder: Path, text: str, checks: list) -> str | None:
    """How ``text`` in the source's place is noticed; None if it is not."""
    source = folder / SOURCE.name
    source.write_text(text)
    library = folder / "attention.so"
    try:
        emulation.build(library, [source, CSRC / "emulation" / "exports.cpp"], "-O0", "-w", "-shared")
    except subprocess.CalledProcessError:
        raise SyntaxError("a mutant does not compile") from None
    return noticed_by_values(library, checks) or noticed_by_sanitizers(folder, source)


# ---- the table


def source_hash(*sources: Path) -> str:
    """Of the code without its comments and spaces."""
    text = re.sub(r"//.*", "", "".join(source.read_text() for source in sources or (SOURCE,)))
    return hashlib.sha256(re.sub(r"\s+", "", text).encode()).hexdigest()[:16]


def write(table: dict[str, str | None]) -> None:
    TABLE.write_text(json.dumps({"source": source_hash(), "noticed": table}, indent=1) + "\n")


def main() -> None:
    text = SOURCE.read_text()
    torch.set_num_threads(1)
    checks = [*(values(sizes) for sizes in SIZES), overflow, extremes, refusals, banks, passes]
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    known = known["noticed"] if known.get("source") == source_hash() else {}
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        found = noticed(Path(folder), text, checks)
        if found:
            raise SystemExit(f"the kernels themselves: {found}")
        for mutant in mutants():
            how = known.get(mutant.name)
            if how is None:
                how = noticed(Path(folder), text.replace(mutant.before, mutant.after), checks)
                print(mutant.name, "=>", how, flush=True)
            table[mutant.name] = how
            write(known | table)
    write(table)


if __name__ == "__main__":
    main()
