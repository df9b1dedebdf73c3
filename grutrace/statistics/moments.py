"""What is known of each unit: moments, extremes, shares; of a block of rows, and of two together.

Moments are kept as a count, a mean and the sum of squared deviations from it. Two of them are
joined by the pairwise update of Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise
algorithm for computing sample variances" (also 1983, "Algorithms for computing the sample
variance", The American Statistician 37): no difference of large sums is ever taken, so a gate that
hardly moves keeps its variance.

n rows, H units.

Sums over rows and to rows, extremes, as fast as NumPy has them. n rows, H units.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grutrace.records import Array

#: NumPy is fast on long rows, slow on short ones: so short ones are laid side by side. Elements.
WIDE = 4096

#: What a sum of booleans can reach in the smallest type, in which it is fastest.
_LARGEST = 255


def reduce_rows(ufunc: np.ufunc, values: Array, dtype: Any = None) -> Array:
    """Reduce C-contiguous (n, H) values over their rows: (H,).

    Args:
        ufunc: By what.
        values: What.
        dtype: In which type, as long as rows are side by side: of n, one in WIDE // H, or each.
    """
    rows, width = values.shape
    beside = WIDE // max(1, width)
    if beside < 2:
        return np.asarray(ufunc.reduce(values, axis=0, dtype=dtype))
    if rows < 2 * beside:
        # Not in the type that was asked for: it need only hold what comes of rows side by side.
        return np.asarray(ufunc.reduce(values, axis=0))
    whole = rows - rows % beside
    folded = ufunc.reduce(values[:whole].reshape(-1, beside * width), axis=0, dtype=dtype)
    # Once more as wide as ever: whatever is left over goes along.
    wider = np.result_type(folded, np.int64) if folded.dtype.kind == "u" else folded.dtype
    parts = [folded.reshape(beside, width).astype(wider), values[whole:].astype(wider)]
    return np.asarray(ufunc.reduce(np.concatenate(parts), axis=0))


def add_to_rows(values: Array, row: Array) -> None:
    """Add (H,) to each row of C-contiguous (n, H) values, in place."""
    rows, width = values.shape
    beside = max(1, WIDE // max(1, width))
    whole = rows - rows % beside
    wide = values[:whole].reshape(-1, beside * width)
    wide += np.tile(row, beside)
    values[whole:] += row


def count_true(hits: Array) -> Array:
    """How many of (n, H) booleans are true, by unit: (H,) int64."""
    counts = np.zeros(hits.shape[1], np.int64)
    step = _LARGEST * max(1, WIDE // max(1, hits.shape[1]))
    for start in range(0, len(hits), step):
        some = hits[start : start + step].view(np.uint8)
        counts += reduce_rows(np.add, some, np.uint8).astype(np.int64)
    return counts


#: Below the one a gate counts as nearly shut, above the other as nearly open. The bounds are those
#: of Karpathy, Johnson and Li (2015), "Visualizing and understanding recurrent networks".
SHUT, OPEN = 0.1, 0.9

#: One unit. `count` is of finite values, and only they are in what follows it. `squares` is the sum
#: of squared deviations from the mean; `minimum` and `maximum` are infinities the other way round
#: where there is no value.
UNITS = np.dtype(
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

_COUNTS = tuple(name for name in UNITS.names or () if UNITS[name].kind == "i" and name != "count")


def no_values(width: int) -> Array:
    """(H,) of type `UNITS`, of nothing."""
    units = np.zeros(width, UNITS)
    units["minimum"], units["maximum"] = np.inf, -np.inf
    return units


def describe(
    values: Array, *, shares: bool = True, moments: bool = True
) -> tuple[Array, Array, Array]:
    """What is known of a block, without the places that a histogram counts.

    Args:
        values: (n, H), C-contiguous, of any floating-point type.
        shares: Whether to count what is below `SHUT` and above `OPEN`; else both are 0.
        moments: Whether to work out the mean and the squares; else both are 0.

    Returns:
        (H,) of type `UNITS`; (n, H) the values, with zeros in the place of what is not finite; (H,)
        how many those are.
    """
    units = no_values(values.shape[1])
    missing, finite = np.zeros(values.shape[1], np.int64), None
    if not len(values):
        return units, values, missing
    # The extremes of a unit tell by themselves whether all its values are finite.
    least, largest = reduce_rows(np.minimum, values), reduce_rows(np.maximum, values)
    if not (np.isfinite(least).all() and np.isfinite(largest).all()):
        finite = np.isfinite(values)
        missing = count_true(~finite)
        units["nan"] = count_true(np.isnan(values))
        units["infinite"] = missing - units["nan"]
        least = reduce_rows(np.minimum, np.where(finite, values, np.inf))
        largest = reduce_rows(np.maximum, np.where(finite, values, -np.inf))
        values = np.where(finite, values, values.dtype.type(0))
    units["count"] = len(values) - missing
    units["minimum"], units["maximum"] = least, largest
    if shares:
        sizes = np.abs(values) if (least < 0).any() else values
        # In the type of the rows, as a summary of a trace compares them.
        units["below"] = count_true(sizes < SHUT) - missing
        units["above"] = count_true(sizes > OPEN)
    if moments:
        units["mean"], units["squares"] = _moments(values, finite, units["count"])
    return units, values, missing


def _moments(values: Array, finite: Array | None, count: Array) -> tuple[Array, Array]:
    """The mean of what is finite, and the squared deviations from it: (H,) each, of two passes."""
    exact = values.astype(np.float64)
    mean = reduce_rows(np.add, exact) / np.maximum(count, 1)
    exact -= mean
    if finite is not None:
        exact[~finite] = 0.0
    return mean, reduce_rows(np.add, np.multiply(exact, exact, out=exact))


def join(into: Array, other: Array) -> None:
    """Take the values of other units into these, both (H,) of type `UNITS`."""
    ours, theirs = into["count"].astype(np.float64), other["count"].astype(np.float64)
    total = np.maximum(ours + theirs, 1)
    apart = other["mean"] - into["mean"]
    # Chan et al., equation 2.1, in terms of means. A side without values changes nothing.
    into["squares"] += other["squares"] + apart * apart * (ours * theirs / total)
    into["mean"] += apart * (theirs / total)
    into["count"] += other["count"]
    into["minimum"] = np.minimum(into["minimum"], other["minimum"])
    into["maximum"] = np.maximum(into["maximum"], other["maximum"])
    for name in _COUNTS:
        into[name] += other[name]
