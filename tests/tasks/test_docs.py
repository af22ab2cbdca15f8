"""The Python of the pages about tasks runs as it stands, in one namespace a page."""

import re
from pathlib import Path

import pytest
from extras import needs

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["segmentation", pytest.param("retrieval", marks=needs("open_clip"))])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
