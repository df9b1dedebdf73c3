"""The same statistics from whole arrays, with NumPy functions in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

#: Of a sum of so many float64 numbers, the part that rounding can change; and a few ulps more.
EPS = float(np.finfo(np.float64).eps)


def edges(quantity: str, bins: int) -> np.ndarray:
    return np.linspace(0.0 if quantity in ("reset", "update") else -1.0, 1.0, bins + 1)


def assert_figures(figures: Any, values: np.ndarray, bins: int = 32) -> None:
    """Compare the figures of one quantity with those of all its values, (N, H)."""
    finite = [column[np.isfinite(column)] for column in values.T]
    exact = [column.astype(np.float64) for column in finite]
    assert figures.count.tolist() == [len(column) for column in finite]
    assert figures.nan.tolist() == np.isnan(values).sum(axis=0).tolist()
    assert figures.infinite.tolist() == np.isinf(values).sum(axis=0).tolist()
    for unit, column in enumerate(exact):
        if not len(column):
            assert np.isnan([figures.mean[unit], figures.variance[unit], figures.std[unit]]).all()
            assert np.isnan([figures.minimum[unit], figures.maximum[unit]]).all()
            continue
        # No sum of n terms is off by more than n ulps of the largest (Higham 2002, section 4.2).
        off = len(column) * EPS
        mean = math.fsum(column) / len(column)
        assert abs(figures.mean[unit] - mean) <= off * np.abs(column).max()
        squares = math.fsum((column - mean) ** 2) / len(column)
        # Deviations are those from a mean that is itself off by so much. Where parts are merged
        # (Chan, Golub and LeVeque 1979), the square of the difference d of two means is added,
        # weighted with n_a n_b / n^2 <= 1/4. With both means off it changes by 2 d times that, and
        # the weighted square of d is at most the variance.
        mean_off = off * np.abs(column).max()
        merged = 2 * mean_off * math.sqrt(squares)
        assert abs(figures.variance[unit] - squares) <= 2 * off * squares + mean_off**2 + merged
        assert figures.std[unit] == np.sqrt(figures.variance[unit])
        assert figures.minimum[unit] == column.min()
        assert figures.maximum[unit] == column.max()
    if figures.quantity == "input":
        assert (figures.histogram, figures.edges, figures.below, figures.above) == (None,) * 4
        assert (figures.underflow, figures.overflow) == (None, None)
        return
    of_bins = edges(figures.quantity, bins)
    assert figures.edges.tolist() == of_bins.tolist()
    for unit, (column, wide) in enumerate(zip(finite, exact, strict=True)):
        counts = np.histogram(wide, of_bins)[0]
        assert figures.histogram[unit].tolist() == counts.tolist()
        assert figures.underflow[unit] == (wide < of_bins[0]).sum()
        assert figures.overflow[unit] == (wide > of_bins[-1]).sum()
        if len(column):
            sizes = np.abs(column)
            assert figures.below[unit] == (sizes < column.dtype.type(0.1)).mean()
            assert figures.above[unit] == (sizes > column.dtype.type(0.9)).mean()


def assert_same(a: Any, b: Any, *, exactly: bool = False) -> None:
    """Compare two statistics of the same run: counts are the same, sums are to rounding."""
    assert a.sites == b.sites
    assert (a.calls, a.steps, a.sequences) == (b.calls, b.steps, b.sequences)
    assert a.annotations == b.annotations
    np.testing.assert_equal(a.residual, b.residual)
    for name in a.sites:
        ours, theirs = a[name], b[name]
        assert list(ours.quantities) == list(theirs.quantities)
        for field in ("calls", "steps", "sequences", "versions", "residual_call"):
            assert getattr(ours, field) == getattr(theirs, field), (name, field)
        np.testing.assert_equal(ours.residual, theirs.residual)
        for quantity in ours.quantities:
            assert_same_figures(ours[quantity], theirs[quantity], exactly=exactly)


def assert_same_figures(a: Any, b: Any, *, exactly: bool = False) -> None:
    same = ("count", "nan", "infinite", "minimum", "maximum", "below", "above", "histogram")
    for field in (*same, "edges", "underflow", "overflow"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), field)
    for field in ("mean", "variance"):
        ours, theirs = getattr(a, field), getattr(b, field)
        largest = np.maximum(np.abs(a.minimum), np.abs(a.maximum))
        scale = largest if field == "mean" else ours
        off = 0 if exactly else 2 * a.count * EPS * scale
        assert (np.isnan(ours) == np.isnan(theirs)).all()
        assert not (np.abs(ours - theirs) > off).any(), field
