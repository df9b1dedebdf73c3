"""How open a gate is: its mean, and how often it is nearly shut or nearly open."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grutrace.record import GATES
from grutrace.statistics.results import UnitStatistics
from grutrace.statistics.statistics import Statistics
from grutrace.statistics.units import OPEN, SHUT
from grutrace.storage.blocks import blocks
from grutrace.storage.site import SiteTrace
from grutrace.storage.source import Rows


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


def summarize_site(site: SiteTrace) -> SiteSummary:
    """Summarize a site, a block of rows at a time."""
    return SiteSummary(
        site=site.name,
        sequences=len(site),
        steps=int(site.lengths.sum()),
        residual=site.residual,
        gates={
            name: summarize_gate(site.rows(name)) for name in GATES if name in site.site.readable
        },
    )


def summarize_gate(rows: Rows) -> GateSummary:
    """Summarize the values of a gate, (N, H)."""
    total = below = above = 0.0
    for block in blocks(rows):
        total += float(block.sum(dtype=np.float64))
        size = np.abs(block)
        below += np.count_nonzero(size < SHUT)
        above += np.count_nonzero(size > OPEN)
    count = rows.shape[0] * rows.shape[1]
    if not count:
        return GateSummary(np.nan, np.nan, np.nan)
    return GateSummary(total / count, below / count, above / count)


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
