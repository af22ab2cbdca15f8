"""bench/localisation.py runs, and scores what it says."""

import importlib.util
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

BENCH = Path(__file__).parents[2] / "bench" / "localisation.py"


@pytest.fixture(scope="module")
def localisation():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("localisation", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_map_of_every_method_is_scored(localisation, tmp_path, monkeypatch):
    monkeypatch.setattr(localisation, "BASE_LRS", (0.4,))
    out = tmp_path / "out.json"
    small = ["--train", "8", "--test", "6", "--epochs", "1", "--processes", "1"]
    localisation.main(["--out", str(out), *small])
    rows = json.loads(out.read_text())
    assert [(row["method"], row["map"]) for row in rows] == [
        (method, name)
        for method in ("vapt", "vpt-deep")
        for name in localisation.MAPS
        if (method, name) != ("vpt-deep", "patches that shape prompts")
    ]
    for row in rows:
        assert set(row["scores"]) == set(localisation.SCORES)
        assert all(0 <= value <= 1 for score in row["scores"].values() for value in score)
        if row["map"] == "brightness":  # digits are bright, and nothing else is
            assert row["scores"]["energy"][0] > 3 * row["scores"]["energy"][1]
            assert row["scores"]["pointing game"][0] > 0.8
