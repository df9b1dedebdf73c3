"""What is logged: figures and histograms of every site and quantity, over all units and steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from grutrace.records import Array
from grutrace.reprs import fields_repr
from grutrace.statistics.results import UnitStatistics
from grutrace.statistics.running import Statistics


@dataclass(frozen=True, eq=False)
class Histogram:
    """Finite values of all units of a quantity, counted in bins.

    Attributes:
        edges: (bins + 1,) edges of the bins. States below -1 or above 1 have a bin of their own.
        counts: (bins,) number of values.
        minimum: Smallest value.
        maximum: Largest value.
        total: Sum of the values.
        squares: Sum of their squares.
    """

    edges: Array
    counts: Array
    minimum: float
    maximum: float
    total: float
    squares: float

    __repr__ = fields_repr


@dataclass(frozen=True, eq=False)
class Figures:
    """Figures of the batches since the last ones with this tag.

    The names begin with ``gates/``, the tag, the site and the quantity, as in
    ``gates/train/encoder.rnn.l0/update/mean``. The histogram of a quantity has the name without the
    last part.

    Attributes:
        tag: The kind of batches, such as ``train`` or ``valid``.
        step: The step of the last of these batches.
        scalars: By name: mean and std of the finite values; below and above, the shares of values
            with a magnitude below 0.1 and above 0.9; nan and infinite, the numbers of such values;
            and, of each site, the largest residual. Figures that do not exist are left out.
        histograms: By name. A quantity without finite values, and the input, have none.
    """

    tag: str
    step: int
    scalars: Mapping[str, float]
    histograms: Mapping[str, Histogram]

    __repr__ = fields_repr


def figures_of(statistics: Statistics, tag: str, step: int, prefix: str) -> Figures:
    """Return the figures of an interval, with names that begin with a prefix."""
    scalars: dict[str, float] = {}
    histograms: dict[str, Histogram] = {}
    for site in statistics:
        result = statistics[site]
        scalars[f"{prefix}/{site}/residual"] = result.residual
        for quantity, units in result.quantities.items():
            name = f"{prefix}/{site}/{quantity}"
            scalars |= {f"{name}/{figure}": value for figure, value in _scalars(units)}
            if units.histogram is not None and units.count.any():
                histograms[name] = _histogram(units)
    finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
    return Figures(tag, step, finite, histograms)


def _scalars(units: UnitStatistics) -> Iterator[tuple[str, float]]:
    """Yield the name and the value of each figure of all units together."""
    if units.count.any():
        yield "mean", _mean(units, units.mean)
        yield "std", _std(units)
        if units.below is not None and units.above is not None:
            yield "below", _mean(units, units.below)
            yield "above", _mean(units, units.above)
    yield "nan", float(units.nan.sum())
    yield "infinite", float(units.infinite.sum())


def _mean(units: UnitStatistics, values: Array) -> float:
    """Return the mean of a figure over all values: a unit counts as often as it has values."""
    has_values = units.count > 0
    return float(np.average(values[has_values], weights=units.count[has_values]))


def _std(units: UnitStatistics) -> float:
    """Return the standard deviation of the values of all units together."""
    deviations = units.variance + np.square(units.mean - _mean(units, units.mean))
    return math.sqrt(_mean(units, deviations))


def _histogram(units: UnitStatistics) -> Histogram:
    """Add up the histograms of all units, which have at least one value."""
    counts, edges = np.asarray(units.histogram).sum(axis=0), np.asarray(units.edges)
    minimum, maximum = float(np.nanmin(units.minimum)), float(np.nanmax(units.maximum))
    under, over = (int(np.asarray(part).sum()) for part in (units.underflow, units.overflow))
    if under:
        counts, edges = np.append(under, counts), np.append(minimum, edges)
    if over:
        counts, edges = np.append(counts, over), np.append(edges, maximum)
    number = int(counts.sum())
    mean, std = _mean(units, units.mean), _std(units)
    return Histogram(
        np.asarray(edges),
        counts,
        minimum,
        maximum,
        number * mean,
        number * (std * std + mean * mean),
    )
