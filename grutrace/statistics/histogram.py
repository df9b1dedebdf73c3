"""Equal bins whose edges are exact in every floating-point type, and counting values into them.

n rows, H units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grutrace.errors import OptionError, short_repr
from grutrace.records import GATES, Array
from grutrace.statistics.moments import add_to_rows, count_true

#: How many bins a histogram has unless asked otherwise.
BINS = 32

#: How many it can have. Powers of two: so a value is multiplied by one to find its bin, which
#: rounds nothing, and a value at an edge is never put on the wrong side of it.
ALLOWED_BINS = tuple(2**power for power in range(1, 11))

#: Bins of some units, which are counted together: those of more would leave the processor's cache.
#: 16 bits number them, which are moved in a quarter of the time of 64.
GROUPED_BINS = 32 * 1024


@dataclass(frozen=True)
class Bins:
    """Bins from `low` to `high`. Each holds its lower edge, and the last its upper edge as well.

    Attributes:
        low: First edge.
        high: Last edge.
        count: How many bins, out of `ALLOWED_BINS`.
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
        """Count finite values of shape (n, H), none smaller than the least or above the largest.

        One `bincount` over the bins of some units: measured against adding up one comparison per
        edge, see docs/performance.md.

        Returns:
            (H, count) the counts; (H,) how many lie below the first edge; (H,) above the last.
        """
        width = values.shape[1]
        under = over = np.zeros(width, np.int64)
        if least < self.low or largest > self.high:
            under, over = count_true(values < self.low), count_true(values > self.high)
            values = np.clip(values, self.low, self.high)
        counts = np.empty((width, self.count), np.int64)
        together = GROUPED_BINS // self.count
        whole = width - width % together
        for some, units in ((slice(whole), together), (slice(whole, width), width - whole)):
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
            values: See there.
            at_the_end: Whether some are perhaps at the last edge.
        """
        rows, groups, width = values.shape
        # What is counted together lies together: to gather it takes longer than all else.
        bins = np.empty((groups, rows, width), np.int16)
        target, scale = bins.transpose(1, 0, 2), values.dtype.type(self._scale)
        if self.low < 0:
            np.floor(values * scale, out=target, casting="unsafe")
        else:
            np.multiply(values, scale, out=target, casting="unsafe")
        if at_the_end:
            np.minimum(bins, np.int16(self.high * self._scale - 1), out=bins)
        # The first bin may have a negative number here. Unsigned ones go round at their end, so the
        # sum with what the unit has is right all the same.
        positions = bins.view(np.uint16).reshape(-1, width)
        firsts = np.arange(width) * self.count - int(self.low * self._scale)
        add_to_rows(positions, firsts.astype(np.uint16))
        positions = positions.reshape(groups, -1)
        found = [np.bincount(some, minlength=width * self.count) for some in positions]
        return np.concatenate(found).reshape(-1, self.count)


def quantity_bins(quantity: str, count: int) -> Bins | None:
    """The bins of a quantity; None for the input, which may be anywhere."""
    if quantity == "input":
        return None
    gate = quantity in GATES and quantity != "candidate"
    return Bins(0.0 if gate else -1.0, 1.0, count)


def require_bins(count: object) -> int:
    """A number of bins that there can be.

    Raises:
        OptionError: It is none.
    """
    if type(count) is not int or count not in ALLOWED_BINS:
        allowed = ", ".join(map(str, ALLOWED_BINS))
        raise OptionError(f"bins: expected one of {allowed}; found {short_repr(count)}")
    return count
