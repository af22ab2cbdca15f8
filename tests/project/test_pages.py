"""The Python of the documentation's pages runs as it stands, each page in one namespace."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python" in path.read_text(encoding="utf-8"))
NEEDED = {"retrieval.md": ["open_clip"]}  # besides scikit-learn, for the digits
QUICK = ("adapters.md", "getting_started.md")


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.full) for page in PAGES]
)
def test_examples_run(page, tmp_path, monkeypatch):
    for package in ("sklearn", *NEEDED.get(page, ())):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    namespace = {}
    for block in blocks:
        exec(block, namespace)
