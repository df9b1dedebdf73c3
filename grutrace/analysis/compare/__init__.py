"""Are two traces the same, and if not, where do they differ and why."""

from grutrace.analysis.compare.report import (
    Circumstance,
    Mismatch,
    Place,
    ValueDifference,
    WeightsDifference,
)
from grutrace.analysis.compare.trace_diff import TraceDifference, compare

__all__ = [
    "Circumstance",
    "Mismatch",
    "Place",
    "TraceDifference",
    "ValueDifference",
    "WeightsDifference",
    "compare",
]
