"""The Triton kernels compile for every supported GPU and fit on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")

PROGRAM = Path(__file__).parents[1] / "tools" / "compiled.py"
CASES = [
    "add_norm bfloat16 autocast=True",
    "prompt_pool bfloat16",
    "prompt_pool float32 rows=10",
    "prompt_pool bfloat16 matrix_by_image=True affine_by_image=True",
    "prompt_projector bfloat16 masked=True learned_scale=True prompts=50",
    "prompt_projector bfloat16 masked=True learned_scale=True "
    "bias_by_image=True weights_by_image=True scale_by_image=True",
    "prompt_attention_packed bfloat16 dim=64 bias=False",
    "prompt_attention_packed bfloat16 tokens=1 prompts=1 heads=1 groups=1",
    "absorbed_attention bfloat16",
    "mlp bfloat16",
    "quantise rows",
    "quantise long rows",
    "quantise transposed",
]

# Bytes of shared memory that a block may have, by architecture.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024}
# Bytes a thread. Releases of the compiler differ by a few registers, which it spills even where others are
# free; a block that is too large for the registers spills hundreds of bytes.
MOST_SPILLED = 32


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_fit(case):
    """In a process of its own, in which kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, PROGRAM, case]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)[case]
    assert kernels
    for kernel, architectures in kernels.items():
        assert architectures.keys() == SHARED_MEMORY.keys() - ({"sm_80"} if "quantise" in case else set())
        for architecture, usage in architectures.items():
            name = f"{kernel} on {architecture}"
            assert usage["stack"] <= MOST_SPILLED, f"{name} spills"
            assert usage["shared"] <= SHARED_MEMORY[architecture], name
