"""One quantity at one site: figures of every unit, which grow by blocks of rows."""

from __future__ import annotations

import numpy as np

from grutrace.record import Array
from grutrace.statistics.bins import bins_of
from grutrace.statistics.units import describe, join, no_values

#: What is counted at a time: much for NumPy, little for a processor's cache. Elements.
BLOCK = 128 * 1024


class Tally:
    """Counts the values of a quantity, unit by unit, in memory that does not grow.

    Args:
        quantity: Its name.
        width: How many units (or features of the input).
        bins: Bins of its histogram.
        shares: Whether to count what is below and above the bounds of `units.describe`.
        moments: Whether to work out the moments.
        together: Elements that are counted at a time.

    Attributes:
        bins: Those of its histogram; None for the input.
        units: (width,) of type `units.UNITS`.
        histogram: (width, bins); (width, 0) for the input.
    """

    def __init__(
        self,
        quantity: str,
        width: int,
        bins: int,
        *,
        shares: bool = True,
        moments: bool = True,
        together: int = BLOCK,
    ) -> None:
        self.bins = bins_of(quantity, bins)
        self._shares, self._moments, self._together = shares, moments, together
        self.units = no_values(width)
        self.histogram = np.zeros((width, bins if self.bins else 0), np.int64)

    @property
    def width(self) -> int:
        """How many units."""
        return len(self.units)

    def add(self, rows: Array) -> None:
        """Count (n, width) rows."""
        step = max(1, self._together // max(1, self.width))
        # A gate may have any value in a model that has gone astray, and its squares none.
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(rows), step):
                self._add(np.ascontiguousarray(rows[start : start + step]))

    def _add(self, block: Array) -> None:
        units, values, missing = describe(block, shares=self._shares, moments=self._moments)
        if self.bins is not None:
            counts, units["underflow"], units["overflow"] = self.bins.histogram(
                values, units["minimum"].min(), units["maximum"].max()
            )
            # What is not finite stands there as a zero.
            zero = int(np.searchsorted(self.bins.edges, 0.0, "right")) - 1
            counts[:, zero] -= missing
            self.histogram += counts
        join(self.units, units)

    def merge(self, other: Tally) -> None:
        """Take in what another tally of the same shape has counted."""
        with np.errstate(over="ignore", invalid="ignore"):
            join(self.units, other.units)
        self.histogram += other.histogram
