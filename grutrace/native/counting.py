"""Count values unit by unit, compiled.

n rows, H units.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np

from grutrace.native.library import CountOptions, load
from grutrace.records import Array


class BinEdges(Protocol):
    """Equal bins, as in `grutrace.statistics.histogram.Bins`."""

    @property
    def low(self) -> float:
        """First edge."""

    @property
    def high(self) -> float:
        """Last edge."""


def count_rows(
    rows: Array,
    units: Array,
    histogram: Array,
    bins: BinEdges | None,
    bounds: tuple[float, float],
    *,
    shares: bool,
    moments: bool,
) -> bool:
    """Add rows to the statistics of their units, in place.

    Counts, extremes, shares and histograms have the same bits as those of
    `grutrace.statistics.moments`; the moments agree to rounding.

    Args:
        rows: (n, H), C-contiguous.
        units: (H,) of type `grutrace.statistics.moments.UNIT_DTYPE`.
        histogram: (H, bins) int64; unused without bins.
        bins: Bins of the histogram; None for none.
        bounds: A value whose magnitude is below the first or above the second is counted for the
            shares.
        shares: Whether to count shares.
        moments: Whether to compute the mean and the squares.

    Returns:
        Whether they were added: False without a compiled library, or for another floating-point
        type or byte order.
    """
    library = load()
    count = None if library is None else library.count.get(rows.dtype.name)
    if count is None or not all(map(_is_plain, (rows, units, histogram))):
        return False
    low, high = (0.0, 0.0) if bins is None else (bins.low, bins.high)
    number = 0 if bins is None else histogram.shape[1]
    options = CountOptions(number, low, high, *bounds, shares, moments)
    count(
        rows.ctypes.data,
        *rows.shape,
        units.ctypes.data,
        histogram.ctypes.data,
        ctypes.addressof(options),
    )
    return True


def sum_powers(rows: Array, means: Array) -> Array | None:
    """Return the sums of second, third and fourth powers about a mean, of finite values: (3, H).

    Args:
        rows: (n, H), C-contiguous.
        means: (H,) float64.

    Returns:
        The sums; None without a compiled library, or for another floating-point type or byte order.
    """
    library = load()
    add_powers = None if library is None else library.add_powers.get(rows.dtype.name)
    if add_powers is None or not _is_plain(rows):
        return None
    means, sums = np.ascontiguousarray(means), np.zeros((3, rows.shape[1]))
    add_powers(rows.ctypes.data, *rows.shape, means.ctypes.data, sums.ctypes.data)
    return sums


def _is_plain(array: Array) -> bool:
    """Whether the library can read or write the elements by their address, one after another."""
    return array.flags.c_contiguous and array.dtype.isnative
