"""``vapt-fast info``: what would run on this machine."""

from __future__ import annotations

from .. import info as machine
from .console import say

__all__ = ["info"]


def info() -> None:
    """Show versions, devices and backends, and why a backend can't run here."""
    say(machine.report())
