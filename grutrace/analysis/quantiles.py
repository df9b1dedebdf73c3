"""Histograms and quantiles of every gate and state, unit by unit.

All four have a range that is known beforehand, so a histogram of equal, narrow bins serves: those
of two stretches of a run are joined by adding their counts, exactly, and a quantile that is read
from it is never further than the width of one bin from the value that sorting all steps would give.
That bound holds whatever the distribution, which sketches of data without a range cannot say.

N steps, H units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from grutrace.analysis.fold import fold_rows
from grutrace.analysis.material import Analysed, Material, material
from grutrace.analysis.moments import of_units
from grutrace.analysis.result import Result
from grutrace.errors import OptionError, brief
from grutrace.record import Array
from grutrace.statistics.bins import require_bins
from grutrace.statistics.tally import Tally
from grutrace.storage.index import Integers

#: Bins of a histogram unless asked otherwise: quantiles of the gates are right to a thousandth.
FINE = 1024

#: What is counted at a time. As much as is read: so many bins take long to add up. Elements.
TOGETHER = 8 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Quantiles(Result):
    """Of a site: by quantity (reset, update, candidate, hidden as recorded), (H,) each.

    All are of finite values only. Not a number where there are none.

    Attributes:
        steps: N, of all sequences together.
        units: (H,) numbers of the units.
        q05: The value that 5 % of the steps do not exceed.
        q25: Likewise 25 %.
        median: Likewise half of them.
        q75: Likewise 75 %.
        q95: Likewise 95 %.
        minimum: Least value, exactly.
        maximum: Largest value, exactly.
        error: By quantity, how far a quantile can be off: the width of a bin. It holds for values
            within the edges, where all gates lie; a state that began outside of -1 to 1 may be
            there.
        edges: By quantity, (bins + 1,) from 0 to 1 for reset and update, from -1 to 1 for candidate
            and hidden.
        histogram: By quantity, (H, bins) steps with a value in each bin, which holds its lower
            edge, and the last its upper edge as well.
        underflow: Steps with a value below the first edge.
        overflow: Steps with a value above the last edge.
    """

    only_arrays: ClassVar[tuple[str, ...]] = ("edges", "histogram")

    steps: int
    units: Integers
    q05: Mapping[str, Array]
    q25: Mapping[str, Array]
    median: Mapping[str, Array]
    q75: Mapping[str, Array]
    q95: Mapping[str, Array]
    minimum: Mapping[str, Array]
    maximum: Mapping[str, Array]
    error: Mapping[str, float]
    edges: Mapping[str, Array]
    histogram: Mapping[str, Array]
    underflow: Mapping[str, Array]
    overflow: Mapping[str, Array]

    def quantile(self, quantity: str, share: float) -> Array:
        """(H,) the value that this share of the steps do not exceed.

        It is, to within `error`, the value of rank ``ceil(share * count)`` among all steps in order
        (the inverse of the empirical distribution; NumPy's method "inverted_cdf").

        Args:
            quantity: Its name.
            share: From 0 to 1.

        Raises:
            OptionError: The share is no share, or there is no such quantity.
        """
        if quantity not in self.histogram:
            found = ", ".join(self.histogram)
            raise OptionError(f"quantity: expected one of {found}; found {brief(quantity)}")
        if not 0 <= share <= 1:
            raise OptionError(f"share: expected a number from 0 to 1; found {brief(share)}")
        ranked = _Ranked(
            self.histogram[quantity],
            self.underflow[quantity],
            self.overflow[quantity],
            self.edges[quantity],
            self.minimum[quantity],
            self.maximum[quantity],
        )
        return ranked.quantile(share)


def quantiles(site: Analysed, bins: int = FINE) -> Quantiles:
    """Count the values of each gate and state of each unit into bins; read quantiles from them.

    Costs 2.5 times reading the rows from a file, on two cores.

    Args:
        site: What of.
        bins: A power of two from 2 to 1024. Memory for the counts is ``8 * bins`` bytes a unit and
            quantity.

    Raises:
        NotRecordedError: Neither gates nor states were recorded.
        OptionError: There cannot be so many bins.
    """
    of = material(site)
    quantities = of_units(of)
    require_bins(bins)
    counted = {name: _of(of, name, bins) for name in quantities}
    edges = {name: each.bins.edges for name, each in counted.items() if each.bins}

    def known(figure: str) -> dict[str, Array]:
        return {name: each.units[figure].copy() for name, each in counted.items()}

    histogram = {name: each.histogram for name, each in counted.items()}
    underflow, overflow = known("underflow"), known("overflow")
    minimum, maximum = known("minimum"), known("maximum")
    figures = histogram, underflow, overflow, edges, minimum, maximum
    ranked = {name: _Ranked(*(of_each[name] for of_each in figures)) for name in quantities}

    def at(share: float) -> dict[str, Array]:
        return {name: each.quantile(share) for name, each in ranked.items()}

    return Quantiles(
        site=of.name,
        steps=of.steps,
        units=of.units,
        q05=at(0.05),
        q25=at(0.25),
        median=at(0.5),
        q75=at(0.75),
        q95=at(0.95),
        minimum=at(0.0),
        maximum=at(1.0),
        error={name: float(each[1] - each[0]) for name, each in edges.items()},
        edges=edges,
        histogram=histogram,
        underflow=underflow,
        overflow=overflow,
    )


def _of(site: Material, quantity: str, bins: int) -> Tally:
    return fold_rows(site, (quantity,), partial(_Counted, quantity, len(site.units), bins)).tally


class _Ranked:
    """The values of one quantity in order, as far as a histogram tells: (H, bins), (H,) each."""

    def __init__(
        self,
        histogram: Array,
        underflow: Array,
        overflow: Array,
        edges: Array,
        least: Array,
        largest: Array,
    ) -> None:
        parts = [underflow[:, np.newaxis], histogram, overflow[:, np.newaxis]]
        self._upto = np.cumsum(np.concatenate(parts, axis=1), axis=1)
        # The two outer places end at what was seen; the others at their edges, or what was seen.
        self._low = np.concatenate([[-np.inf], edges])
        self._high = np.concatenate([edges, [np.inf]])
        self._least, self._largest = least, largest

    def quantile(self, share: float) -> Array:
        """(H,) where in its bin the value of this rank lies, if those in the bin lie evenly."""
        upto, least, largest = self._upto, self._least, self._largest
        total = upto[:, -1]
        rank = np.maximum(1, np.ceil(share * total)).astype(np.int64)
        place = np.argmax(upto >= rank[:, np.newaxis], axis=1)
        units = np.arange(len(upto))
        before = np.where(place > 0, upto[units, place - 1], 0)
        within = upto[units, place] - before
        low = np.maximum(self._low[place], least)
        high = np.minimum(self._high[place], largest)
        with np.errstate(invalid="ignore"):
            found = low + (rank - before - 0.5) / np.maximum(within, 1) * (high - low)
        found = np.where(rank == total, largest, np.where(rank == 1, least, found))
        return np.where(total > 0, found, np.nan)


class _Counted:
    """The histogram of one quantity, and its extremes."""

    def __init__(self, quantity: str, width: int, bins: int) -> None:
        self.tally = Tally(quantity, width, bins, shares=False, moments=False, together=TOGETHER)

    def add(self, rows: Mapping[str, Array]) -> None:
        (block,) = rows.values()
        self.tally.add(block)

    def merge(self, later: _Counted) -> None:
        self.tally.merge(later.tally)
