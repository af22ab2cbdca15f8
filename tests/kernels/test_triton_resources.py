"""What the compiled Triton kernels need of a GPU: as good as no spills, and not too much shared memory."""

import os

import pytest

triton = pytest.importorskip("triton", minversion="3.6")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from compiled import COMPILED_IN_TESTS, SHARED_MEMORY, resources  # noqa: E402 (imports kernels)

# Bytes a thread. Releases of the compiler differ by a few registers, which it spills even where others are
# free; a block that is too large for the registers spills hundreds of bytes.
MOST_SPILLED = 32


@pytest.mark.parametrize("case", COMPILED_IN_TESTS)
def test_the_kernels_fit(case):
    for kernel, architectures in resources(case).items():
        for architecture, usage in architectures.items():
            name = f"{kernel} on {architecture}"
            assert usage["stack"] <= MOST_SPILLED, f"{name} spills"
            assert usage["shared"] <= SHARED_MEMORY[int(architecture.removeprefix("sm_"))], name
