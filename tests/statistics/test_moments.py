"""Sums and extremes of short and long rows are those that NumPy finds row by row."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.statistics.moments import LINE_ELEMENTS, add_to_rows, count_true, reduce_axis0

WIDTHS = [1, 2, 3, 7, 100, LINE_ELEMENTS // 2, LINE_ELEMENTS - 1, LINE_ELEMENTS, LINE_ELEMENTS + 1]

ROWS = [0, 1, 2, 255, 256, 600, 5000]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_as_many_are_true_as_there_are(width, rows) -> None:
    """All of them: what a narrow type cannot hold would be missing."""
    assert (count_true(np.ones((rows, width), bool)) == rows).all()
    some = np.random.default_rng(0).random((rows, width)) < 0.9
    assert count_true(some).tolist() == some.sum(axis=0).tolist()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS[1:])
def test_extremes_and_sums_are_those_of_all_rows(width, rows) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, (rows, width)).astype(np.float64)
    assert reduce_axis0(np.minimum, values).tolist() == values.min(axis=0).tolist()
    assert reduce_axis0(np.maximum, values).tolist() == values.max(axis=0).tolist()
    # Of whole numbers, so that the order of adding does not matter.
    assert reduce_axis0(np.add, values).tolist() == values.sum(axis=0).tolist()
    row = np.arange(width, dtype=np.float64)
    expected = values + row
    add_to_rows(values, row)
    assert values.tolist() == expected.tolist()
