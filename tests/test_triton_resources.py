"""What the compiled Triton kernels need of a GPU: no spills, not too much shared memory, no drift."""

import json
import os

import pytest

triton = pytest.importorskip("triton", minversion="3.6")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from compiled import CASES, COMPILED_IN_TESTS, SHARED_MEMORY, TABLE, resources  # noqa: E402 (imports kernels)

RECORDED = json.loads(TABLE.read_text())


def test_every_case_is_recorded():
    assert list(RECORDED["cases"]) == list(CASES)


def assert_fits(needed):
    for kernel, architectures in needed.items():
        for architecture, usage in architectures.items():
            name = f"{kernel} on {architecture}"
            assert usage["shared"] <= SHARED_MEMORY[int(architecture.removeprefix("sm_"))], name


@pytest.mark.parametrize("case", CASES)
def test_recorded_resources(case):
    recorded = RECORDED["cases"][case]
    assert_fits(recorded)
    for kernel, architectures in recorded.items():
        for architecture, usage in architectures.items():
            assert usage["stack"] == 0, f"{kernel} on {architecture} spills"


@pytest.mark.parametrize("case", COMPILED_IN_TESTS)
def test_resources(case):
    needed = resources(case)
    recorded = RECORDED["cases"][case]
    assert_fits(needed)
    assert needed.keys() == recorded.keys()
    if RECORDED["triton"] == triton.__version__:  # another compiler, other registers, and a spill or two
        for kernel, architectures in needed.items():
            for architecture, usage in architectures.items():
                expected = recorded[kernel][architecture]["registers"]
                assert usage["stack"] == 0, f"{kernel} on {architecture} spills"
                assert abs(usage["registers"] - expected) <= 0.1 * expected, f"{kernel} on {architecture}"
