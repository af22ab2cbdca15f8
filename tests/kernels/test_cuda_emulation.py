"""The emulation of CUDA on a CPU, see csrc/emulation: right kernels run, each kind of mistake is found."""

import subprocess

import emulation
import pytest
import torch
from emulation import CSRC, SANITIZERS


def run_sample(sanitizer, kernel, mistake):
    command = [str(emulation.program(CSRC / "emulation" / "samples.cu", sanitizer)), kernel, mistake]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("kernel", ["reverse", "sum", "product"])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_right_kernels_are_right(sanitizer, kernel):
    ran = run_sample(sanitizer, kernel, "none")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "right\n", "")


@pytest.mark.parametrize(
    ("kernel", "mistake", "sanitizer", "found"),
    [
        # A write beyond shared memory; no barrier between writing and reading it, or before the next write;
        # a place where both rounds write; asynchronous copies without a wait or a commit.
        ("reverse", "beyond_the_end", "address", "heap-buffer-overflow"),
        ("reverse", "no_barrier", "thread", "data race"),
        ("reverse", "copied_too_early", "thread", "data race"),
        ("reverse", "one_place", "thread", "data race"),
        ("reverse", "no_wait", "", "wrong"),
        ("reverse", "copied_too_early", "", "wrong"),
        ("reverse", "no_commit", "", "ends without having waited for its copies"),
        # No barrier; a barrier and a shuffle that half of the threads or lanes never reach.
        ("sum", "no_barrier", "thread", "data race"),
        ("sum", "no_end", "", "hangs: waits for threads that wait elsewhere or have ended"),
        ("sum", "parted_lanes", "", "hangs"),
        # Products of what was written without a fence, or after it, or without a barrier, or lies outside.
        ("product", "not_fenced", "", "multiplies what was written without fence_shared"),
        ("product", "fenced_too_early", "", "multiplies what was written without fence_shared"),
        ("product", "no_barrier", "thread", "data race"),
        ("product", "beyond_the_end", "", "multiplies what is beyond its shared memory"),
        # Registers without a fence; products that are not waited for; a warp with other matrices.
        ("product", "no_wgmma_fence", "", "multiplies without a wgmma_fence"),
        ("product", "no_commit", "", "takes accumulators for complete"),
        ("product", "no_wait", "", "ends without having waited for its products"),
        ("product", "waits_for_too_few", "", "takes accumulators for complete"),
        ("product", "parted_warps", "", "its warpgroup multiplies something else"),
    ],
)
def test_wrong_kernels_are_found_out(kernel, mistake, sanitizer, found):
    ran = run_sample(sanitizer, kernel, mistake)
    assert found in ran.stdout + ran.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_are_those_of_pytorch(dtype):
    name = str(dtype).removeprefix("torch.")
    decode, encode = (getattr(emulation.emulator(), f"{way}_{name}") for way in ("from", "to"))
    decoded = torch.tensor([decode(bits) for bits in range(2**16)])
    words = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(decoded, words.float(), rtol=0, atol=0, equal_nan=True)

    # Every value, the middle of two, and a little beside it; and anything.
    values = decoded[decoded.isfinite()].sort().values
    middle = ((values[1:].double() + values[:-1].double()) / 2).float()
    beside = [middle * (1 + sign * 2**-20) for sign in (-1, 1)]
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0))
    given = torch.cat([values, middle, *beside, bits.to(torch.int32).view(torch.float32)])
    encoded = torch.tensor([encode(value) for value in given.tolist()], dtype=torch.int32).to(torch.int16)
    torch.testing.assert_close(encoded.view(dtype), given.to(dtype), rtol=0, atol=0, equal_nan=True)
