"""Sweeps over the data sets of benchmark suites: methods, recipes and seeds, shared by processes."""

from .engines import ENGINES
from .options import Cell, Run, SweepOptions
from .protocols import PROTOCOLS
from .table import Row, Spread, Table, sweep_table, write_table
from .work import Places, sweep

__all__ = [
    "ENGINES",
    "PROTOCOLS",
    "Cell",
    "Places",
    "Row",
    "Run",
    "Spread",
    "SweepOptions",
    "Table",
    "sweep",
    "sweep_table",
    "write_table",
]
