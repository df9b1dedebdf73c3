"""Moments of every gate and state, unit by unit.

Moments are sums of powers of the deviation from a mean. Two blocks are merged by the pairwise
update of Chan, Golub and LeVeque (1979), extended to the fourth power by Pébay (2008), "Formulas
for robust, one-pass parallel computation of covariances and arbitrary-order statistical moments",
Sandia report SAND2008-6212. No difference of large sums is taken, so the variance of a nearly
constant gate is accurate.

N steps, H units; n rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from grutrace.analysis.engine.map_reduce import summarize_each
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteLike, as_site_data, unit_quantities
from grutrace.records import Array
from grutrace.statistics.accumulator import BLOCK_ELEMENTS
from grutrace.statistics.moments import (
    compiled_stats,
    merge_stats,
    reduce_axis0,
    summarize_block,
)
from grutrace.storage.read.sequence_index import Integers


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

    Args:
        site: A site with gates or states.

    Returns:
        The moments by quantity and unit.

    Raises:
        NotRecordedError: Neither gates nor states were recorded.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, moments
        >>> result = moments(SiteArrays(hidden=np.array([[-0.5], [0.5], [-0.5], [0.5]])))
        >>> result.std["hidden"], result.kurtosis["hidden"]
        (array([0.5]), array([-2.]))
    """
    data = as_site_data(site)
    names = unit_quantities(data)
    sums = summarize_each(data, dict.fromkeys(names, power_sums), PowerSums.merge)
    by_name = {name: each.moments() for name, each in sums.items()}
    columns = {
        column: {name: values[column] for name, values in by_name.items()}
        for column in next(iter(by_name.values()))
    }
    return Moments(site=data.name, steps=data.steps, units=data.units, **columns)


@dataclass
class PowerSums:
    """Sums of powers of the deviations from the mean, of every unit of one quantity.

    Attributes:
        units: (H,) of type `statistics.moments.UNIT_DTYPE`; `squares` is the sum of second powers.
        cubes: (H,) the sum of third powers.
        fourths: (H,) the sum of fourth powers.
    """

    units: Array
    cubes: Array
    fourths: Array

    @np.errstate(over="ignore", invalid="ignore")
    def merge(self, later: PowerSums) -> None:
        """Add the values of later rows."""
        counts, more_counts = (each.units["count"].astype(np.float64) for each in (self, later))
        total = np.maximum(counts + more_counts, 1)
        first, second = counts / total, more_counts / total
        delta = later.units["mean"] - self.units["mean"]
        squares, more = self.units["squares"], later.units["squares"]
        # Pébay's equations in terms of the shares n_A / n and n_B / n.
        self.fourths += later.fourths
        self.fourths += 4 * delta * (first * later.cubes - second * self.cubes)
        self.fourths += 6 * delta**2 * (first**2 * more + second**2 * squares)
        self.fourths += delta**4 * total * first * second * (first**2 - first * second + second**2)
        self.cubes += later.cubes + 3 * delta * (first * more - second * squares)
        self.cubes += delta**3 * total * first * second * (first - second)
        merge_stats(self.units, later.units)

    def moments(self) -> dict[str, Array]:
        """Return the moments by the names of the fields of `Moments`, (H,) each."""
        units = self.units
        known = units["count"] > 0
        count = np.maximum(units["count"], 1)
        # The mean of equal values may be rounded, so the variance may not be exactly 0.
        varies = known & (units["minimum"] < units["maximum"])
        variance = np.where(varies, units["squares"] / count, 0.0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            skewness = self.cubes / count / variance**1.5
            kurtosis = self.fourths / count / variance**2 - 3
        return {
            "mean": np.where(known, units["mean"], np.nan),
            "std": np.where(known, np.sqrt(variance), np.nan),
            "skewness": np.where(varies, skewness, np.nan),
            "kurtosis": np.where(varies, kurtosis, np.nan),
            "minimum": np.where(known, units["minimum"], np.nan),
            "maximum": np.where(known, units["maximum"], np.nan),
            "not_finite": units["nan"] + units["infinite"],
        }


# In a diverged model a gate can have any value, and its powers overflow.
@np.errstate(over="ignore", invalid="ignore")
def power_sums(rows: Mapping[str, Array]) -> PowerSums:
    """Compute the sums of one block of one quantity, (n, H)."""
    (block,) = rows.values()
    block = np.ascontiguousarray(block)
    powers = np.zeros((2, block.shape[1]))
    counted = compiled_stats(block, shares=False, moments=True, powers=powers)
    if counted is not None:
        return PowerSums(counted, *powers)
    units, values, missing = summarize_block(block, shares=False, moments=False)
    units["mean"] = values.sum(0, dtype=np.float64) / np.maximum(units["count"], 1)
    finite = np.isfinite(block) if missing.any() else None
    squares, cubes, fourths = np.zeros((3, len(units)))
    step = max(1, BLOCK_ELEMENTS // max(1, len(units)))
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        delta = np.subtract(values[part], units["mean"], dtype=np.float64)
        if finite is not None:
            delta[~finite[part]] = 0.0
        square = np.square(delta)
        squares += reduce_axis0(np.add, square)
        cubes += reduce_axis0(np.add, np.multiply(delta, square, out=delta))
        fourths += reduce_axis0(np.add, np.square(square, out=square))
    units["squares"] = squares
    return PowerSums(units, cubes, fourths)
