"""Are two traces the same, and if not, where do they differ and why."""

from grutrace.analysis.difference.comparing import TraceDifference, compare
from grutrace.analysis.difference.discrepancies import (
    Circumstance,
    Mismatch,
    Place,
    ValueDifference,
    WeightsDifference,
)

__all__ = [
    "Circumstance",
    "Mismatch",
    "Place",
    "TraceDifference",
    "ValueDifference",
    "WeightsDifference",
    "compare",
]
