"""Moments, extremes and shares of each unit, of a block of rows, and merging of two of them.

Moments are kept as a count, a mean and the sum of squared deviations. They are merged by the
pairwise update of Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for
computing sample variances" (also 1983, "Algorithms for computing the sample variance", The American
Statistician 37). No difference of large sums is taken, so the variance of a nearly constant gate is
accurate.

n rows, H units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from grutrace.native.counting import count_rows
from grutrace.records import Array

#: Number of elements of a long row. NumPy is slow on short rows, so several are viewed as one long
#: row.
LINE_ELEMENTS = 4096

#: Largest sum in uint8, the fastest type.
_LARGEST = 255


def reduce_axis0(ufunc: np.ufunc, values: Array, dtype: Any = None) -> Array:
    """Reduce C-contiguous (n, H) values over their first axis: (H,).

    Args:
        ufunc: The NumPy ufunc.
        values: (n, H).
        dtype: Type of the intermediate results, as for `ufunc.reduce`.
    """
    rows, width = values.shape
    tiles = LINE_ELEMENTS // max(1, width)
    if tiles < 2:
        return np.asarray(ufunc.reduce(values, axis=0, dtype=dtype))
    if rows < 2 * tiles:
        # `dtype` is wide enough only for the sum of one long row.
        return np.asarray(ufunc.reduce(values, axis=0))
    full = rows - rows % tiles
    folded = ufunc.reduce(values[:full].reshape(-1, tiles * width), axis=0, dtype=dtype)
    # Reduce the long row to the unit width, together with the remaining rows.
    wider = np.result_type(folded, np.int64) if folded.dtype.kind == "u" else folded.dtype
    parts = [folded.reshape(tiles, width).astype(wider), values[full:].astype(wider)]
    return np.asarray(ufunc.reduce(np.concatenate(parts), axis=0))


def add_to_rows(values: Array, row: Array) -> None:
    """Add (H,) to each row of C-contiguous (n, H) values, in place."""
    rows, width = values.shape
    tiles = max(1, LINE_ELEMENTS // max(1, width))
    full = rows - rows % tiles
    wide = values[:full].reshape(-1, tiles * width)
    wide += np.tile(row, tiles)
    values[full:] += row


def count_true(hits: Array) -> Array:
    """Count the true values of (n, H) booleans by unit: (H,) int64."""
    counts = np.zeros(hits.shape[1], np.int64)
    step = _LARGEST * max(1, LINE_ELEMENTS // max(1, hits.shape[1]))
    for start in range(0, len(hits), step):
        block = hits[start : start + step].view(np.uint8)
        counts += reduce_axis0(np.add, block, np.uint8).astype(np.int64)
    return counts


#: A gate below `LOW` or above `HIGH` is nearly saturated. The bounds are those of Karpathy, Johnson
#: and Li (2015), "Visualizing and understanding recurrent networks".
LOW, HIGH = 0.1, 0.9

#: Statistics of one unit. All but `nan` and `infinite` are of finite values, counted by `count`.
#: `squares` is the sum of squared deviations from the mean. Without values `minimum` is infinity
#: and `maximum` minus infinity.
UNIT_DTYPE = np.dtype(
    [
        ("count", "<i8"),
        ("nan", "<i8"),
        ("infinite", "<i8"),
        ("mean", "<f8"),
        ("squares", "<f8"),
        ("minimum", "<f8"),
        ("maximum", "<f8"),
        ("below", "<i8"),
        ("above", "<i8"),
        ("underflow", "<i8"),
        ("overflow", "<i8"),
    ]
)

_COUNTS = tuple(
    name for name in UNIT_DTYPE.names or () if UNIT_DTYPE[name].kind == "i" and name != "count"
)


def empty_stats(width: int) -> Array:
    """Return (H,) of type `UNIT_DTYPE` without values."""
    units = np.zeros(width, UNIT_DTYPE)
    units["minimum"], units["maximum"] = np.inf, -np.inf
    return units


def summarize_block(
    values: Array, *, shares: bool = True, moments: bool = True
) -> tuple[Array, Array, Array]:
    """Compute the statistics of a block, without those of a histogram.

    Args:
        values: (n, H), C-contiguous, of any floating-point type.
        shares: Whether to count values below `LOW` and above `HIGH`; otherwise both are 0.
        moments: Whether to compute the mean and the squares; otherwise both are 0.

    Returns:
        (H,) of type `UNIT_DTYPE`; (n, H) the values, with 0 in place of non-finite ones; (H,) the
        number of non-finite values.
    """
    units = empty_stats(values.shape[1])
    missing, finite = np.zeros(values.shape[1], np.int64), None
    if not len(values):
        return units, values, missing
    # All values are finite if the extremes are.
    least, largest = reduce_axis0(np.minimum, values), reduce_axis0(np.maximum, values)
    if not (np.isfinite(least).all() and np.isfinite(largest).all()):
        finite = np.isfinite(values)
        missing = count_true(~finite)
        units["nan"] = count_true(np.isnan(values))
        units["infinite"] = missing - units["nan"]
        least = reduce_axis0(np.minimum, np.where(finite, values, np.inf))
        largest = reduce_axis0(np.maximum, np.where(finite, values, -np.inf))
        values = np.where(finite, values, values.dtype.type(0))
    units["count"] = len(values) - missing
    units["minimum"], units["maximum"] = least, largest
    if shares:
        sizes = np.abs(values) if (least < 0).any() else values
        # Compare in the type of the rows, as the summary of a trace does.
        units["below"] = count_true(sizes < LOW) - missing
        units["above"] = count_true(sizes > HIGH)
    if moments:
        units["mean"], units["squares"] = _moments(values, finite, units["count"])
    return units, values, missing


def unit_stats(rows: Mapping[str, Array], *, shares: bool = True, moments: bool = True) -> Array:
    """Return the statistics of a block of one quantity, by its name: (H,) of type `UNIT_DTYPE`.

    The other arguments are those of `summarize_block`.
    """
    (block,) = rows.values()
    block = np.ascontiguousarray(block)
    units = compiled_stats(block, shares=shares, moments=moments)
    if units is None:
        units, _, _ = summarize_block(block, shares=shares, moments=moments)
    return units


def compiled_stats(
    block: Array, *, shares: bool, moments: bool, powers: Array | None = None
) -> Array | None:
    """Return the statistics of `summarize_block`; None without a compiled function for them.

    Args:
        block: (n, H), C-contiguous.
        shares: As for `summarize_block`.
        moments: Likewise.
        powers: (2, H) zeros, which become the sums of third and fourth powers of the deviations
            from the mean; None to leave them out.
    """
    units, histogram = empty_stats(block.shape[1]), np.empty((block.shape[1], 0), np.int64)
    is_counted = count_rows(
        block, units, histogram, None, (LOW, HIGH), shares=shares, moments=moments, powers=powers
    )
    return units if is_counted else None


def _moments(values: Array, finite: Array | None, count: Array) -> tuple[Array, Array]:
    """Compute the mean of finite values and the squared deviations, in two passes: (H,) each."""
    exact = values.astype(np.float64)
    mean = reduce_axis0(np.add, exact) / np.maximum(count, 1)
    exact -= mean
    if finite is not None:
        exact[~finite] = 0.0
    return mean, reduce_axis0(np.add, np.multiply(exact, exact, out=exact))


def merge_stats(into: Array, other: Array) -> None:
    """Merge the statistics of other units into these, both (H,) of type `UNIT_DTYPE`."""
    ours, theirs = into["count"].astype(np.float64), other["count"].astype(np.float64)
    total = np.maximum(ours + theirs, 1)
    delta = other["mean"] - into["mean"]
    # Chan et al., equation 2.1, in terms of means.
    into["squares"] += other["squares"] + delta * delta * (ours * theirs / total)
    into["mean"] += delta * (theirs / total)
    into["count"] += other["count"]
    into["minimum"] = np.minimum(into["minimum"], other["minimum"])
    into["maximum"] = np.maximum(into["maximum"], other["maximum"])
    for name in _COUNTS:
        into[name] += other[name]
