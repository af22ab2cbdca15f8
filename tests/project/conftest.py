import importlib
from pathlib import Path

import pytest


@pytest.fixture
def load(monkeypatch):
    """Import a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module
