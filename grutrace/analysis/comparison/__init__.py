"""Compare two traces: whether they are the same, where they differ, and the likely cause."""

from grutrace.analysis.comparison.report import (
    ContextDifference,
    Mismatch,
    ValueDifference,
    ValuePair,
    WeightsDifference,
)
from grutrace.analysis.comparison.trace_diff import TraceDifference, compare

__all__ = [
    "ContextDifference",
    "Mismatch",
    "TraceDifference",
    "ValueDifference",
    "ValuePair",
    "WeightsDifference",
    "compare",
]
