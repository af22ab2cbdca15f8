"""The benchmark suites VTAB-1K and FGVC, read from the folders and lists that people have.

A data set of a suite has a name like "vtab:cifar". docs/benchmarks.md describes the layouts.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from ..errors import UserError
from .fgvc import FGVC
from .suite import DataSet, Opened, Suite, open_from, suite_splits
from .vtab import VTAB

__all__ = [
    "SUITES",
    "DataSet",
    "Opened",
    "Suite",
    "find_data_set",
    "is_suite_data",
    "open_data_set",
    "suite_splits",
]

SUITES = {suite.name: suite for suite in (VTAB, FGVC)}


def is_suite_data(data: str) -> bool:
    """Return whether ``data`` names a data set of a suite, as "vtab:cifar" does, and not a folder."""
    prefix, colon, _ = data.partition(":")
    return prefix in SUITES and colon == ":"


def find_data_set(data: str) -> tuple[Suite, str, DataSet]:
    """Return the suite of "vtab:cifar", the data set's name in it, and the data set.

    Raises:
        UserError: no such data set; the message suggests similar ones.
    """
    prefix, _, member = data.partition(":")
    suite = SUITES[prefix]
    if member not in suite.data_sets:
        near = difflib.get_close_matches(member, suite.data_sets, n=3) or list(suite.data_sets)
        raise UserError(
            f"data must name one of {suite.title}'s {len(suite.data_sets)} data sets, got {data!r}; expected "
            f"{', '.join(f'{prefix}:{name}' for name in near)}"
        )
    return suite, member, suite.data_sets[member]


def open_data_set(data: str, root: str | Path | None, *, other_sizes: bool = False) -> Opened:
    """Read the lists of a data set, and check them; see ``open_from``.

    Args:
        data: its name, as "vtab:cifar".
        root: the folder with one folder a data set, or the data set's own.
        other_sizes: take lists of other sizes than the suite's.

    Raises:
        UserError: no such data set, no root, or what ``open_from`` refuses.
    """
    suite, member, _ = find_data_set(data)
    if root is None:
        raise UserError(f"data {data!r} needs root (--root), the folder with {suite.title}'s data sets")
    return open_from(suite, member, Path(root), other_sizes=other_sizes)
