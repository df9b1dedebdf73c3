"""Units that are stuck or constant in most sequences, by a test.

`saturation` counts steps: a unit may be stuck in all recorded steps because these are few. Here the
question is whether it would be stuck in other sequences, too. Steps of one sequence resemble each
other, so the samples are sequences, or parts of `PART_STEPS` steps of longer ones. A gate is stuck
in a sample if it is below 0.1, or above 0.9, in at least `STUCK` of its steps. The null hypothesis
of the binomial test is that this is so in at most `TYPICAL` of all samples. Its p-values are
corrected for all units, gates and sides together (Holm 1979).

S samples, H units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from grutrace.analysis.descriptive.saturation import CONSTANT_RANGE, STUCK
from grutrace.analysis.engine.multiple_tests import binomial_tail, holm
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data, row_bytes
from grutrace.errors import NotRecordedError
from grutrace.records import GATES, Array
from grutrace.statistics.moments import HIGH, LOW
from grutrace.storage.read.lazy_rows import items_per_block
from grutrace.storage.read.sequence_index import Integers

#: Steps of one sample.
PART_STEPS = 50

#: A unit is stuck if it is so in more than this share of all samples.
TYPICAL = 0.8

#: Level of the test.
LEVEL = 0.05

#: Bytes of the rows that are read at once.
BLOCK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class StuckUnits(Result):
    """Units of a site that are stuck or constant in most sequences.

    Attributes:
        samples: S.
        enough: Whether S is large enough for the test to find a unit that is stuck in all samples.
        units: (H,) numbers of the units.
        left_share: By recorded gate, (H,) share of the samples in which it is stuck below 0.1; of
            the candidate, with ``|n|`` below 0.1.
        right_share: By recorded gate, (H,) share of the samples in which it is stuck above 0.9.
        constant_share: (H,) share of the samples in which the hidden state is within half of
            `saturation.CONSTANT_RANGE` of its first value; NaN where it was not recorded.
        p: By gate, (H,) corrected p-value of the side with the larger share.
        stuck: By gate, (H,) -1 or 1 where `p` is below 0.05, for the left or the right side.
        constant_p: (H,) corrected p-value of a constant state.
        constant: (H,) whether it is below 0.05.
    """

    samples: int
    enough: bool
    units: Integers
    left_share: Mapping[str, Array]
    right_share: Mapping[str, Array]
    constant_share: Array
    p: Mapping[str, Array]
    stuck: Mapping[str, Array]
    constant_p: Array
    constant: Array


def stuck_units(site: SiteLike) -> StuckUnits:
    """Find units with a gate that is stuck, or a state that is constant, in most sequences.

    Args:
        site: A site with gates or hidden states.

    Returns:
        Shares of samples, and corrected p-values.

    Raises:
        NotRecordedError: Neither gates nor hidden states were recorded.

    Examples:
        Unit 1 keeps its state in all of 60 sequences.

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, stuck_units
        >>> update = np.random.default_rng(0).uniform(0, 1, (600, 3))
        >>> update[:, 1] = 0.95
        >>> stuck_units(SiteArrays(update=update, lengths=[10] * 60)).stuck["update"]
        array([0, 1, 0], dtype=int8)
    """
    data = as_site_data(site)
    gates = [name for name in GATES if name in data.quantities]
    has_states = "hidden" in data.quantities
    quantities = [*gates, *(["hidden"] if has_states else [])]
    if not quantities:
        raise NotRecordedError(
            f"{data.name!r} has neither gates nor states; it has {', '.join(data.quantities)}"
        )
    samples, counts = _count(data, quantities)
    width = len(data.units)
    names = [(gate, side) for gate in gates for side in (-1, 1)]
    names += [("hidden", 0)] if has_states else []
    tails = binomial_tail(np.array([counts[name] for name in names]).ravel(), samples, TYPICAL)
    corrected = holm(tails).reshape(len(names), width)
    p = dict(zip(names, corrected, strict=True))
    shares = {name: counts[name] / max(1, samples) for name in names}
    larger = {gate: counts[gate, 1] > counts[gate, -1] for gate in gates}
    best_p = {gate: np.where(larger[gate], p[gate, 1], p[gate, -1]) for gate in gates}
    constant_p = p["hidden", 0] if has_states else np.full(width, np.nan)
    return StuckUnits(
        site=data.name,
        samples=samples,
        enough=bool(TYPICAL**samples * len(names) * width < LEVEL),
        units=data.units,
        left_share={gate: shares[gate, -1] for gate in gates},
        right_share={gate: shares[gate, 1] for gate in gates},
        constant_share=shares["hidden", 0] if has_states else np.full(width, np.nan),
        p=best_p,
        stuck={
            gate: np.where(best_p[gate] < LEVEL, np.where(larger[gate], 1, -1), 0).astype(np.int8)
            for gate in gates
        },
        constant_p=constant_p,
        constant=constant_p < LEVEL,
    )


def _count(data: SiteData, quantities: list[str]) -> tuple[int, dict[tuple[str, int], Integers]]:
    """Count the samples, and in how many of them each unit is stuck, by gate and side: (H,)."""
    width = len(data.units)
    counts: dict[tuple[str, int], Integers] = {}
    for name in quantities:
        for side in (0,) if name == "hidden" else (-1, 1):
            counts[name, side] = np.zeros(width, np.int64)
    first_state: Array | None = None
    samples, first = 0, 0
    at_once = items_per_block(BLOCK_BYTES, row_bytes(data, quantities))
    ends = np.cumsum(data.lengths)
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + at_once, "right")))
        starts = _starts(data.lengths[first:last])
        samples += len(starts)
        where = data.rows_between(first, last)
        for name in quantities if len(starts) else ():
            values = np.asarray(data.rows(name)[where])
            sizes = np.diff(np.append(starts, len(values)))[:, np.newaxis]
            if name == "hidden":
                if first_state is None:
                    first_state = values[0]
                with np.errstate(invalid="ignore"):
                    near = np.abs(values - first_state) <= CONSTANT_RANGE / 2
                counts[name, 0] += (np.add.reduceat(near, starts, dtype=np.int64) == sizes).sum(0)
            else:
                values = np.abs(values) if name == "candidate" else values
                for side, holds in ((-1, values < LOW), (1, values > HIGH)):
                    steps = np.add.reduceat(holds, starts, dtype=np.int64)
                    counts[name, side] += (steps >= STUCK * sizes).sum(0)
        first = last
        if data.advance is not None:
            data.advance(first, len(ends))
    return samples, counts


def _starts(lengths: Integers) -> Integers:
    """Return the first row of each sample, of sequences with these lengths."""
    lengths = lengths[lengths > 0]
    begins = np.cumsum(lengths) - lengths
    parts = np.maximum(1, lengths // PART_STEPS)
    return np.concatenate(
        [np.empty(0, np.int64)]
        + [
            begin + length * np.arange(count) // count
            for begin, length, count in zip(begins, lengths, parts, strict=True)
        ]
    )
