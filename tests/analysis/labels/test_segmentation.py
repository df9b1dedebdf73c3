"""Tests of boundary scores, against loops that follow the paper and known scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grutrace.analysis.labels.segmentation import peaks, score_boundaries
from grutrace.errors import OptionError


def marks(boundaries, length) -> np.ndarray:
    result = np.zeros(length, bool)
    result[list(boundaries)] = True
    return result


def score(detected, reference, length=100, tolerance=2):
    return score_boundaries(marks(detected, length), marks(reference, length), [length], tolerance)


def test_all_and_none() -> None:
    same = score([10, 30, 60], [10, 30, 60])
    assert (same.precision, same.recall, same.f_score, same.r_value) == (1, 1, 1, 1)
    assert same.over_segmentation == 0
    none = score([50], [10])
    assert (none.hits, none.precision, none.recall) == (0, 0, 0)
    # HR = 0, OS = 0: r1 = 100, r2 = -100 / sqrt(2).
    assert none.r_value == pytest.approx(1 - (100 + 100 / math.sqrt(2)) / 200)


def test_a_boundary_at_every_step_scores_badly() -> None:
    every = score(range(1, 100), [10, 30, 60])
    assert every.recall == 1
    assert every.over_segmentation == pytest.approx(99 / 3 - 1)
    # HR = 100, OS = 3200: r1 = 3200, r2 = -3200 / sqrt(2).
    assert every.r_value == pytest.approx(1 - 3200 * (1 + 1 / math.sqrt(2)) / 200)


def test_the_tolerance_and_one_hit_each() -> None:
    assert score([12], [10]).hits == 1
    assert score([13], [10]).hits == 0
    assert score([9, 10, 11], [10]).hits == 1
    assert score([10], [9, 11]).hits == 1
    # The earlier takes the earlier, so that both hit.
    assert score([10, 13], [8, 12]).hits == 2


def most_pairs(detected, reference, tolerance) -> int:
    """By trying everything."""
    if not detected:
        return 0
    first, *rest = detected
    best = most_pairs(rest, reference, tolerance)
    for boundary in reference:
        if abs(boundary - first) <= tolerance:
            remaining = [other for other in reference if other != boundary]
            best = max(best, 1 + most_pairs(rest, remaining, tolerance))
    return best


def test_no_pairing_has_more_hits() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        result, reference = (
            sorted(random.choice(20, random.integers(0, 6), replace=False).tolist())
            for _ in range(2)
        )
        expected = most_pairs(result, reference, 2)
        assert score(result, reference, 20).hits == expected


def test_pairs_stay_within_a_sequence() -> None:
    result, reference = marks([9], 20), marks([10], 20)
    assert score_boundaries(result, reference, [20]).hits == 1
    assert score_boundaries(result, reference, [10, 10]).hits == 0
    many = np.full(40, 1)
    same = marks(range(40), 40)
    assert score_boundaries(same, same, many).hits == 40


def test_a_zero_denominator_gives_nan() -> None:
    nothing = score([], [])
    assert math.isnan(nothing.precision)
    assert math.isnan(nothing.recall)
    assert math.isnan(nothing.r_value)
    assert score([3], []).precision == 0


def test_shapes_must_fit() -> None:
    with pytest.raises(OptionError, match=r"reference: expected shape \(5,\).*found \(4,\)"):
        score_boundaries(np.zeros(5, bool), np.zeros(4, bool), [2, 3])


def test_peaks() -> None:
    values = np.array([0, 3, 0, 2, 2, 0, np.nan, 1, 0.5, 4, 5])
    result = np.flatnonzero(peaks(values, [11], 0.6))
    assert result.tolist() == [1, 3, 7, 10]
    # Neighbours in another sequence are none.
    assert np.flatnonzero(peaks(np.array([1.0, 2, 3, 2]), [2, 2], 0)).tolist() == [1, 2]
    assert not peaks(np.zeros(5), [5], 0).any()
    assert not len(peaks(np.zeros(0), [], 0))
