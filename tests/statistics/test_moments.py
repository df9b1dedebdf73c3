"""Sums, extremes and counts equal those of NumPy, for short and long rows."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.statistics.moments import LINE_ELEMENTS, add_to_rows, count_true, reduce_axis0

WIDTHS = [1, 2, 3, 7, 100, LINE_ELEMENTS // 2, LINE_ELEMENTS - 1, LINE_ELEMENTS, LINE_ELEMENTS + 1]

ROWS = [0, 1, 2, 255, 256, 600, 5000]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_true_values_are_counted_exactly(width, rows) -> None:
    """The count does not overflow, even if every value is true."""
    assert (count_true(np.ones((rows, width), bool)) == rows).all()
    mask = np.random.default_rng(0).random((rows, width)) < 0.9
    assert count_true(mask).tolist() == mask.sum(axis=0).tolist()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS[1:])
def test_extremes_and_sums_equal_those_of_numpy(width, rows) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, (rows, width)).astype(np.float64)
    np.testing.assert_array_equal(reduce_axis0(np.minimum, values), values.min(axis=0))
    np.testing.assert_array_equal(reduce_axis0(np.maximum, values), values.max(axis=0))
    # Sums of whole numbers do not depend on the order of addition.
    np.testing.assert_array_equal(reduce_axis0(np.add, values), values.sum(axis=0))
    row = np.arange(width, dtype=np.float64)
    expected = values + row
    add_to_rows(values, row)
    np.testing.assert_array_equal(values, expected)
