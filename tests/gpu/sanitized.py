"""Every op's kernels once, forward and backward, at small sizes: what compute-sanitizer is given to watch.

``python tests/gpu/sanitized.py [OP ...]`` prints a line for each case that ran.

A write-write hazard that racecheck reports at one instruction of a Triton kernel is no race. Where Triton
changes the layout of a tensor through shared memory, and several threads hold the same element (a row's mean,
after a sum over the row), all of them store the same bits to the same address, between two barriers. For
prompt_projector's ``mean`` and ``rstd``, compiled by Triton 3.6 for sm_90, that is one ``st.shared.v4`` whose
address depends on the warp alone, so that 32 lanes write it.
"""

from __future__ import annotations

import itertools
import sys
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
        torch.cuda.synchronize()
        print(f"ran {op}, {backend}, {dtype}, {sizes}", flush=True)
        count += 1
    return count


def main() -> None:
    ops = sys.argv[1:] or list(KERNELS)
    count = 0
    with torch.device("cuda"):
        for backend in ("triton", "cuda"):
            if not device.unavailable_reasons(backend):
                count += sum(_run(backend, op) for op in ops)
    if not count:
        raise SystemExit("nothing ran: no backend with kernels is available")


if __name__ == "__main__":
    main()
