"""The predictions of bench/roofline.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

PROGRAM = Path(__file__).parents[2] / "bench" / "roofline.py"


@pytest.fixture
def roofline(load):
    return load("roofline")


@pytest.mark.full
def test_a_kernel_is_predicted(tmp_path):
    """In a process of its own, in which kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "roofline.json"
    command = [sys.executable, PROGRAM, "--out", out, "--ops", "add_norm", "--batches", "64", "256"]
    subprocess.run(command, env=env, capture_output=True, check=True)
    rows = [row for row in json.loads(out.read_text()) if row["kernel"] == "add_norm_fwd"]
    assert [row["batch"] for row in rows] == [64, 256]
    assert 3 < rows[1]["us"] / rows[0]["us"] < 4.2
    assert all(row["us_memory"] < row["us"] < 2 * row["us_memory"] for row in rows)


def test_waiting_and_pipes(roofline):
    """A load is waited for where its scoreboard is, and a loop's instructions count once a trip."""
    free, waits = 7 << 5 | 7 << 8, 1 << 11  # no scoreboard; wait for the first one
    load = roofline.Instruction("LDG", "LDG.E.128 R0, desc[UR4][R2.64]", 1 | 7 << 8)
    use = roofline.Instruction("FADD", "FADD R0, R0, R0", 4 | free | waits)
    warp = roofline.Warp.of(roofline.executed([load, use], [(0, 1)], [3]), 500, 4)
    assert warp.cycles == pytest.approx(3 * (500 + 4), rel=0.2)
    assert warp.pipes["issue"] == 6
    assert warp.loaded == 3 * 32 * 16
    ahead = roofline.Warp.of(iter([(load, True)] * 3 + [(use, True)] * 3), 500, 4)
    assert ahead.cycles < 700
    with pytest.raises(ValueError, match="1 loops"):
        list(roofline.executed([load], [(0, 0)], []))


def test_what_is_repeated_moves_once(roofline):
    rows = torch.empty(4, 1, 8).expand(4, 5, 8)
    assert roofline.moved({"x": (rows, *rows.stride()), "n": 3, "y": torch.empty(6)}) == 4 * (4 * 8 + 6)
