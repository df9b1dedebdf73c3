"""How open a gate is: its mean, and how often it is nearly shut or nearly open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grutrace.record import GATES, Array
from grutrace.storage.site import SiteTrace
from grutrace.storage.source import Rows

#: Below the one a gate counts as nearly shut, above the other as nearly open. The bounds are those
#: of Karpathy, Johnson and Li (2015), "Visualizing and understanding recurrent networks".
SHUT, OPEN = 0.1, 0.9

#: How much is brought into memory at once. Bytes.
BLOCK = 16 * 1024 * 1024


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


def blocks(rows: Rows) -> Iterator[Array]:
    """Yield all rows, some at a time."""
    each = max(1, BLOCK // max(1, rows.shape[1] * rows.dtype.itemsize))
    for start in range(0, len(rows), each):
        yield np.asarray(rows[start : start + each])
