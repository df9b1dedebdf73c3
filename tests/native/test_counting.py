"""Compiled histograms equal those of NumPy, for few and for many bins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from grutrace.native.counting import count_rows
from grutrace.statistics.moments import UNIT_DTYPE
from tests.instruction_sets import INSTRUCTION_SETS

pytestmark = pytest.mark.parametrize(
    "instruction_set", [name for name in INSTRUCTION_SETS if name != "none"], indirect=True
)


class Edges(NamedTuple):
    low: float
    high: float


def values_within(edges: Edges, rows: int, width: int, bins: int, dtype: str) -> np.ndarray:
    """Random values, among them every edge and its neighbours."""
    values = np.random.default_rng(rows).uniform(*edges, (rows, width)).astype(dtype)
    exact = np.linspace(*edges, bins + 1).astype(dtype)
    special = np.concatenate([exact, np.nextafter(exact, 0), [-0.0]]).clip(*edges)
    flat = values.reshape(-1)
    flat[: len(special)] = special[: len(flat)]
    np.random.default_rng(0).shuffle(flat)
    return values


def expected(values: np.ndarray, edges: Edges, bins: int) -> np.ndarray:
    """The counts of each unit, (H, bins). Both edges of the last bin belong to it."""
    exact = np.linspace(*edges, bins + 1)
    counts = [np.histogram(column.astype(np.float64), exact)[0] for column in values.T]
    return np.array(counts)


@pytest.mark.parametrize("edges", [Edges(0.0, 1.0), Edges(-1.0, 1.0)])
@pytest.mark.parametrize("bins", [2, 16, 32, 64])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 33), (15, 16), (16, 16), (17, 48), (333, 100), (3001, 16)]
)
@pytest.mark.usefixtures("instruction_set")
def test_histograms(rows, width, dtype, bins, edges) -> None:
    values = values_within(edges, rows, width, bins, dtype)
    units, histogram = np.zeros(width, UNIT_DTYPE), np.zeros((width, bins), np.int64)
    bounds = (0.05, 0.95)
    for _ in range(2):
        assert count_rows(values, units, histogram, edges, bounds, shares=True, moments=True)
    np.testing.assert_array_equal(histogram, 2 * expected(values, edges, bins))


@pytest.mark.parametrize("outlier", [1.5, -0.5, np.nan, np.inf])
@pytest.mark.usefixtures("instruction_set")
def test_a_value_outside_the_edges_spoils_no_other_count(outlier) -> None:
    edges = Edges(0.0, 1.0)
    values = values_within(edges, 2000, 32, 32, "float32")
    # In the middle of the rows, so that some are counted before it and some after.
    values[1203, 5] = outlier
    units, histogram = np.zeros(32, UNIT_DTYPE), np.zeros((32, 32), np.int64)
    assert count_rows(values, units, histogram, edges, (0.05, 0.95), shares=True, moments=True)
    values[1203, 5] = values[1202, 5]
    whole = expected(values, edges, 32)
    missing = np.histogram(values[1203:1204, 5], 32, edges)[0]
    whole[5] -= missing
    np.testing.assert_array_equal(histogram, whole)


@pytest.mark.usefixtures("instruction_set")
def test_more_rows_than_a_small_count_holds() -> None:
    """All values in one bin: its count passes 16 bits."""
    rows, edges = 3 * 65_536 + 5, Edges(0.0, 1.0)
    values = np.full((rows, 16), 0.4, np.float32)
    units, histogram = np.zeros(16, UNIT_DTYPE), np.zeros((16, 32), np.int64)
    assert count_rows(values, units, histogram, edges, (0.05, 0.95), shares=False, moments=False)
    assert (histogram[:, 12] == rows).all()
    assert histogram.sum() == 16 * rows
