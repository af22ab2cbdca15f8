"""Every op's kernels once, forward and backward, at small sizes: what compute-sanitizer is given to watch."""

from __future__ import annotations

import itertools
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import torch
from kernel_cases import KERNELS, converted
from op_cases import results

from vapt_fast import BackendUnavailableError, use_backend
from vapt_fast.ops import device


def _run(backend: str, op: str) -> int:
    """The number of cases of ``op`` that ``backend`` takes."""
    count = 0
    cases = KERNELS[op].cuda_quick if backend == "cuda" else KERNELS[op].quick
    for sizes, dtype in itertools.product(cases, (torch.float32, torch.bfloat16)):
        try:
            with use_backend(backend):
                results(*converted(op, KERNELS[op].make(**sizes), dtype))
        except BackendUnavailableError:
            continue  # a dtype or a size that these kernels do not take
        count += 1
    return count


def main() -> None:
    count = 0
    with torch.device("cuda"):
        for backend in ("triton", "cuda"):
            if not device.unavailable_reasons(backend):
                count += sum(_run(backend, op) for op in KERNELS)
        if not device.unavailable_reasons("cuda"):
            import_module("vapt_fast.ops.prompt_pool.cuda").ONE_PASS = False
            count += _run("cuda", "prompt_pool")
    torch.cuda.synchronize()
    print(f"{count} cases ran")
    if not count:
        raise SystemExit("nothing ran: no backend with kernels is available")


if __name__ == "__main__":
    main()
