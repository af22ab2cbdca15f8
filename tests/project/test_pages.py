"""The Python of the README and of the documentation's pages runs as it stands, each page in one namespace."""

import pytest
from pages import TEXTS, blocks

PAGES = sorted(
    name
    for name, text in TEXTS.items()
    if name != "CONTRIBUTING.md" and any(language == "python" for language, _ in blocks(text))
)
NEEDED = {"retrieval.md": ["open_clip"]}  # besides scikit-learn, for the digits
QUICK = ("README.md", "adapters.md", "getting_started.md")


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.full) for page in PAGES]
)
def test_examples_run(page, tmp_path, monkeypatch):
    for package in ("sklearn", *NEEDED.get(page, ())):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for language, content in blocks(TEXTS[page]):
        if language == "python":
            exec(content, namespace)
