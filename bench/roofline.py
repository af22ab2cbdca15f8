"""Predict the time of each Triton kernel on an H200 from what the compiler made of it; needs no GPU.

Each launch of an op is recorded, compiled ahead of time for sm_90 and disassembled. The machine code says how
long a warp takes by itself, since every instruction names the cycles and the scoreboards that it waits for,
and how long it keeps each pipe of a multiprocessor busy. The programs that fit there, and the bytes that all
of them move, make a time of it. docs/roofline.md has the model and how far off it was. Example:

    python bench/roofline.py --out roofline.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from floors import CEILINGS
from harness import Sizes, outputs_and_gradients
from triton.runtime.jit import JITFunction

from vapt_fast.files import write_atomically

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "tools"))

QUANTISING = "fp8_linear"
OPS = (QUANTISING, "prompt_pool", "prompt_projector", "prompt_attention", "add_norm", "absorbed_attention")
DIM, HEADS, GRID = 768, 12, (14, 14)

# ---- an H200. MEMORY, CACHE, BARRIER, HGMMA, L2, SHARPNESS and CONFLICTS were fitted to measured times.

MULTIPROCESSORS, SCHEDULERS, CYCLES = 132, 4, 1.8e9
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 228 * 1024, 64, 32  # of a multiprocessor
MEMORY, CACHE, BARRIER = 1000, 360, 10  # cycles to a value from memory or the cache, and at a barrier
LATENCY: dict[str, float] = {
    "LDS": 30,
    "LDSM": 33,
    "SHFL": 24,
    "MUFU": 24,
    "F2F": 24,
    "I2F": 24,
    "F2I": 24,
    "LDC": 40,
    "S2R": 30,
}
HGMMA = 60  # cycles from the last product of a group to its values, besides those that the products take
L2 = 8e12  # bytes a second
SHARPNESS = 2.5  # of the smooth maximum of several bounds
CONFLICTS = 8  # of a bank, at a store of single words: they transpose what a product needs
LAUNCH = 1.0e-6  # seconds, in a CUDA graph

ALU = {"LOP3", "ISETP", "IADD3", "SEL", "FSEL", "FMNMX", "FSETP", "PRMT", "SHF", "LEA", "VIADD"}
ALU |= {"PLOP3", "P2R", "IABS", "SGXT"}


def smooth_maximum(*values: float) -> float:
    return sum(value**SHARPNESS for value in values) ** (1 / SHARPNESS)


# ---- machine code


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly; ``control`` is what the compiler tells the scheduler."""

    name: str
    text: str
    control: int

    @cached_property
    def bytes(self) -> int:
        """Those that a thread moves."""
        name = self.text.partition("[")[0]
        if matrices := re.search(r"M\w*88\.?(\d?)", name):
            return 4 * int(matrices[1] or 1)
        wide = re.search(r"\.(128|64|U16|S16|U8|S8)\b", name)
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[wide[1]] if wide else 4

    @cached_property
    def pipes(self) -> dict[str, float]:
        """Cycles of a scheduler for which a warp's instruction keeps each pipe busy."""
        busy = {"issue": 1.0}
        if self.name in ALU:
            busy["alu"] = 2
        elif self.name.startswith("IMAD"):
            busy["fma"] = 2
        elif self.name in ("FFMA", "FMUL", "FADD"):
            busy["fma"] = 1
        elif self.name in ("MUFU", "F2F", "I2F", "F2I"):
            busy["conversions"] = 8
        elif self.name == "SHFL":
            busy["shared"] = SCHEDULERS
        elif self.name == "STS" and self.bytes <= 4:
            busy["shared"] = SCHEDULERS * CONFLICTS
        elif self.name in ("LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDGSTS"):
            busy["shared"] = SCHEDULERS * max(1, self.bytes // 4)
        elif self.name in ("HMMA", "HGMMA"):
            busy["tensor"] = self.product
        return busy

    @cached_property
    def product(self) -> float:
        """Cycles of a tensor core for this matrix product, of which a group of four warps makes an HGMMA."""
        shape = re.search(r"\.(64)x(\d+)x(\d+)\.", self.text)
        if shape is None:
            return 4
        rows, columns, depth = map(int, shape.groups())
        return rows * columns * depth / SCHEDULERS / (512 if "TF32" in self.text else 1024)


def disassemble(cubin: bytes) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """Return the instructions of the kernel, and the first and last index of its loops, outer first."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = r"/\*[0-9a-f]{4,}\*/\s+(.*?) ;\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    code: list[Instruction] = []
    loops: list[tuple[int, int]] = []
    for text, high in re.findall(line, listing):
        bare = re.sub(r"^@!?U?P\w+\s+", "", text)
        if (target := re.match(r"BRA\b.*?(0x[0-9a-f]+)", bare)) and int(target[1], 16) // 16 < len(code):
            loops.append((int(target[1], 16) // 16, len(code)))
        code.append(Instruction(re.split(r"[. ]", bare)[0], text, int(high, 16) >> 41))
    # Behind the end are subroutines; a loop may be left by an EXIT.
    end = max([index for index, one in enumerate(code) if one.name == "EXIT"] + [last for _, last in loops])
    return code[: end + 1], sorted(loops)


def executed(
    code: list[Instruction], loops: list[tuple[int, int]], trips: list[int]
) -> Iterator[tuple[Instruction, bool]]:
    """Yield what a warp runs, and whether in a loop, given the trips of each; no other jump is taken."""
    if len(loops) != len(trips):
        raise ValueError(f"the kernel has {len(loops)} loops in its machine code, {len(trips)} were expected")

    def run(start: int, end: int, inside: list[int], looping: bool) -> Iterator[tuple[Instruction, bool]]:
        index = start
        while index <= end:
            found = next((i for i in inside if loops[i][0] == index), None)
            if found is None:
                yield code[index], looping
                index += 1
                continue
            last = loops[found][1]
            nested = [i for i in inside if i != found and index <= loops[i][0] <= loops[i][1] <= last]
            for _ in range(trips[found]):
                yield from run(index, last, nested, True)
            index = last + 1

    return run(0, len(code) - 1, list(range(len(loops))), False)


@dataclass
class Warp:
    """What a warp takes: cycles by itself, cycles of each pipe, instructions, bytes that its threads load."""

    cycles: float
    pipes: Counter[str]
    loaded: float
    stored: float

    @classmethod
    def of(
        cls, instructions: Iterator[tuple[Instruction, bool]], latency_of_loads: float, num_warps: int
    ) -> Warp:
        """Follow the scoreboards of one warp; those of loads, products, barriers and their like."""
        now = tensor = port = copied = loaded = stored = 0.0
        scoreboards, copies = [0.0] * 6, []
        pipes: Counter[str] = Counter()
        for one, looping in instructions:
            stall, writes, reads, waits = (
                one.control & 15, one.control >> 5 & 7, one.control >> 8 & 7, one.control >> 11 & 63,
            )  # fmt: skip
            now = max([now, *(at for i, at in enumerate(scoreboards) if waits >> i & 1)])
            pipes.update(one.pipes)
            latency = LATENCY.get(one.name, 20.0)
            if one.name in ("LDG", "LDGSTS"):
                # The warps of a program load at the same time, and share what the cache gives.
                port = max(port, now) + 32 * one.bytes * num_warps * MULTIPROCESSORS * CYCLES / L2
                latency = port - now + latency_of_loads
                # Copies before a loop are those that its last trips leave out.
                loaded += 32 * one.bytes * (looping or one.name == "LDG")
            elif one.name == "STG":
                stored += 32 * one.bytes
            if one.name == "LDGSTS":
                copied = now + latency
            elif one.name == "LDGDEPBAR":
                copies.append(copied)
            elif one.name == "DEPBAR" and (left := re.search(r"SB0, 0x(\w+)", one.text)):
                done = copies[: len(copies) - int(left[1], 16)]
                now = max([now, *done[-1:]])
            elif one.name == "HGMMA":
                tensor = max(tensor, now) + one.product
            elif one.name == "WARPGROUP" and "DEPBAR" in one.text:
                now = max(now, tensor + HGMMA)
            elif one.name == "BAR":
                now += BARRIER
            if writes < 6:
                scoreboards[writes] = max(scoreboards[writes], now + latency)
            if reads < 6:
                scoreboards[reads] = max(scoreboards[reads], now + 16)
            now += max(1, stall)
        return cls(max([now, tensor, *scoreboards]), pipes, loaded, stored)


# ---- launches


def blocks(size: int, block: int) -> int:
    return -(-size // block)


# The loops of each kernel, in the order of its machine code: a size and the block of it that a trip takes, or
# the number of trips.
LOOPS: dict[str, tuple[str | tuple[str, str], ...]] = {
    "prompt_attention_fwd": (("num_prompts", "BLOCK_PROMPTS"), ("num_tokens", "BLOCK_TOKENS")),
    "prompt_attention_bwd_queries": (("num_prompts", "BLOCK_PROMPTS"), ("num_tokens", "BLOCK_TOKENS")),
    "prompt_attention_bwd_keys": (("num_queries", "BLOCK_QUERIES"),),
    "prompt_pool_weights": (("num_columns", "BLOCK_T"),),
    "prompt_pool_fwd": (("num_tokens", "BLOCK_T"),),
    "prompt_pool_bwd_grads": (("num_rows", "BLOCK_R"),),
    "prompt_pool_bwd_products": (("num_rows", "BLOCK_R"), ("num_channels", "BLOCK_C")),
    "prompt_pool_bwd_tokens": (("num_rows", "BLOCK_R"),),
    "prompt_projector_fwd": (("num_channels", "BLOCK_C"),) * 4,
    "prompt_projector_bwd_rows": (("num_channels", "BLOCK_C"),) * 3,
    "prompt_projector_fwd_in_registers": (("WIDTH", "BLOCK_R"),),
    "prompt_projector_bwd_rows_in_registers": (("WIDTH", "BLOCK_R"),) * 2,
    "prompt_projector_bwd_weights": (("rows_per_program", "BLOCK_ROWS"),),
    "absorbed_attention_scores": (("num_channels", "BLOCK_C"),),
    "absorbed_attention_sums": (("num_keys", "BLOCK_K"),),
    "absorbed_attention_bwd_rows": (("num_queries", "BLOCK_M"),),
    "quantise_by_two_passes": (("num_columns", "BLOCK_COLUMNS"),) * 2,
    "sum_chunks": (("num_chunks", "BLOCK_CHUNKS"),),
}
ATTENTION = [f"prompt_attention_{kernel}" for kernel in ("fwd", "bwd_queries", "bwd_keys")]


def moved(arguments: dict[str, Any]) -> float:
    """Bytes of all tensors that a kernel is given, each of its elements once."""
    tensors = [value[0] if isinstance(value, tuple) else value for value in arguments.values()]
    views = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    shapes = [zip(view.shape, view.stride(), strict=True) for view in views]
    return sum(
        view.itemsize * torch.Size(size for size, stride in shape if stride).numel()
        for view, shape in zip(views, shapes, strict=True)
    )


@dataclass(frozen=True)
class Compiled:
    """A launch and what the compiler made of it."""

    kernel: str
    programs: int
    num_warps: int
    code: list[Instruction]
    loops: list[tuple[int, int]]
    trips: list[int]
    moved: float
    registers: int
    shared: int
    stack: int
    scores: int  # of an attention; 0 for others

    @classmethod
    def of(cls, kernel: JITFunction, programs: int, args: tuple, options: dict[str, Any]) -> Compiled:
        """Compile the launch as it would be on the GPU."""
        from compiled import compile_launch

        made: list[Any] = []
        compile_to = triton.compile

        def keep(*args: Any, **options: Any) -> Any:
            made.append(compile_to(*args, **options))
            return made[0]

        with mock.patch.object(triton, "compile", keep):
            needs = compile_launch((kernel, args, options), 90)
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
        name = kernel.__name__.removesuffix("_kernel")
        trips = [
            arguments[loop] if isinstance(loop, str) else blocks(arguments[loop[0]], arguments[loop[1]])
            for loop in LOOPS.get(name, ())
        ]
        code, loops = disassemble(made[0].asm["cubin"])
        trips = trips if loops else []  # the compiler has unrolled them all
        scores = 0
        if name in ATTENTION:
            keys = arguments.get("num_keys", arguments.get("num_tokens", 0) + arguments.get("num_prompts", 0))
            scores = arguments["lse"].numel() * keys
        warps = options["num_warps"]
        return cls(name, programs, warps, code, loops, trips, moved(arguments), **needs, scores=scores)

    def predict(self) -> dict[str, Any]:
        """Return the time in microseconds, and what it comes from."""
        warps = self.programs * self.num_warps
        loaded = Warp.of(executed(self.code, self.loops, self.trips), MEMORY, self.num_warps).loaded * warps
        missed = min(1.0, self.moved / max(loaded, 1))
        latency = missed * MEMORY + (1 - missed) * CACHE
        warp = Warp.of(executed(self.code, self.loops, self.trips), latency, self.num_warps)
        busiest, busy = warp.pipes.most_common(1)[0]
        registers = blocks(max(self.registers, 16), 8) * 8 * 32 * self.num_warps
        fits = (REGISTERS // registers, SHARED // (self.shared + 1024), WARPS // self.num_warps, BLOCKS)
        most = blocks(self.programs, MULTIPROCESSORS)  # of all multiprocessors
        resident = min(*fits, most)

        memory = self.moved / CEILINGS["NVIDIA H200"].bytes
        cache = (warp.loaded + warp.stored) * warps / L2
        # Of one program: its warps meet at barriers, so none of these hides another. Programs do hide others.
        shares = self.num_warps / SCHEDULERS
        waiting = warp.cycles + warp.pipes["issue"] * max(0, shares - 1)

        def cycles(programs: int) -> float:
            return smooth_maximum(waiting, busy * programs * shares)

        full, rest = divmod(most, resident)
        running = (full * cycles(resident) + (cycles(rest) if rest else 0)) / CYCLES
        return {
            "kernel": self.kernel,
            "us": 1e6 * (smooth_maximum(running, max(memory, cache)) + LAUNCH),
            "programs": self.programs,
            "waves": self.programs / MULTIPROCESSORS / min(fits),
            "warps_in_flight": resident * self.num_warps,
            "kb_in_flight": warp.loaded * resident * self.num_warps * min(1, latency / warp.cycles) / 1e3,
            "instructions_of_a_warp": warp.pipes["issue"],
            "instructions_a_score": 32 * warp.pipes["issue"] * warps / self.scores if self.scores else None,
            "busiest": busiest,
            "us_alone": 1e6 * warp.cycles / CYCLES,
            "us_busiest": 1e6 * busy * most * self.num_warps / SCHEDULERS / CYCLES,
            "us_running": 1e6 * running,
            "us_memory": 1e6 * memory,
            "us_cache": 1e6 * cache,
            "registers": self.registers,
            "shared": self.shared,
            "stack": self.stack,
        }


def launches(op: str, batch: int, num_prompts: int) -> list[tuple]:
    """Return what ``op`` launches forward and backward, for a block of a ViT-B/16 in bfloat16."""
    from compiled import recorded_launches

    found: list[tuple] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((kernel, grid[0], args, options))

    with recorded_launches(), mock.patch.object(JITFunction, "run", record):
        if op == QUANTISING:
            quantise(batch)
        else:
            sizes = Sizes(torch.device("cpu"), torch.bfloat16, batch, GRID, DIM, HEADS, 4 * DIM)
            module = importlib.import_module(f"ops.{op}")
            job = module.job(sizes, num_prompts)
            outputs_and_gradients(module.implementation("triton", sizes), job.make())
    return found


def quantise(batch: int) -> None:
    """Quantise what a block in FP8 multiplies: tokens, hidden features, fc1's weight, and it transposed."""
    from vapt_fast.ops.fp8_linear import triton as fp8

    tokens, weight = batch * (GRID[0] * GRID[1] + 1), torch.empty(4 * DIM, DIM, dtype=torch.bfloat16)
    hidden = weight.new_empty(tokens, 4 * DIM)
    for rows, gelu in (
        (hidden[:, :DIM].contiguous(), False),
        (hidden, True),
        (weight, False),
        (weight.t(), False),
    ):
        values = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
        fp8.quantise(rows, values, torch.empty(len(rows), 1), gelu)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="(all)")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256], help="(%(default)s)")
    parser.add_argument("--prompts", type=int, default=50, help="(%(default)s)")
    options = parser.parse_args(arguments)
    rows = []
    for op in options.ops:
        for batch in options.batches:
            for launch in launches(op, batch, options.prompts):
                row = {"op": op, "batch": batch, "prompts": options.prompts, **Compiled.of(*launch).predict()}
                rows.append(row)
                print(
                    f"{row['kernel']:29} B={batch:<4}{row['us']:6.1f} us {row['waves']:5.2f} waves"
                    f" {row['warps_in_flight']:2} warps {row['kb_in_flight']:4.1f} kB"
                    f" {row['instructions_of_a_warp']:5.0f} instructions"
                    + (f" ({row['instructions_a_score']:.1f} a score)" if row["instructions_a_score"] else "")
                    + f"; alone {row['us_alone']:.1f}, {row['busiest']} {row['us_busiest']:.1f},"
                    f" memory {row['us_memory']:.1f}, cache {row['us_cache']:.1f} us",
                    flush=True,
                )
    write_atomically(options.out, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
