"""Measure a cost: run two functions alternately in one process, and take the ratio of each pair.

Machines are shared and noisy, so single times mean little. A B A B ... and the median of B / A
holds when the machine's speed drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: The minimum number of pairs of a figure, unless the table says otherwise.
PAIRS = 11

#: Pairs are measured for at least this time, so short calls are measured more often. Seconds.
BUDGET = 0.3

#: The maximum number of pairs.
MOST_PAIRS = 400

#: After this time, fewer pairs are enough, so that everything ends in ten minutes. Seconds.
LIMIT = 2.0

#: The minimum after that time. A table says where there are fewer than `PAIRS`.
FEWEST = 5

#: Warm-up runs before the first pair, and the time after which one is enough. Seconds.
WARM_UP, WARM = 2, 1.0


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity.

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
    """The cost of B relative to A, over the pairs.

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
    limit: float = LIMIT,
    pairs: int = PAIRS,
    warm_up: int = WARM_UP,
    settle: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Measure ``other`` against ``base``.

    Args:
        base: A.
        other: B.
        budget: Pairs go on for this long at least, in seconds, but not past `MOST_PAIRS`.
        limit: After so many seconds `FEWEST` pairs do.
        pairs: How many there are at least, if that takes no longer.
        warm_up: How often both run before the first pair.
        settle: Called after each B, not timed, so that nothing of B goes on during the next A.
        clock: Tells the time in seconds.
    """

    def timed(function: Callable[[], object]) -> float:
        began = clock()
        function()
        return clock() - began

    def timed_other() -> float:
        result = timed(other)
        if settle is not None:
            settle()
        return result

    began = clock()
    for number in range(warm_up):
        if number == 0 or clock() - began < WARM:
            timed(base), timed_other()
    times: list[tuple[float, float]] = []
    began = clock()

    def enough() -> bool:
        spent, count = clock() - began, len(times)
        if count < pairs:
            return count >= FEWEST and spent >= limit
        return spent >= budget or count >= MOST_PAIRS

    while not enough():
        times.append((timed(base), timed_other()))
    return ratio_of(times)


def ratio_of(times: Sequence[tuple[float, float]]) -> Ratio:
    """Summarize pairs of times that were measured elsewhere: A's and B's."""
    result = spread([b / a for a, b in times])
    return Ratio(**asdict(result), base=statistics.median(a for a, _ in times))


def speed(ratio: Ratio) -> Spread:
    """The speed of B relative to A: the inverse of the ratio of times."""
    return Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low, ratio.count)
