"""Mean, spread, skewness, tails and extremes of every gate and state, unit by unit.

Powers are those of the deviation from a mean, and two blocks are joined by the pairwise update of
Chan, Golub and LeVeque (1979), carried on to the fourth power by Pébay (2008), "Formulas for
robust, one-pass parallel computation of covariances and arbitrary-order statistical moments",
Sandia report SAND2008-6212. No difference of large sums is taken, so a gate that hardly moves keeps
its spread.

N steps, H units; n rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.fold import fold_rows
from grutrace.analysis.material import Analysed, Material, material
from grutrace.analysis.result import Result
from grutrace.errors import NotRecordedError
from grutrace.record import DEFAULT_RECORD, Array
from grutrace.statistics.reductions import WIDE
from grutrace.statistics.tally import BLOCK
from grutrace.statistics.units import describe, join, no_values
from grutrace.storage.index import Integers

#: A block is gone through in at most so many parts.
PARTS = 16


@dataclass(frozen=True, eq=False)
class Moments(Result):
    """Of a site: by quantity (reset, update, candidate, hidden as recorded), (H,) each.

    All are of finite values only; `not_finite` counts the others. Not a number where there are no
    values, or where a power of a value is too large for float64.

    Attributes:
        steps: N, of all sequences together.
        units: (H,) numbers of the units.
        mean: Arithmetic mean.
        std: Standard deviation, of the values that there are (divided by their number).
        skewness: Mean cube of the deviation over std^3: above 0 where the longer tail is above
            the mean. Not a number for a unit that never moves.
        kurtosis: Mean fourth power of the deviation over std^4, less 3: 0 for a normal
            distribution, -1.2 for a uniform one, and -2, the least there is, for two values taken
            equally often. Not a number for a unit that never moves.
        minimum: Least value.
        maximum: Largest value.
        not_finite: How many values are not a number, or infinite.
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


def moments(site: Analysed) -> Moments:
    """Work out the moments of each gate and state of each unit, over all steps.

    Costs 3 times reading the rows from a file, on two cores.

    Raises:
        NotRecordedError: Neither gates nor states were recorded.
    """
    of = material(site)
    quantities = of_units(of)
    of_each = {
        name: fold_rows(of, (name,), partial(Powers, len(of.units))).figures()
        for name in quantities
    }

    def by_quantity(figure: str) -> dict[str, Array]:
        return {name: figures[figure] for name, figures in of_each.items()}

    return Moments(
        site=of.name,
        steps=of.steps,
        units=of.units,
        mean=by_quantity("mean"),
        std=by_quantity("std"),
        skewness=by_quantity("skewness"),
        kurtosis=by_quantity("kurtosis"),
        minimum=by_quantity("minimum"),
        maximum=by_quantity("maximum"),
        not_finite=by_quantity("not_finite"),
    )


def of_units(site: Material) -> tuple[str, ...]:
    """The quantities of a site that have a column a unit.

    Raises:
        NotRecordedError: There are none.
    """
    found = tuple(name for name in DEFAULT_RECORD if name in site.quantities)
    if not found:
        raise NotRecordedError(
            f"{site.name!r} has neither gates nor states; it has {', '.join(site.quantities)}"
        )
    return found


class Powers:
    """Sums of powers of the deviations from the mean, of every unit of one quantity.

    Args:
        width: How many units.

    Attributes:
        units: (H,) as `statistics.units` keeps them, `squares` being the sum of second powers.
        cubes: (H,) the sum of third powers.
        fourths: (H,) the sum of fourth powers.
    """

    def __init__(self, width: int) -> None:
        self.units = no_values(width)
        self.cubes, self.fourths = np.zeros(width), np.zeros(width)

    def add(self, rows: Mapping[str, Array]) -> None:
        """Take in the (n, H) values of its quantity, of any floating-point type."""
        (block,) = rows.values()
        # A gate may have any value in a model that has gone astray, and its powers none.
        with np.errstate(over="ignore", invalid="ignore"):
            self._merge(_powers(np.ascontiguousarray(block)))

    def merge(self, later: Powers) -> None:
        """Take in the values of another one."""
        with np.errstate(over="ignore", invalid="ignore"):
            self._merge(later)

    def _merge(self, other: Powers) -> None:
        ours, theirs = (each.units["count"].astype(np.float64) for each in (self, other))
        total = np.maximum(ours + theirs, 1)
        first, second = ours / total, theirs / total
        apart = other.units["mean"] - self.units["mean"]
        squares, more = self.units["squares"], other.units["squares"]
        # Pébay's equations with the counts as shares: n_A / n and n_B / n.
        self.fourths += other.fourths
        self.fourths += 4 * apart * (first * other.cubes - second * self.cubes)
        self.fourths += 6 * apart**2 * (first**2 * more + second**2 * squares)
        self.fourths += apart**4 * total * first * second * (first**2 - first * second + second**2)
        self.cubes += other.cubes + 3 * apart * (first * more - second * squares)
        self.cubes += apart**3 * total * first * second * (first - second)
        join(self.units, other.units)

    def figures(self) -> dict[str, Array]:
        """By the names of the fields of `Moments`, (H,) each."""
        units = self.units
        some = units["count"] > 0
        count = np.maximum(units["count"], 1)
        # From the extremes, not from the spread: the mean of equal values may be rounded.
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


def _powers(block: Array) -> Powers:
    """Those of one block.

    The deviations are taken from the mean of a part of the block, in one pass, and moved to that of
    all of it afterwards. The part being at least a sixteenth of the block, they are moved by four
    standard deviations at most, so this loses no more than two or three digits of sixteen.
    """
    rows, width = block.shape
    units, values, missing = describe(block, shares=False, moments=False)
    finite = np.isfinite(block) if missing.any() else None
    count = np.maximum(units["count"], 1)
    center = _center(values, finite, max(1, rows // PARTS))
    # Rows side by side, since NumPy is slow on short ones; what is left over by itself.
    beside = max(1, WIDE // max(1, width))
    whole = rows - rows % beside
    sums = np.zeros((4, width))
    for part, columns in ((slice(0, whole), beside * width), (slice(whole, rows), width)):
        there = None if finite is None else finite[part].reshape(-1, columns)
        found = _sums(values[part].reshape(-1, columns), there, np.tile(center, columns // width))
        sums += found.reshape(4, -1, width).sum(1)
    moved = sums[0] / count
    units["mean"] = center + moved
    units["squares"] = sums[1] - count * moved**2
    powers = Powers(0)
    powers.units = units
    powers.cubes = sums[2] - 3 * moved * sums[1] + 2 * count * moved**3
    powers.fourths = sums[3] - 4 * moved * sums[2] + 6 * moved**2 * sums[1] - 3 * count * moved**4
    return powers


def _center(values: Array, finite: Array | None, rows: int) -> Array:
    """(H,) the mean of what is finite of the first rows."""
    there = rows if finite is None else np.maximum(finite[:rows].sum(0), 1)
    return np.asarray(values[:rows].sum(0, dtype=np.float64) / there)


def _sums(values: Array, finite: Array | None, center: Array) -> Array:
    """(4, columns) the sums of the first to fourth power of what is finite, less the center."""
    sums = np.zeros((4, len(center)))
    step = max(1, BLOCK // max(1, len(center)))
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        apart = np.subtract(values[part], center, dtype=np.float64)
        if finite is not None:
            apart[~finite[part]] = 0.0
        squares = apart * apart
        sums[0] += np.add.reduce(apart, axis=0)
        sums[1] += np.einsum("nh,nh->h", apart, apart)
        sums[2] += np.einsum("nh,nh->h", squares, apart)
        sums[3] += np.einsum("nh,nh->h", squares, squares)
    return sums
