"""Measured launch configurations: which sizes they serve, and on which GPU."""

import json

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from vapt_fast.ops import tuned as module
from vapt_fast.ops.triton_launch import Config

DEFAULT = Config({"BLOCK_R": 16, "BLOCK_C": 64}, num_warps=4, num_stages=1)


def entry(rows, block, **of):
    return {
        "sizes": {"bytes": 2, "rows": rows},
        "blocks": {"BLOCK_C": block},
        "num_warps": 8,
        "num_stages": 3,
    } | of


@pytest.fixture
def found(monkeypatch, tmp_path):
    """What is found for a number of rows, on a GPU of compute capability 9.0."""
    table = {"9.0": {"kernels": {"pool": [entry(50, 128), entry(100, 256)]}}}
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    monkeypatch.setattr(module, "TABLE", tmp_path / "tuned.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    module._entries.cache_clear()
    yield lambda rows, kernel="pool", size=2: module.tuned(kernel, DEFAULT, bytes=size, rows=rows)
    module._entries.cache_clear()


def test_the_nearest_serves_sizes_that_are_not_far_away(found):
    assert found(50) == Config({"BLOCK_R": 16, "BLOCK_C": 128}, 8, 3)
    assert [found(rows).blocks["BLOCK_C"] for rows in (32, 34, 70, 72, 149, 151)] == [
        64,
        128,
        128,
        256,
        256,
        64,
    ]
    assert found(0) is DEFAULT
    assert found(50, size=4) is DEFAULT
    assert found(50, kernel="another") is DEFAULT
    # A kernel that is asked for by fewer sizes may not have the blocks of the others.
    assert module.tuned("pool", DEFAULT, rows=50) is DEFAULT
    assert module.tuned("pool", DEFAULT, bytes=2, rows=50, tokens=197) is DEFAULT


def test_another_gpu_has_no_entries(found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert found(50) is DEFAULT
    module._entries.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found(50) is DEFAULT
