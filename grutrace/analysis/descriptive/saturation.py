"""Saturation of gates: the share of steps in which they are near 0 or near 1.

Karpathy, Johnson and Li (2015), "Visualizing and understanding recurrent networks", section 4.2:
a gate is *left-saturated* at a step where it is below 0.1, and *right-saturated* where it is above
0.9. Their figure plots, for each unit, one share against the other.

The module also has the summaries of `grutrace stats` without an analysis: the mean of each gate and
its shares below 0.1 and above 0.9.

N steps, H units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.engine.map_reduce import summarize_each
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.errors import NotRecordedError
from grutrace.records import GATES, Array
from grutrace.reprs import fields_repr
from grutrace.statistics.moments import merge_stats, unit_stats
from grutrace.statistics.results import UnitStatistics
from grutrace.statistics.running import Statistics
from grutrace.storage.read.sequence_index import Integers
from grutrace.storage.read.site import SiteTrace

#: A gate that is saturated on one side in at least this share of the steps is stuck.
STUCK = 0.99

#: A unit whose state stays within a range of this size is constant. Hidden states are in (-1, 1).
CONSTANT_RANGE = 1e-3


@dataclass(frozen=True, eq=False)
class Saturation(Result):
    """Saturation of the gates of a site. Shares are NaN where there are no steps.

    Attributes:
        steps: N, number of steps of all sequences.
        units: (H,) numbers of the units.
        left: By recorded gate, (H,) share of the steps with the gate below 0.1; for the candidate,
            with ``|n|`` below 0.1.
        right: By recorded gate, (H,) share of the steps above 0.9, likewise.
        stuck: By recorded gate, (H,) -1 where it is left-saturated in at least `STUCK` of the
            steps, 1 where it is right-saturated in as many, otherwise 0.
        constant: (H,) whether the unit's state stays within a range of `CONSTANT_RANGE`; None where
            the hidden states were not recorded.
    """

    steps: int
    units: Integers
    left: Mapping[str, Array]
    right: Mapping[str, Array]
    stuck: Mapping[str, Array]
    constant: Array | None


def saturation(site: SiteLike) -> Saturation:
    """Compute the share of steps in which each gate of each unit is near 0 or near 1.

    Args:
        site: A site with at least one of reset, update and candidate; with hidden states also for
            `constant`.

    Returns:
        The shares of each gate and unit.

    Raises:
        NotRecordedError: No gate was recorded.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, saturation
        >>> update = np.array([[0.05, 0.5], [0.95, 0.5], [0.95, 0.5], [0.95, 0.5]])
        >>> result = saturation(SiteArrays(update=update))
        >>> result.left["update"], result.right["update"]
        (array([0.25, 0.  ]), array([0.75, 0.  ]))
    """
    data = as_site_data(site)
    gates = [name for name in GATES if name in data.quantities]
    if not gates:
        raise NotRecordedError(f"{data.name!r} has no gates; it has {', '.join(data.quantities)}")
    requested = [*gates, *(["hidden"] if "hidden" in data.quantities else [])]
    stats_of = partial(unit_stats, moments=False)
    units = summarize_each(data, dict.fromkeys(requested, stats_of), merge_stats)
    left = {gate: _share(units[gate], "below") for gate in gates}
    right = {gate: _share(units[gate], "above") for gate in gates}
    return Saturation(
        site=data.name,
        steps=data.steps,
        units=data.units,
        left=left,
        right=right,
        stuck={
            gate: (right[gate] >= STUCK).astype(np.int8) - (left[gate] >= STUCK) for gate in gates
        },
        constant=_is_constant(units["hidden"]) if "hidden" in requested else None,
    )


def _share(units: Array, name: str) -> Array:
    count = units["count"]
    shares = np.full(len(units), np.nan)
    return np.asarray(np.divide(units[name], count, out=shares, where=count > 0))


def _is_constant(units: Array) -> Array:
    # Without values the minimum is infinity and the maximum minus infinity.
    return np.asarray(
        (units["count"] > 0) & (units["maximum"] - units["minimum"] <= CONSTANT_RANGE)
    )


@dataclass(frozen=True)
class GateSummary:
    """Summary of one gate over all steps and units. NaN where there are none.

    Attributes:
        mean: Mean of the values; NaN if one is not finite.
        below: Share of the values with a magnitude below 0.1.
        above: Share of the values with a magnitude above 0.9.
    """

    mean: float
    below: float
    above: float


@dataclass(frozen=True)
class SiteSummary:
    """Summary of a site.

    Attributes:
        site: Name of the site.
        sequences: Number of sequences.
        steps: Number of steps of all sequences.
        residual: Largest ``|replayed h - kernel's h|``; NaN if gates are deferred.
        gates: By recorded gate. Reset and update are in (0, 1); the candidate is in (-1, 1), so a
            large magnitude is a saturated tanh.
    """

    site: str
    sequences: int
    steps: int
    residual: float
    gates: dict[str, GateSummary]

    __repr__ = fields_repr


def summarize_site(site: SiteTrace) -> SiteSummary:
    """Summarize a site, a block of rows at a time."""
    data = as_site_data(site)
    gates = [name for name in GATES if name in data.quantities]
    units = summarize_each(data, dict.fromkeys(gates, unit_stats), merge_stats)
    return SiteSummary(
        site=site.name,
        sequences=len(data.lengths),
        steps=data.steps,
        residual=site.residual,
        gates={name: _gate_summary(each) for name, each in units.items()},
    )


def _gate_summary(units: Array) -> GateSummary:
    """Summarize the statistics of all units, (H,) of type `UNIT_DTYPE`."""
    values = sum(int(units[name].sum()) for name in ("count", "nan", "infinite"))
    if not values:
        return GateSummary(np.nan, np.nan, np.nan)
    # The means leave out values that are not finite.
    is_finite = values == units["count"].sum()
    mean = float(units["mean"] @ units["count"]) / values if is_finite else np.nan
    return GateSummary(mean, *(int(units[name].sum()) / values for name in ("below", "above")))


def summarize_statistics(statistics: Statistics) -> list[SiteSummary]:
    """Summarize every site of running statistics as `summarize_site` does for a trace."""
    sites = [statistics[name] for name in statistics]
    return [
        SiteSummary(
            site=site.site,
            sequences=site.sequences,
            steps=site.steps,
            residual=site.residual,
            gates={name: _gate(units) for name, units in site.quantities.items() if name in GATES},
        )
        for site in sites
    ]


def _gate(units: UnitStatistics) -> GateSummary:
    """Average over units, each weighted by its number of values."""
    has_values = units.count > 0
    weights = units.count[has_values] / max(1, units.count.sum())
    if not has_values.any() or units.below is None or units.above is None:
        return GateSummary(np.nan, np.nan, np.nan)
    columns = (units.mean, units.below, units.above)
    return GateSummary(*(float(weights @ values[has_values]) for values in columns))
