"""Tests of the arithmetic of ratios, with a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import pytest

from benchmarks.pairs import MOST_PAIRS, Ratio, ratio, spread


class Clock:
    """Tells a time that goes on by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[[], None]:
        """A function that takes these times in turn, the last for ever."""
        remaining = list(seconds)

        def run() -> None:
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return run


def measured(
    base: tuple[float, ...],
    other: tuple[float, ...],
    budget: float = 0.0,
    limit: float = inf,
) -> Ratio:
    clock = Clock()
    functions = clock.taking(*base), clock.taking(*other)
    return ratio(*functions, budget, limit=limit, warm_up=2, clock=clock)


def test_the_ratio_is_that_of_the_other_to_the_base() -> None:
    result = measured((2.0,), (3.0,))
    assert result == Ratio(median=1.5, low=1.5, high=1.5, count=11, base=2.0)


def test_warm_up_is_not_measured() -> None:
    assert measured((0.01, 0.9, 0.2), (0.05, 0.01, 0.3)).median == pytest.approx(1.5)


def test_slow_functions_get_a_warm_up_and_five_pairs() -> None:
    result = measured((9.0, 2.0), (1.0, 3.0), limit=6.0)
    assert (result.median, result.count) == (1.5, 5)
    assert measured((9.0, 0.25), (1.0, 0.5), limit=6.0).count == 8


def test_ratios_are_taken_pair_by_pair() -> None:
    # A machine that grows slower: the ratio of the medians would be right, too, but not its spread.
    base = tuple(index / 1024 for index in range(1, 14))
    assert measured(base, tuple(2 * second for second in base)) == Ratio(
        2.0, 2.0, 2.0, 11, 8 / 1024
    )


def test_the_spread_omits_a_tenth_at_each_end() -> None:
    result = spread([1.0, 9.0, *[5.0] * 7, 4.0, 6.0])
    assert (result.median, result.low, result.high, result.count) == (5.0, 4.0, 6.0, 11)


def test_short_calls_are_measured_until_the_budget_is_spent() -> None:
    assert measured((0.01,), (0.01,), budget=1.0).count == pytest.approx(50, abs=1)
    assert measured((1e-5,), (1e-5,), budget=1.0).count == MOST_PAIRS
