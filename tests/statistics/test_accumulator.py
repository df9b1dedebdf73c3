"""Tests of accumulated statistics, against NumPy on all values, for any split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grutrace.errors import OptionError
from grutrace.statistics import accumulator as tally_module
from grutrace.statistics import moments
from grutrace.statistics.accumulator import QuantityAccumulator, _unit_statistics
from grutrace.statistics.histogram import Bins, quantity_bins, require_bins
from tests.statistics.oracle import assert_figures

# hypothesis draws many examples for one set.
pytestmark = [
    pytest.mark.usefixtures("instruction_set"),
    pytest.mark.filterwarnings("ignore:.*function-scoped fixture"),
]

QUANTITIES = ("reset", "update", "candidate", "hidden", "input")


def figures(quantity, parts, bins=32):
    tally = QuantityAccumulator(quantity, parts[0].shape[1], bins)
    for part in parts:
        tally.add(part)
    return _unit_statistics(quantity, tally, bins)


def gates(rng, rows, width, dtype="f4", scale=3.0):
    return (1 / (1 + np.exp(-scale * rng.standard_normal((rows, width))))).astype(dtype)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (5000, 3), (700, 64), (300, 1500), (0, 4)])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_equals_all_values_at_once(quantity, shape, dtype) -> None:
    values = gates(np.random.default_rng(0), *shape, dtype)
    if quantity not in ("reset", "update"):
        values = (2 * values - 1).astype(dtype)
    assert_figures(figures(quantity, [values]), values)


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


def test_the_variance_of_merged_parts_with_nearly_equal_means() -> None:
    values = np.array([[1.0], [1.0], [1.0], [1.0000001]], "f4")
    assert_figures(figures("hidden", np.split(values, [1])), values)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equals_all_values_at_once_for_any_split(data) -> None:
    """Values may be NaN, infinite, at bin edges or far outside."""
    quantity = data.draw(st.sampled_from(QUANTITIES))
    width = data.draw(st.integers(1, 3))
    special = st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 0.1, 0.9, 0.5, 1 / 32, 1.0000001, np.nan, np.inf]
    )
    rows = data.draw(st.lists(st.lists(special | numbers, min_size=width, max_size=width)))
    values = np.array(rows, "f4").reshape(-1, width)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    bins = data.draw(st.sampled_from([2, 8, 32]))
    assert_figures(figures(quantity, np.split(values, cuts), bins), values, bins)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(1, 80))
def test_merged_parts_equal_the_whole(sizes, width) -> None:
    parts = [gates(np.random.default_rng(size), size, width) for size in sizes]
    merged = QuantityAccumulator("update", width, 32)
    for part in parts:
        one = QuantityAccumulator("update", width, 32)
        one.add(part)
        merged.merge(one)
    assert_figures(_unit_statistics("update", merged, 32), np.concatenate(parts))


def test_a_nearly_constant_gate_keeps_its_variance() -> None:
    """For a gate at 1 - 1e-7, a mean of squares minus a squared mean loses all digits."""
    rng = np.random.default_rng(0)
    values = (1 - 1e-7 * rng.random((200_000, 2))).astype("f8")
    assert_figures(figures("update", np.split(values, 50)), values)
    naive = (values**2).mean(axis=0) - values.mean(axis=0) ** 2
    assert (np.abs(naive / values.var(axis=0) - 1) > 1e-3).all(), "the control"


def test_values_that_are_not_finite_change_no_other_unit() -> None:
    values = gates(np.random.default_rng(0), 500, 5)
    values[3, 0] = values[400:, 1] = np.nan
    values[7, 2], values[8, 2] = np.inf, -np.inf
    values[:, 3] = np.nan
    result = figures("update", [values[:250], values[250:]])
    assert_figures(result, values)
    assert result.nan.tolist() == [1, 100, 0, 500, 0]
    assert result.infinite.tolist() == [0, 0, 2, 0, 0]
    assert np.isnan(result.below[3])


def test_values_at_bin_edges_are_counted_as_in_numpy() -> None:
    of_bins = quantity_bins("update", 32)
    at = of_bins.edges.astype("f4")
    values = np.concatenate([at, np.nextafter(at, np.float32(-1)), np.nextafter(at, np.float32(2))])
    assert_figures(figures("update", [values[:, np.newaxis]]), values[:, np.newaxis])
    assert figures("update", [np.ones((4, 1), "f4")]).histogram[0, -1] == 4


def test_hidden_states_may_lie_outside_all_bins() -> None:
    values = np.array([[-3.0], [-1.0], [0.0], [1.0], [1.5], [70000.0]], "f4")
    result = figures("hidden", [values])
    assert (result.underflow.tolist(), result.overflow.tolist()) == ([1], [2])
    assert result.histogram.sum() == 3
    assert_figures(result, values)


def test_rows_that_are_not_contiguous_count_equally() -> None:
    values = gates(np.random.default_rng(0), 300, 40)
    assert_figures(figures("update", [values[:, ::2]]), values[:, ::2])
    assert_figures(figures("update", [np.asfortranarray(values)]), values)


def test_rows_of_another_byte_order_count_equally() -> None:
    values = gates(np.random.default_rng(0), 300, 20)
    assert_figures(figures("update", [values.astype(">f4"), values]), np.concatenate([values] * 2))


@pytest.mark.parametrize("together", [1, 7, 10**9])
def test_every_block_size_counts_equally(together) -> None:
    values = gates(np.random.default_rng(0), 200, 5)
    tally = QuantityAccumulator("update", 5, 32, block_elements=together)
    tally.add(values)
    assert_figures(_unit_statistics("update", tally, 32), values)


@pytest.mark.parametrize("width", [33, 70, 300])
@pytest.mark.parametrize("quantity", ["update", "candidate"])
@pytest.mark.parametrize("bins", [256, 1024])
def test_bins_of_several_units_are_counted_together(quantity, bins, width) -> None:
    """More units than one group holds, with a remainder."""
    values = gates(np.random.default_rng(0), 90, width)
    values[:3] = np.array([[1.0], [0.0], [0.5]])
    if quantity == "candidate":
        values = 2 * values - 1
    tally = QuantityAccumulator(quantity, width, bins)
    tally.add(values)
    assert_figures(_unit_statistics(quantity, tally, bins), values, bins)


@pytest.mark.parametrize("bins", [0, 3, 20, 2048, 8.0, "8", None, True])
def test_a_number_of_bins_that_rounds_is_refused(bins) -> None:
    with pytest.raises(OptionError, match=r"bins: expected one of 2, 4, .*1024; found"):
        require_bins(bins)


def control_join(monkeypatch) -> None:
    """Join means and squares as if both parts had the same mean."""

    def wrong(into, other):
        rmse = other["mean"].copy()
        other["mean"] = into["mean"]
        right(into, other)
        into["mean"] += (rmse - into["mean"]) * other["count"] / np.maximum(into["count"], 1)

    right = moments.merge_stats
    monkeypatch.setattr(tally_module, "merge_stats", wrong)


def control_bins(monkeypatch) -> None:
    """Bins a little wider than their edges say."""
    monkeypatch.setattr(Bins, "_scale", property(lambda self: self.count / 1.01))


def control_missing(monkeypatch) -> None:
    """Count what is not finite as the zeros that stand in its place."""
    right = moments.summarize_block

    def wrong(values, **which):
        result, filled, missing = right(values, **which)
        return result, filled, 0 * missing

    monkeypatch.setattr(tally_module, "summarize_block", wrong)


@pytest.mark.parametrize("instruction_set", ["none"], indirect=True)
@pytest.mark.parametrize("broken", [control_join, control_bins, control_missing])
def test_control_errors_are_detected(broken, monkeypatch) -> None:
    values = gates(np.random.default_rng(0), 200, 5)
    values[100:] **= 3
    values[3, 2] = np.nan
    parts = np.split(values, 2)
    assert_figures(figures("update", parts), values)
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        assert_figures(figures("update", parts), values)
