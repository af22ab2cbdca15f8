"""Packages that some tests need and others do without."""

from __future__ import annotations

import importlib.util

import pytest


def needs(package: str) -> pytest.MarkDecorator:
    """Skip a test where ``package`` is missing."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")
