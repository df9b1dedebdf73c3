"""Histograms with equal bins whose edges are exact in every floating-point type.

n rows, H units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grutrace.errors import OptionError, short_repr
from grutrace.records import GATES, Array
from grutrace.statistics.moments import add_to_rows, count_true

#: Default number of bins.
BINS = 32

#: Allowed numbers of bins. Powers of two: scaling a value by one is exact, so a value at an edge is
#: never put on the wrong side of it.
ALLOWED_BINS = tuple(2**power for power in range(1, 11))

#: Number of bins that are counted together, limited by the CPU cache. Their numbers have 16 bits;
#: moving them takes a quarter of the time of 64 bits.
GROUPED_BINS = 32 * 1024


@dataclass(frozen=True)
class Bins:
    """Equal bins from `low` to `high`. Each includes its lower edge, the last also its upper edge.

    Attributes:
        low: First edge.
        high: Last edge.
        count: Number of bins, one of `ALLOWED_BINS`.
    """

    low: float
    high: float
    count: int

    @property
    def edges(self) -> Array:
        """(count + 1,) float64."""
        return self.low + np.arange(self.count + 1) / self._scale

    @property
    def _scale(self) -> float:
        return self.count / (self.high - self.low)

    def histogram(self, values: Array, least: float, largest: float) -> tuple[Array, Array, Array]:
        """Count finite values of shape (n, H).

        One `bincount` over the bins of several units; docs/performance.md compares it with one
        comparison for each edge.

        Args:
            values: (n, H), finite.
            least: Lower bound of the values.
            largest: Upper bound of the values.

        Returns:
            (H, count) the counts; (H,) number below the first edge; (H,) number above the last.
        """
        width = values.shape[1]
        under = over = np.zeros(width, np.int64)
        if least < self.low or largest > self.high:
            under, over = count_true(values < self.low), count_true(values > self.high)
            values = np.clip(values, self.low, self.high)
        counts = np.empty((width, self.count), np.int64)
        together = GROUPED_BINS // self.count
        full = width - width % together
        for some, units in ((slice(full), together), (slice(full, width), width - full)):
            groups = len(counts[some]) // max(1, units)
            if groups:
                grouped = values[:, some].reshape(-1, groups, units)
                counts[some] = self._counts(grouped, at_the_end=largest >= self.high)
        counts[:, -1] -= over
        counts[:, 0] -= under
        return counts, under, over

    def _counts(self, values: Array, *, at_the_end: bool) -> Array:
        """(groups * H, count) of values of shape (n, groups, H) within the edges.

        Args:
            values: Finite values, as for `histogram`.
            at_the_end: Whether a value may be equal to the last edge.
        """
        rows, groups, width = values.shape
        # Values that are counted together are contiguous; gathering them would dominate the cost.
        bins = np.empty((groups, rows, width), np.int16)
        target, scale = bins.transpose(1, 0, 2), values.dtype.type(self._scale)
        if self.low < 0:
            np.floor(values * scale, out=target, casting="unsafe")
        else:
            np.multiply(values, scale, out=target, casting="unsafe")
        if at_the_end:
            np.minimum(bins, np.int16(self.high * self._scale - 1), out=bins)
        # The first bin may have a negative number. Unsigned arithmetic wraps round, so its sum with
        # the unit's offset is correct.
        positions = bins.view(np.uint16).reshape(-1, width)
        firsts = np.arange(width) * self.count - int(self.low * self._scale)
        add_to_rows(positions, firsts.astype(np.uint16))
        positions = positions.reshape(groups, -1)
        counts = [np.bincount(some, minlength=width * self.count) for some in positions]
        return np.concatenate(counts).reshape(-1, self.count)


def quantity_bins(quantity: str, count: int) -> Bins | None:
    """Return the bins of a quantity; None for the input, whose range is unknown."""
    if quantity == "input":
        return None
    gate = quantity in GATES and quantity != "candidate"
    return Bins(0.0 if gate else -1.0, 1.0, count)


def require_bins(count: object) -> int:
    """Check a number of bins and return it.

    Raises:
        OptionError: It is not one of `ALLOWED_BINS`.
    """
    if type(count) is not int or count not in ALLOWED_BINS:
        allowed = ", ".join(map(str, ALLOWED_BINS))
        raise OptionError(f"bins: expected one of {allowed}; found {short_repr(count)}")
    return count
