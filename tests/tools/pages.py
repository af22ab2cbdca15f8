"""The README and the pages of the manual, as the blocks and commands that they show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
_BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the content of each fenced block."""
    return _BLOCK.findall(text)


def commands(script: str) -> list[list[str]]:
    """Return the words of each command of a shell script, without comments."""
    lines = script.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def inline_commands(text: str, programs: tuple[str, ...]) -> list[str]:
    """Return what begins with one of ``programs`` among the code within the sentences."""
    return re.findall(rf"`((?:{'|'.join(programs)}) [^`]+)`", _BLOCK.sub("", text))
