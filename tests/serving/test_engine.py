"""The whole server: Ray Serve, two replicas, clients, changes of adapters, and what is malformed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("python_multipart")

LOAD = Path(__file__).parents[1] / "tools" / "serving_load.py"


@pytest.mark.full
def test_answers_are_right_while_adapters_come_and_go() -> None:
    sizes = ["--requests", "480", "--malformed", "60", "--bad-adapters", "30", "--port", "8139", "--loop"]
    result = subprocess.run([sys.executable, LOAD, *sizes], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    figures = json.loads(result.stdout[result.stdout.index("{") :])
    counts = figures["counts"]
    assert (figures["requests"], figures["faults"]) == (480, [])
    assert len(figures["by_replica"]) == 2
    assert counts["answered 200"] > 300
    assert counts["change 200"] > 0
    assert figures["images_by_metrics"] > 0
    assert sum(number for what, number in counts.items() if what.startswith("bad adapter 4")) == 30
