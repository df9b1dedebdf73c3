"""Count values unit by unit, compiled.

n rows, H units.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

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
    powers: Array | None = None,
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
        powers: (2, H) float64, the sums of third and fourth powers of the deviations from the mean;
            None for none. With the moments only.

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
    addresses = (None, None) if powers is None else [each.ctypes.data for each in powers]
    options = CountOptions(number, low, high, *bounds, shares, moments, *addresses)
    count(
        rows.ctypes.data,
        *rows.shape,
        units.ctypes.data,
        histogram.ctypes.data,
        ctypes.addressof(options),
    )
    return True


def _is_plain(array: Array) -> bool:
    """Whether the library can read or write the elements by their address, one after another."""
    return array.flags.c_contiguous and array.dtype.isnative
