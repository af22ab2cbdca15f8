"""The Python of docs/explain.md runs as it stands, in one namespace."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "explain.md"


def test_examples_run(capsys):
    pytest.importorskip("sklearn")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 3
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert "of the weights" in capsys.readouterr().out
