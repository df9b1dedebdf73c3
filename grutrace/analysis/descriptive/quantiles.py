"""Quantiles and histograms of every gate and state, unit by unit.

The range of all four quantities is known, so quantiles are read from histograms of equal, narrow
bins. Histograms of two parts of a run are merged exactly, by addition. A quantile differs from that
of the sorted values by at most the width of a bin, for any distribution.

N steps, H units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_each
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteLike, as_site_data, unit_quantities
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.statistics.accumulator import QuantityAccumulator
from grutrace.statistics.histogram import require_bins
from grutrace.storage.read.sequence_index import Integers

#: Default number of bins: quantiles of gates are exact to a thousandth.
DEFAULT_BINS = 1024

#: Number of elements that are counted at a time. Large, because merging so many bins is slow.
BATCH_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Quantiles(Result):
    """Quantiles of a site, by quantity (reset, update, candidate, hidden as recorded), (H,) each.

    All are of finite values. NaN where there are none.

    Attributes:
        steps: N, number of steps of all sequences.
        units: (H,) numbers of the units.
        q05: 5 % quantile.
        q25: 25 % quantile.
        median: 50 % quantile.
        q75: 75 % quantile.
        q95: 95 % quantile.
        minimum: Minimum, exact.
        maximum: Maximum, exact.
        error: By quantity, largest error of a quantile: the width of a bin. It holds for values
            within the edges. All gates lie there; a state that began outside [-1, 1] may not.
        edges: By quantity, (bins + 1,) from 0 to 1 for reset and update, from -1 to 1 for candidate
            and hidden.
        histogram: By quantity, (H, bins) number of steps in each bin. A bin includes its lower
            edge, the last one also its upper edge.
        underflow: Number of steps with a value below the first edge.
        overflow: Number of steps with a value above the last edge.
    """

    array_only_fields: ClassVar[tuple[str, ...]] = ("edges", "histogram")

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
        """Return the value that this share of the steps does not exceed: (H,).

        Within `error` it is the value of rank ``ceil(share * count)`` of the sorted values (the
        inverse of the empirical distribution; NumPy's method "inverted_cdf").

        Args:
            quantity: Name of the quantity.
            share: From 0 to 1.

        Raises:
            OptionError: The share is not in [0, 1], or there is no such quantity.
        """
        if quantity not in self.histogram:
            names = ", ".join(self.histogram)
            raise OptionError(f"quantity: expected one of {names}; found {short_repr(quantity)}")
        if not 0 <= share <= 1:
            raise OptionError(f"share: expected a number from 0 to 1; found {short_repr(share)}")
        return _quantile(
            self.histogram[quantity],
            self.underflow[quantity],
            self.overflow[quantity],
            self.edges[quantity],
            self.minimum[quantity],
            self.maximum[quantity],
            share,
        )


def quantiles(site: SiteLike, bins: int = DEFAULT_BINS) -> Quantiles:
    """Compute quantiles and histograms of each gate and state of each unit.

    Args:
        site: A site with gates or states.
        bins: Number of bins, a power of two from 2 to 1024. The counts take ``8 * bins`` bytes for
            each unit and quantity.

    Returns:
        Quantiles and histograms by quantity and unit.

    Raises:
        NotRecordedError: Neither gates nor states were recorded.
        OptionError: `bins` is not one of the allowed numbers.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, quantiles
        >>> result = quantiles(SiteArrays(update=np.linspace(0, 1, 101)[:, np.newaxis]), bins=1024)
        >>> bool(abs(result.median["update"][0] - 0.5) <= result.error["update"])
        True
    """
    data = as_site_data(site)
    names = unit_quantities(data)
    require_bins(bins)
    width = len(data.units)
    reducers = {name: partial(_QuantileCounts, name, width, bins) for name in names}
    counted = {name: each.counts for name, each in reduce_each(data, reducers).items()}
    histogram = {name: each.histogram for name, each in counted.items()}
    edges = {name: each.bins.edges for name, each in counted.items() if each.bins}
    underflow, overflow, minimum, maximum = (
        {name: each.units[field].copy() for name, each in counted.items()}
        for field in ("underflow", "overflow", "minimum", "maximum")
    )

    def at(share: float) -> dict[str, Array]:
        return {
            name: _quantile(
                histogram[name],
                underflow[name],
                overflow[name],
                edges[name],
                minimum[name],
                maximum[name],
                share,
            )
            for name in names
        }

    return Quantiles(
        site=data.name,
        steps=data.steps,
        units=data.units,
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


class _QuantileCounts:
    """Counts the values of one quantity, block by block.

    Args:
        quantity: Name of the quantity.
        width: Number of units.
        bins: Number of bins.
    """

    def __init__(self, quantity: str, width: int, bins: int) -> None:
        self._quantity = quantity
        self.counts = QuantityAccumulator(
            quantity, width, bins, shares=False, moments=False, block_elements=BATCH_BYTES
        )

    def add(self, block: Mapping[str, Array]) -> None:
        """Count a block."""
        self.counts.add(block[self._quantity])

    def merge(self, later: _QuantileCounts) -> None:
        """Add the counts of later rows."""
        self.counts.merge(later.counts)


def _quantile(
    histogram: Array,
    underflow: Array,
    overflow: Array,
    edges: Array,
    minimum: Array,
    maximum: Array,
    share: float,
) -> Array:
    """Interpolate the value of this rank within its bin, assumed to be uniform: (H,).

    Args:
        histogram: (H, bins) counts; the other arrays, but the edges, are (H,).
        underflow: Counts below the first edge.
        overflow: Counts above the last edge.
        edges: (bins + 1,).
        minimum: Minimum of each unit.
        maximum: Maximum of each unit.
        share: From 0 to 1.
    """
    parts = [underflow[:, np.newaxis], histogram, overflow[:, np.newaxis]]
    cumulative = np.cumsum(np.concatenate(parts, axis=1), axis=1)
    total = cumulative[:, -1]
    rank = np.maximum(1, np.ceil(share * total)).astype(np.int64)
    bin_index = np.argmax(cumulative >= rank[:, np.newaxis], axis=1)
    units = np.arange(len(cumulative))
    before = np.where(bin_index > 0, cumulative[units, bin_index - 1], 0)
    in_bin = cumulative[units, bin_index] - before
    # The outer bins end at the extremes; the inner ones at their edges or at the extremes.
    low = np.maximum(np.concatenate([[-np.inf], edges])[bin_index], minimum)
    high = np.minimum(np.concatenate([edges, [np.inf]])[bin_index], maximum)
    with np.errstate(invalid="ignore"):
        inside = low + (rank - before - 0.5) / np.maximum(in_bin, 1) * (high - low)
    values = np.where(rank == total, maximum, np.where(rank == 1, minimum, inside))
    return np.where(total > 0, values, np.nan)
