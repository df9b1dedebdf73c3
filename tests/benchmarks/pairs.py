"""How a cost is measured: two things in turn in one process, and the ratio pair by pair.

Machines are shared and noisy, so single times mean little. A B A B ... and the median of B / A
holds when the machine's speed drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: The least number of pairs that a figure rests on, where nothing is said about it.
PAIRS = 11

#: Pairs go on until this much time was spent, so that short calls are measured more often. Seconds.
BUDGET = 0.5

#: But not for ever.
MOST_PAIRS = 400

#: Runs of both before the first pair.
WARM_UP = 2


@dataclass(frozen=True)
class Spread:
    """Some measurements of one thing.

    Attributes:
        median: Their median.
        low: What a tenth of them are below.
        high: What a tenth of them are above.
        count: How many.
    """

    median: float
    low: float
    high: float
    count: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Ratio(Spread):
    """What B costs beside A, over the pairs.

    Attributes:
        base: Median time of A, in seconds.
    """

    base: float


def spread(values: Sequence[float]) -> Spread:
    """Summarize measurements."""
    rising = sorted(values)
    tenth = len(rising) // 10
    return Spread(statistics.median(rising), rising[tenth], rising[-1 - tenth], len(rising))


def ratio(
    base: Callable[[], object],
    other: Callable[[], object],
    budget: float = BUDGET,
    *,
    pairs: int = PAIRS,
    warm_up: int = WARM_UP,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Measure ``other`` against ``base``.

    Args:
        base: A.
        other: B.
        budget: Pairs go on for this long at least, in seconds, but not past `MOST_PAIRS`.
        pairs: How many there are at least.
        warm_up: How often both run before the first pair.
        clock: Tells the time in seconds.
    """

    def timed(function: Callable[[], object]) -> float:
        began = clock()
        function()
        return clock() - began

    for _ in range(warm_up):
        timed(base), timed(other)
    times: list[tuple[float, float]] = []
    began = clock()
    while len(times) < pairs or (clock() - began < budget and len(times) < MOST_PAIRS):
        times.append((timed(base), timed(other)))
    return ratio_of(times)


def ratio_of(times: Sequence[tuple[float, float]]) -> Ratio:
    """Summarize pairs of times that were measured elsewhere: A's and B's."""
    found = spread([b / a for a, b in times])
    return Ratio(**asdict(found), base=statistics.median(a for a, _ in times))


def speed(found: Ratio) -> Spread:
    """How fast B is beside A, where a ratio says how long it takes."""
    return Spread(1 / found.median, 1 / found.high, 1 / found.low, found.count)
