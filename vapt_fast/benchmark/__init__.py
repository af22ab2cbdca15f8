"""Benchmarks: training steps and forward passes of whole models, compared fairly.

Weights and data are random, prompts are not zero, rounds are in turn (A B C A B C), and the results are
medians and quartiles. No speed is reported unless its numbers were checked in the same run.
"""

from .agreement import DisagreementError
from .comparison import Comparison, Row, as_table
from .environment import describe, gpu_state
from .timing import Spread, in_turns
from .workload import LINEAR_PROBE, MODES, PRECISIONS, Setting, Variant, Workload

__all__ = [
    "LINEAR_PROBE",
    "MODES",
    "PRECISIONS",
    "Comparison",
    "DisagreementError",
    "Row",
    "Setting",
    "Spread",
    "Variant",
    "Workload",
    "as_table",
    "describe",
    "gpu_state",
    "in_turns",
]
