"""Every op's kernels once, forward and backward, at small sizes: what compute-sanitizer is given to watch."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from kernel_cases import KERNELS
from ops import results
from test_ops import converted

from vapt_fast import BackendUnavailable, use_backend
from vapt_fast.backends import _dispatch


def main() -> None:
    count = 0
    with torch.device("cuda"):
        for backend in ("triton", "cuda"):
            if _dispatch.unavailable_because(backend):
                continue
            for (op, kernels), dtype in itertools.product(KERNELS.items(), (torch.float32, torch.bfloat16)):
                for sizes in kernels.quick:
                    try:
                        with use_backend(backend):
                            results(*converted(op, kernels.make(**sizes), dtype))
                    except BackendUnavailable:
                        continue  # a dtype or a size that these kernels do not take
                    count += 1
    torch.cuda.synchronize()
    print(f"{count} cases ran")
    if not count:
        raise SystemExit("nothing ran: no backend with kernels is available")


if __name__ == "__main__":
    main()
