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

    Attributes:
        units: (width,) of type `units.UNITS`.
        histogram: (width, bins); (width, 0) for the input.
    """

    def __init__(self, quantity: str, width: int, bins: int) -> None:
        self._bins = bins_of(quantity, bins)
        self.units = no_values(width)
        self.histogram = np.zeros((width, bins if self._bins else 0), np.int64)

    @property
    def width(self) -> int:
        """How many units."""
        return len(self.units)

    def add(self, rows: Array) -> None:
        """Count (n, width) rows."""
        step = max(1, BLOCK // max(1, self.width))
        # A gate may have any value in a model that has gone astray, and its squares none.
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(rows), step):
                self._add(np.ascontiguousarray(rows[start : start + step]))

    def _add(self, block: Array) -> None:
        units, values, missing = describe(block)
        if self._bins is not None:
            counts, units["underflow"], units["overflow"] = self._bins.histogram(
                values, units["minimum"].min(), units["maximum"].max()
            )
            # What is not finite stands there as a zero.
            zero = int(np.searchsorted(self._bins.edges, 0.0, "right")) - 1
            counts[:, zero] -= missing
            self.histogram += counts
        join(self.units, units)

    def merge(self, other: Tally) -> None:
        """Take in what another tally of the same shape has counted."""
        with np.errstate(over="ignore", invalid="ignore"):
            join(self.units, other.units)
        self.histogram += other.histogram
