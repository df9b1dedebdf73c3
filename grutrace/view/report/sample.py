"""The part of a site that a report reads: all of it, or a stated sample of bounded size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grutrace.analysis.engine.site_data import SiteArrays, SiteLike
from grutrace.records import FORWARD_QUANTITIES
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.trace import Trace

#: Largest number of values of each quantity that a report reads at a site.
MAX_VALUES = 1_000_000


@dataclass(frozen=True, eq=False)
class SiteSample:
    """What a report reads of a site.

    Attributes:
        site: The site, with the sequences of the sample only.
        data: What analyses read: `site`, or the first steps of its only sequence.
        text: What was read, in words.
        options: Options of a command that reads the same sequences.
        steps: Number of steps.
    """

    site: SiteTrace
    data: SiteLike
    text: str
    options: tuple[str, ...]
    steps: int

    @property
    def has_whole_sequences(self) -> bool:
        """Whether the sequences were read to their end."""
        return self.data is self.site

    @property
    def name(self) -> str:
        """Name of the site."""
        return self.site.name


def sample_site(trace: Trace, name: str) -> SiteSample:
    """Choose the sequences of a site that a report reads.

    Of a large site it reads every k-th sequence, where k is a prime number, so that a period of the
    batches has no effect. Of sequences that are too long it reads the beginning of the first.

    Args:
        trace: The trace.
        name: Name of the site.
    """
    site = trace[name]
    lengths = site.lengths
    most = max(1, MAX_VALUES // max(1, site.module.hidden_size))
    total = int(lengths.sum())
    counts = f"{len(lengths):,} sequences ({total:,} steps)"
    if total <= most:
        return SiteSample(site, site, f"all {counts}", (), total)
    every = _next_prime(-(-total // most))
    while every < len(lengths) and lengths[::every].sum() > most:
        every = _next_prime(every + 1)
    chosen = lengths[::every]
    if chosen.sum() <= most:
        part = trace.select(sequences=slice(None, None, every))[name]
        text = f"one in {every} of {counts}: {len(chosen):,} sequences, {chosen.sum():,} steps"
        return SiteSample(part, part, text, ("--sequences", f"::{every}"), int(chosen.sum()))
    part = trace.select(sequences=slice(0, 1))[name]
    text = f"the first {most:,} steps of the first of {counts}"
    return SiteSample(part, _beginning(part, most), text, ("--sequences", "0:1"), most)


def _beginning(site: SiteTrace, steps: int) -> SiteArrays:
    """Return the steps of the only sequence that are computed first, as arrays."""
    length = int(site.lengths[0])
    window = slice(length - steps, length) if site.site.reverse else slice(0, steps)
    rows = np.arange(length)[site.rows_between(0, 1)][window]
    quantities = [name for name in FORWARD_QUANTITIES if name in site.site.available_quantities]
    return SiteArrays(
        lengths=[steps],
        **{name: np.asarray(site.rows(name)[rows]) for name in quantities},
        initial=np.asarray(site.initial[0:1]),
        labels={name: site.row_labels(name).to_array()[rows] for name in site.label_names},
        weights=site.weights(int(site.row_versions(rows[:1])[0])),
        reverse=site.site.reverse,
        name=site.name,
    )


def _next_prime(least: int) -> int:
    number = max(2, least)
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number
