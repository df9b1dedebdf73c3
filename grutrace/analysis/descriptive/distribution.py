"""Moments, histograms and quantiles of every gate and state, unit by unit.

Moments are sums of powers of the deviation from a mean. Two blocks are merged by the pairwise
update of Chan, Golub and LeVeque (1979), extended to the fourth power by Pébay (2008), "Formulas
for robust, one-pass parallel computation of covariances and arbitrary-order statistical moments",
Sandia report SAND2008-6212. No difference of large sums is taken, so the variance of a nearly
constant gate is accurate.

The range of all four quantities is known, so quantiles are read from histograms of equal, narrow
bins. Histograms of two parts of a run are merged exactly, by addition. A quantile differs from that
of the sorted values by at most the width of a bin, for any distribution.

N steps, H units; n rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data
from grutrace.errors import NotRecordedError, OptionError, short_repr
from grutrace.records import DEFAULT_RECORD, Array
from grutrace.statistics.accumulator import BLOCK_ELEMENTS, QuantityAccumulator
from grutrace.statistics.histogram import require_bins
from grutrace.statistics.moments import LINE_ELEMENTS, empty_stats, merge_stats, summarize_block
from grutrace.storage.read.sequence_index import Integers

#: The center is the mean of this fraction of a block.
PARTS = 16


@dataclass(frozen=True, eq=False)
class Moments(Result):
    """Moments of a site, by quantity (reset, update, candidate, hidden as recorded), (H,) each.

    All are of finite values; `not_finite` counts the others. NaN where there are no values, or
    where a power of a value overflows float64.

    Attributes:
        steps: N, number of steps of all sequences.
        units: (H,) numbers of the units.
        mean: Arithmetic mean.
        std: Standard deviation, with N in the denominator.
        skewness: Mean cubed deviation over std^3: positive where the longer tail is above the mean.
            NaN for a constant unit.
        kurtosis: Excess kurtosis, mean fourth power of the deviation over std^4, less 3: 0 for a
            normal distribution, -1.2 for a uniform one, and -2, the minimum, for two equally
            frequent values. NaN for a constant unit.
        minimum: Minimum.
        maximum: Maximum.
        not_finite: Number of values that are NaN or infinite.
    """

    steps: int
    units: Integers
    mean: Mapping[str, Array]
    std: Mapping[str, Array]
    skewness: Mapping[str, Array]
    kurtosis: Mapping[str, Array]
    minimum: Mapping[str, Array]
    maximum: Mapping[str, Array]
    not_finite: Mapping[str, Array]


def moments(site: SiteLike) -> Moments:
    """Compute the moments of each gate and state of each unit, over all steps.

    Takes 3 times as long as reading the rows from a file, on two cores.

    Args:
        site: A site with gates or states.

    Returns:
        The moments by quantity and unit.

    Raises:
        NotRecordedError: Neither gates nor states were recorded.

    Example:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, moments
        >>> result = moments(SiteArrays(hidden=np.array([[-0.5], [0.5], [-0.5], [0.5]])))
        >>> result.std["hidden"], result.kurtosis["hidden"]
        (array([0.5]), array([-2.]))
    """
    data = as_site_data(site)
    quantities = unit_quantities(data)
    by_name = {
        name: reduce_rows(data, (name,), partial(PowerSums, len(data.units))).moments()
        for name in quantities
    }

    def by_quantity(moment: str) -> dict[str, Array]:
        return {name: values[moment] for name, values in by_name.items()}

    return Moments(
        site=data.name,
        steps=data.steps,
        units=data.units,
        mean=by_quantity("mean"),
        std=by_quantity("std"),
        skewness=by_quantity("skewness"),
        kurtosis=by_quantity("kurtosis"),
        minimum=by_quantity("minimum"),
        maximum=by_quantity("maximum"),
        not_finite=by_quantity("not_finite"),
    )


def unit_quantities(site: SiteData) -> tuple[str, ...]:
    """Return the quantities of a site that have one column a unit.

    Raises:
        NotRecordedError: There are none.
    """
    found = tuple(name for name in DEFAULT_RECORD if name in site.quantities)
    if not found:
        raise NotRecordedError(
            f"{site.name!r} has neither gates nor states; it has {', '.join(site.quantities)}"
        )
    return found


class PowerSums:
    """Sums of powers of the deviations from the mean, of every unit of one quantity.

    Args:
        width: H.

    Attributes:
        units: (H,) of type `statistics.moments.UNIT_DTYPE`; `squares` is the sum of second powers.
        cubes: (H,) the sum of third powers.
        fourths: (H,) the sum of fourth powers.
    """

    def __init__(self, width: int) -> None:
        self.units = empty_stats(width)
        self.cubes, self.fourths = np.zeros(width), np.zeros(width)

    def add(self, rows: Mapping[str, Array]) -> None:
        """Add the (n, H) values of one quantity, of any floating-point type."""
        (block,) = rows.values()
        # In a diverged model a gate can have any value, and its powers overflow.
        with np.errstate(over="ignore", invalid="ignore"):
            self._merge(_powers(np.ascontiguousarray(block)))

    def merge(self, later: PowerSums) -> None:
        """Add the values of another instance."""
        with np.errstate(over="ignore", invalid="ignore"):
            self._merge(later)

    def _merge(self, other: PowerSums) -> None:
        ours, theirs = (each.units["count"].astype(np.float64) for each in (self, other))
        total = np.maximum(ours + theirs, 1)
        first, second = ours / total, theirs / total
        delta = other.units["mean"] - self.units["mean"]
        squares, more = self.units["squares"], other.units["squares"]
        # Pébay's equations in terms of the shares n_A / n and n_B / n.
        self.fourths += other.fourths
        self.fourths += 4 * delta * (first * other.cubes - second * self.cubes)
        self.fourths += 6 * delta**2 * (first**2 * more + second**2 * squares)
        self.fourths += delta**4 * total * first * second * (first**2 - first * second + second**2)
        self.cubes += other.cubes + 3 * delta * (first * more - second * squares)
        self.cubes += delta**3 * total * first * second * (first - second)
        merge_stats(self.units, other.units)

    def moments(self) -> dict[str, Array]:
        """Return the moments by the names of the fields of `Moments`, (H,) each."""
        units = self.units
        some = units["count"] > 0
        count = np.maximum(units["count"], 1)
        # The mean of equal values may be rounded, so the variance may not be exactly 0.
        moves = some & (units["minimum"] < units["maximum"])
        variance = np.where(moves, units["squares"] / count, 0.0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            skewness = self.cubes / count / variance**1.5
            kurtosis = self.fourths / count / variance**2 - 3
        return {
            "mean": np.where(some, units["mean"], np.nan),
            "std": np.where(some, np.sqrt(variance), np.nan),
            "skewness": np.where(moves, skewness, np.nan),
            "kurtosis": np.where(moves, kurtosis, np.nan),
            "minimum": np.where(some, units["minimum"], np.nan),
            "maximum": np.where(some, units["maximum"], np.nan),
            "not_finite": units["nan"] + units["infinite"],
        }


def _powers(block: Array) -> PowerSums:
    """Compute the sums of one block.

    Deviations are taken from the mean of a part of the block, in one pass, and then shifted to the
    mean of the whole block. The part is at least a sixteenth of the block, so the shift is at most
    four standard deviations. That loses two or three digits of sixteen.
    """
    rows, width = block.shape
    units, values, missing = summarize_block(block, shares=False, moments=False)
    finite = np.isfinite(block) if missing.any() else None
    count = np.maximum(units["count"], 1)
    center = _center(values, finite, max(1, rows // PARTS))
    # NumPy is slow on short rows, so several rows are viewed as one; the remainder is separate.
    tiles = max(1, LINE_ELEMENTS // max(1, width))
    full = rows - rows % tiles
    sums = np.zeros((4, width))
    for part, columns in ((slice(0, full), tiles * width), (slice(full, rows), width)):
        there = None if finite is None else finite[part].reshape(-1, columns)
        found = _sums(values[part].reshape(-1, columns), there, np.tile(center, columns // width))
        sums += found.reshape(4, -1, width).sum(1)
    moved = sums[0] / count
    units["mean"] = center + moved
    units["squares"] = sums[1] - count * moved**2
    powers = PowerSums(0)
    powers.units = units
    powers.cubes = sums[2] - 3 * moved * sums[1] + 2 * count * moved**3
    powers.fourths = sums[3] - 4 * moved * sums[2] + 6 * moved**2 * sums[1] - 3 * count * moved**4
    return powers


def _center(values: Array, finite: Array | None, rows: int) -> Array:
    """Mean of the finite values of the first rows: (H,)."""
    there = rows if finite is None else np.maximum(finite[:rows].sum(0), 1)
    return np.asarray(values[:rows].sum(0, dtype=np.float64) / there)


def _sums(values: Array, finite: Array | None, center: Array) -> Array:
    """Sum the first to fourth power of the finite values less the center: (4, columns)."""
    sums = np.zeros((4, len(center)))
    step = max(1, BLOCK_ELEMENTS // max(1, len(center)))
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        delta = np.subtract(values[part], center, dtype=np.float64)
        if finite is not None:
            delta[~finite[part]] = 0.0
        squares = delta * delta
        sums[0] += np.add.reduce(delta, axis=0)
        sums[1] += np.einsum("nh,nh->h", delta, delta)
        sums[2] += np.einsum("nh,nh->h", squares, delta)
        sums[3] += np.einsum("nh,nh->h", squares, squares)
    return sums


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
            found = ", ".join(self.histogram)
            raise OptionError(f"quantity: expected one of {found}; found {short_repr(quantity)}")
        if not 0 <= share <= 1:
            raise OptionError(f"share: expected a number from 0 to 1; found {short_repr(share)}")
        ranked = _RankedValues(
            self.histogram[quantity],
            self.underflow[quantity],
            self.overflow[quantity],
            self.edges[quantity],
            self.minimum[quantity],
            self.maximum[quantity],
        )
        return ranked.quantile(share)


def quantiles(site: SiteLike, bins: int = DEFAULT_BINS) -> Quantiles:
    """Compute quantiles and histograms of each gate and state of each unit.

    Takes 2.5 times as long as reading the rows from a file, on two cores.

    Args:
        site: A site with gates or states.
        bins: Number of bins, a power of two from 2 to 1024. The counts take ``8 * bins`` bytes for
            each unit and quantity.

    Returns:
        Quantiles and histograms by quantity and unit.

    Raises:
        NotRecordedError: Neither gates nor states were recorded.
        OptionError: `bins` is not one of the allowed numbers.

    Example:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, quantiles
        >>> result = quantiles(SiteArrays(update=np.linspace(0, 1, 101)[:, np.newaxis]), bins=1024)
        >>> bool(abs(result.median["update"][0] - 0.5) <= result.error["update"])
        True
    """
    data = as_site_data(site)
    quantities = unit_quantities(data)
    require_bins(bins)
    counted = {name: _of(data, name, bins) for name in quantities}
    edges = {name: each.bins.edges for name, each in counted.items() if each.bins}

    def copied(field: str) -> dict[str, Array]:
        return {name: each.units[field].copy() for name, each in counted.items()}

    histogram = {name: each.histogram for name, each in counted.items()}
    underflow, overflow = copied("underflow"), copied("overflow")
    minimum, maximum = copied("minimum"), copied("maximum")
    counts = histogram, underflow, overflow, edges, minimum, maximum
    ranked = {name: _RankedValues(*(by_name[name] for by_name in counts)) for name in quantities}

    def at(share: float) -> dict[str, Array]:
        return {name: each.quantile(share) for name, each in ranked.items()}

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


def _of(site: SiteData, quantity: str, bins: int) -> QuantityAccumulator:
    return reduce_rows(
        site, (quantity,), partial(_QuantityHistogram, quantity, len(site.units), bins)
    ).accumulator


class _RankedValues:
    """The values of one quantity in order, as far as a histogram shows it: (H, bins), (H,) each."""

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
        # The outer bins end at the extremes; the inner ones at their edges or at the extremes.
        self._low = np.concatenate([[-np.inf], edges])
        self._high = np.concatenate([edges, [np.inf]])
        self._least, self._largest = least, largest

    def quantile(self, share: float) -> Array:
        """Interpolate the value of this rank within its bin, assumed to be uniform: (H,)."""
        upto, least, largest = self._upto, self._least, self._largest
        total = upto[:, -1]
        rank = np.maximum(1, np.ceil(share * total)).astype(np.int64)
        bin_index = np.argmax(upto >= rank[:, np.newaxis], axis=1)
        units = np.arange(len(upto))
        before = np.where(bin_index > 0, upto[units, bin_index - 1], 0)
        in_bin = upto[units, bin_index] - before
        low = np.maximum(self._low[bin_index], least)
        high = np.minimum(self._high[bin_index], largest)
        with np.errstate(invalid="ignore"):
            found = low + (rank - before - 0.5) / np.maximum(in_bin, 1) * (high - low)
        found = np.where(rank == total, largest, np.where(rank == 1, least, found))
        return np.where(total > 0, found, np.nan)


class _QuantityHistogram:
    """Histogram and extremes of one quantity."""

    def __init__(self, quantity: str, width: int, bins: int) -> None:
        self.accumulator = QuantityAccumulator(
            quantity, width, bins, shares=False, moments=False, block_elements=BATCH_BYTES
        )

    def add(self, rows: Mapping[str, Array]) -> None:
        (block,) = rows.values()
        self.accumulator.add(block)

    def merge(self, later: _QuantityHistogram) -> None:
        self.accumulator.merge(later.accumulator)
