"""How a cost is measured: two things in turn in one process, and the ratio pair by pair.

Machines are shared and noisy, so single times mean little. A B A B ... and the median of B / A
holds when the machine's speed drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

#: The least number of pairs that a figure rests on.
PAIRS = 11

#: Pairs go on until this much time was spent, so that short calls are measured more often. Seconds.
BUDGET = 1.0

#: But not for ever.
MOST_PAIRS = 400


@dataclass(frozen=True)
class Ratio:
    """What B costs beside A.

    Attributes:
        median: Median over the pairs of B's time over A's.
        low: The ratio that a tenth of the pairs are below.
        high: The ratio that a tenth of the pairs are above.
        base: Median time of A, in seconds.
        pairs: How many pairs.
    """

    median: float
    low: float
    high: float
    base: float
    pairs: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def ratio(base: Callable[[], object], other: Callable[[], object], budget: float = BUDGET) -> Ratio:
    """Measure ``other`` against ``base``, after warming up both."""
    for _ in range(2):
        _time(base), _time(other)
    pairs: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(pairs) < PAIRS or (time.perf_counter() - began < budget and len(pairs) < MOST_PAIRS):
        pairs.append((_time(base), _time(other)))
    ratios = sorted(b / a for a, b in pairs)
    tenth = len(ratios) // 10
    return Ratio(
        statistics.median(ratios),
        ratios[tenth],
        ratios[-1 - tenth],
        statistics.median(a for a, _ in pairs),
        len(pairs),
    )


def _time(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
