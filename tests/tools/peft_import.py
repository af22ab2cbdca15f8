"""PEFT, imported from a test; None where it is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

# Its libraries look for a package `kernels`, which the folder of that name in this repository is not.
with pytest.MonkeyPatch.context() as context:
    context.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != _ROOT])
    peft = importlib.import_module("peft") if importlib.util.find_spec("peft") else None
