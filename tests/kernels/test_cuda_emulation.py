"""The emulation of CUDA on a CPU, see csrc/emulation: right kernels run, each kind of mistake is found."""

import subprocess
from ctypes import c_int64, c_void_p

import emulation
import pytest
import torch
from emulation import CSRC, SANITIZERS

EMULATION = CSRC / "emulation"


def run_sanitized(program, *arguments):
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    def build(sanitizer):
        flags = SANITIZERS[sanitizer] if sanitizer else ()
        name = f"samples-{sanitizer or 'plain'}"
        return emulation.built(tmp_path_factory, name, [EMULATION / "samples.cu"], *flags)

    return build


@pytest.mark.parametrize("kernel", ["reverse", "sum"])
@pytest.mark.parametrize("sanitizer", [None, *SANITIZERS])
def test_right_kernels_are_right(samples, sanitizer, kernel):
    ran = run_sanitized(samples(sanitizer), kernel, "none")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "right\n", "")


@pytest.mark.parametrize(
    ("kernel", "mistake", "sanitizer", "found"),
    [
        ("reverse", "beyond_the_end", "address,undefined", "heap-buffer-overflow"),
        ("reverse", "no_barrier", "thread", "data race"),
        ("reverse", "copied_too_early", "thread", "data race"),
        ("reverse", "one_place", "thread", "data race"),
        ("reverse", "no_wait", None, "wrong"),
        ("reverse", "copied_too_early", None, "wrong"),
        ("reverse", "no_commit", None, "ends without having waited for its copies"),
        ("sum", "no_barrier", "thread", "data race"),
        ("sum", "ends_too_early", "thread", "data race"),
        ("sum", "no_end", None, "hangs: waits for threads that wait elsewhere or have ended"),
        ("sum", "parted_lanes", None, "hangs"),
        ("sum", "wrong_count", None, "expect another number of threads"),
    ],
)
def test_wrong_kernels_are_found_out(samples, kernel, mistake, sanitizer, found):
    ran = run_sanitized(samples(sanitizer), kernel, mistake)
    assert found in ran.stdout + ran.stderr


@pytest.mark.parametrize(("dtype", "number"), emulation.DTYPES.items(), ids=str)
def test_conversions_are_those_of_pytorch(tmp_path_factory, dtype, number):
    library = emulation.library(tmp_path_factory)
    words = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    ours = torch.empty(2**16)
    library.to_float(number, c_int64(2**16), c_void_p(words.data_ptr()), c_void_p(ours.data_ptr()))
    torch.testing.assert_close(ours, words.view(dtype).float(), rtol=0, atol=0, equal_nan=True)

    # Every value, what lies in the middle of two, and a little beside it; and anything.
    values = ours[ours.isfinite()].sort().values
    middle = ((values[1:].double() + values[:-1].double()) / 2).float()
    beside = [middle * (1 + sign * 2**-20) for sign in (-1, 1)]
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0))
    given = torch.cat([values, middle, *beside, bits.to(torch.int32).view(torch.float32)])
    rounded = torch.empty(len(given), dtype=torch.int16)
    pointers = (c_void_p(t.data_ptr()) for t in (given, rounded))
    library.from_float(number, c_int64(len(given)), *pointers)
    torch.testing.assert_close(rounded.view(dtype), given.to(dtype), rtol=0, atol=0, equal_nan=True)
