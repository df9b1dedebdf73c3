"""What `grutrace stats` says of a trace, from statistics of it: all units together."""

from __future__ import annotations

import numpy as np

from grutrace.analysis.summary import GateSummary, SiteSummary
from grutrace.record import GATES
from grutrace.statistics.results import UnitStatistics
from grutrace.statistics.statistics import Statistics


def summarize_statistics(statistics: Statistics) -> list[SiteSummary]:
    """Summarize every site, each as `analysis.summary.summarize_site` does that of a trace."""
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
