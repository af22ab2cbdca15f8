"""The Python of the README and of the documentation's pages runs as it stands, each page in one namespace."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
PAGES = sorted(name for name, text in TEXTS.items() if "```python" in text)
NEEDED = {"retrieval.md": ["open_clip"]}  # besides scikit-learn, for the digits
QUICK = ("README.md", "adapters.md", "getting_started.md")


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.full) for page in PAGES]
)
def test_examples_run(page, tmp_path, monkeypatch):
    for package in ("sklearn", *NEEDED.get(page, ())):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL)
    namespace = {}
    for block in blocks:
        exec(block, namespace)
