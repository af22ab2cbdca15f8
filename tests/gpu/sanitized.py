"""Every op's kernels once, forward and backward, at small sizes: what compute-sanitizer is given to watch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from kernel_cases import KERNELS
from ops import results

from vapt_fast import BackendUnavailable, use_backend
from vapt_fast.backends import _dispatch


def main() -> None:
    count = 0
    with torch.device("cuda"):
        for backend in ("triton", "cuda"):
            if _dispatch.unavailable_because(backend):
                continue
            for kernels in KERNELS.values():
                for dtype in (torch.float32, torch.bfloat16):
                    for sizes in kernels.quick:
                        function, _, tensors, options = kernels.make(**sizes)
                        tensors = [tensor.to(dtype) for tensor in tensors]
                        options = {
                            name: value.to(dtype) if isinstance(value, torch.Tensor) else value
                            for name, value in options.items()
                        }
                        try:
                            with use_backend(backend):
                                results(function, tensors, options)
                        except (BackendUnavailable, TypeError):
                            continue  # dtypes that these kernels, or the op, do not take
                        count += 1
    torch.cuda.synchronize()
    print(f"{count} cases ran")
    if not count:
        raise SystemExit("nothing ran: no backend with kernels is available")


if __name__ == "__main__":
    main()
