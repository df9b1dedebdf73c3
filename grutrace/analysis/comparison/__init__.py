"""Are two traces the same, and if not, where do they differ and why."""

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
