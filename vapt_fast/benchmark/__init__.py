"""Measure what a model costs: training steps and forward passes of whole models, compared fairly.

Random weights and data, prompts that are not zero, rounds in turn (A B C A B C), medians and quartiles, and
no speed without its numbers having been checked in the same run. ``vapt-fast bench`` prints it; bench/
measures all rivals with it.
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
