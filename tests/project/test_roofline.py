"""The predictions of bench/roofline.py."""

import pytest
import torch
import triton

pytestmark = pytest.mark.skipif(
    triton.knobs.nvidia.cuobjdump.path is None, reason="needs the disassembler that comes with Triton"
)


@pytest.fixture
def roofline(load):
    return load("roofline")


def test_a_kernel_is_predicted(roofline):
    """Four times the images take about four times as long, and more than memory needs."""
    small, large = (
        roofline.Compiled.of(*roofline.launches("add_norm", batch, 1)[0]).predict() for batch in (64, 256)
    )
    assert 3 < large["us"] / small["us"] < 4.2
    assert all(10 < result["us_memory"] < result["us"] < 100 for result in (small, large))


def test_waiting_and_pipes(roofline):
    """A load is waited for where its scoreboard is, and a loop's instructions count once a trip."""
    free, waits = 7 << 5 | 7 << 8, 1 << 11  # no scoreboard; wait for the first one
    load = roofline.Instruction("LDG", "LDG.E.128 R0, desc[UR4][R2.64]", 1 | 0 << 5 | 7 << 8)
    use = roofline.Instruction("FADD", "FADD R0, R0, R0", 4 | free | waits)
    warp = roofline.Warp.of(roofline.executed([load, use], [(0, 1)], [3]), 500, 4)
    assert warp.cycles == pytest.approx(3 * (500 + 4), rel=0.2)
    assert warp.pipes["issue"] == 6 and warp.loaded == 3 * 32 * 16
    ahead = roofline.Warp.of(iter([(load, True)] * 3 + [(use, True)] * 3), 500, 4)
    assert ahead.cycles < 700
    with pytest.raises(ValueError, match="1 loops"):
        list(roofline.executed([load], [(0, 0)], []))


def test_what_is_repeated_moves_once(roofline):
    rows = torch.empty(4, 1, 8).expand(4, 5, 8)
    assert roofline.moved({"x": (rows, *rows.stride()), "n": 3, "y": torch.empty(6)}) == 4 * (4 * 8 + 6)
