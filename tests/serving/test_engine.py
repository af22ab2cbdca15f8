"""The whole server: Ray Serve, two replicas, clients, changes of adapters, and what is malformed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from stacks import save_adapter

pytest.importorskip("ray")
pytest.importorskip("python_multipart")

LOAD = Path(__file__).parents[1] / "tools" / "serving_load.py"


@pytest.mark.nightly
def test_answers_are_right_while_adapters_come_and_go() -> None:
    sizes = ["--requests", "480", "--malformed", "60", "--bad-adapters", "30", "--port", "8139"]
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


def ask(path: str, **request: object) -> dict:
    url = f"http://127.0.0.1:8141{path}"
    with urllib.request.urlopen(urllib.request.Request(url, **request), timeout=60) as response:
        return json.loads(response.read())


@pytest.mark.nightly
def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", 0, 3, include_backbone=True)
    save_adapter(tmp_path / "b", 1, 5)
    adapters = [f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"]
    options = ["--port", "8141", "--store", tmp_path / "store", "--root", tmp_path, "--device", "cpu"]
    command = [sys.executable, "-m", "vapt_fast", "serve", *adapters, *options]
    environment = os.environ | {"VAPT_FAST_SERVE_TOKEN": "secret"}
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as server,
    ):
        try:
            assert "serving a, b" in next(line for line in server.stdout if "serving" in line)
            assert [entry["adapter"] for entry in ask("/adapters")["adapters"]] == ["a", "b"]
            assert ask("/adapters/b")["num_classes"] == 5
            change = {"data": b'{"folder": "b"}', "method": "PUT"}
            headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
            assert ask("/adapters/c", headers=headers, **change)["num_classes"] == 5
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask("/adapters/c", headers=headers | {"Authorization": "Bearer wrong"}, **change)
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, (tmp_path / "log").read_text()[-3000:]
    with pytest.raises(urllib.error.URLError):
        ask("/health")
