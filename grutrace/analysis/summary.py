"""How open a gate is: its mean, and how often it is nearly shut or nearly open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from grutrace.analysis.fold import fold_rows
from grutrace.analysis.material import material
from grutrace.record import GATES, Array
from grutrace.reprs import fields_repr
from grutrace.statistics.results import UnitStatistics
from grutrace.statistics.statistics import Statistics
from grutrace.statistics.units import OPEN, SHUT
from grutrace.storage.site import SiteTrace


@dataclass(frozen=True)
class GateSummary:
    """Over all steps and units. Not a number where there are none.

    Attributes:
        mean: Mean of the values.
        below: Share of the values whose size is below `SHUT`.
        above: Share of the values whose size is above `OPEN`.
    """

    mean: float
    below: float
    above: float


@dataclass(frozen=True)
class SiteSummary:
    """What a site holds.

    Attributes:
        site: Its name.
        sequences: How many.
        steps: Of all sequences together.
        residual: Largest ``|replayed h - kernel's h|``; not a number where gates are derived.
        gates: By name, for those that were recorded. The gates lie between 0 and 1; the
            candidate lies between -1 and 1, and of it a large size means a saturated tanh.
    """

    site: str
    sequences: int
    steps: int
    residual: float
    gates: dict[str, GateSummary]

    __repr__ = fields_repr


def summarize_site(site: SiteTrace) -> SiteSummary:
    """Summarize a site, in parts."""
    of = material(site)
    return SiteSummary(
        site=site.name,
        sequences=len(of.lengths),
        steps=of.steps,
        residual=site.residual,
        gates={
            name: fold_rows(of, (name,), _Counted).summary()
            for name in GATES
            if name in of.quantities
        },
    )


class _Counted:
    """What is counted of one gate, of all units together."""

    def __init__(self) -> None:
        self._values = self._below = self._above = 0
        self._sum = 0.0

    def add(self, rows: Mapping[str, Array]) -> None:
        """Take in the (n, H) values of a gate."""
        (block,) = rows.values()
        self._values += block.size
        self._sum += float(block.sum(dtype=np.float64))
        size = np.abs(block)
        self._below += int(np.count_nonzero(size < SHUT))
        self._above += int(np.count_nonzero(size > OPEN))

    def merge(self, later: _Counted) -> None:
        """Take in what was counted of later rows."""
        self._values += later._values
        self._sum += later._sum
        self._below += later._below
        self._above += later._above

    def summary(self) -> GateSummary:
        """Of all that was counted."""
        if not self._values:
            return GateSummary(np.nan, np.nan, np.nan)
        shares = (each / self._values for each in (self._sum, self._below, self._above))
        return GateSummary(*shares)


def summarize_statistics(statistics: Statistics) -> list[SiteSummary]:
    """Summarize every site, each as `summarize_site` does that of a trace."""
    sites = [statistics[name] for name in statistics]
    return [
        SiteSummary(
            site=site.site,
            sequences=site.sequences,
            steps=site.steps,
            residual=site.residual,
            gates={
                name: _gate(figures) for name, figures in site.quantities.items() if name in GATES
            },
        )
        for site in sites
    ]


def _gate(figures: UnitStatistics) -> GateSummary:
    """The mean over units, each with the weight of its values."""
    some = figures.count > 0
    weights = figures.count[some] / max(1, figures.count.sum())
    if not some.any() or figures.below is None or figures.above is None:
        return GateSummary(np.nan, np.nan, np.nan)
    each = (figures.mean, figures.below, figures.above)
    return GateSummary(*(float(weights @ values[some]) for values in each))
