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
from functools import partial

import numpy as np

from grutrace.analysis.descriptive.saturation import CONSTANT_RANGE, STUCK
from grutrace.analysis.engine.map_reduce import reduce_sequences
from grutrace.analysis.engine.multiple_tests import binomial_tail, holm
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.segments import SequenceSegment
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data
from grutrace.errors import NotRecordedError
from grutrace.records import GATES, Array
from grutrace.statistics.moments import HIGH, LOW
from grutrace.storage.read.sequence_index import Integers

#: Steps of one sample.
PART_STEPS = 50

#: A unit is stuck if it is so in more than this share of all samples.
TYPICAL = 0.8

#: Level of the test.
LEVEL = 0.05


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
    first_state = None
    if "hidden" in quantities and data.steps:
        sequence = int(np.flatnonzero(data.lengths)[0])
        rows = data.rows_between(sequence, sequence + 1)
        row = rows.start if isinstance(rows, slice) else int(rows[0])
        first_state = np.asarray(data.rows("hidden")[row : row + 1])[0]
    make_reducer = partial(_Counts, tuple(quantities), len(data.units), first_state)
    counted = reduce_sequences(data, quantities, make_reducer)
    return counted.samples, counted.counts


class _Counts:
    """Counts samples in which units are stuck.

    Args:
        quantities: Gates, and ``hidden``.
        width: H.
        first_state: (H,) the state that others are compared with.
    """

    def __init__(self, quantities: tuple[str, ...], width: int, first_state: Array | None) -> None:
        self._first_state = first_state
        self.samples = 0
        names = [(name, side) for name in quantities for side in _sides(name)]
        self.counts: dict[tuple[str, int], Integers] = {
            name: np.zeros(width, np.int64) for name in names
        }
        # Steps of the sample that has begun.
        self._begun: dict[tuple[str, int], Integers] = {
            name: np.zeros(width, np.int64) for name in names
        }

    def add(self, segment: SequenceSegment) -> None:
        """Add the next steps of a sequence."""
        parts = max(1, segment.length // PART_STEPS)
        bounds = segment.length * np.arange(parts + 1) // parts
        steps = len(next(iter(segment.values.values())))
        first, last = segment.start, segment.start + steps
        # The sample that the first of these steps is in, and the number of those that end here.
        begin = int(np.searchsorted(bounds, first, "right")) - 1
        ended = int(np.searchsorted(bounds, last, "right")) - 1 - begin
        inner = bounds[(bounds > first) & (bounds < last)] - first
        starts = np.concatenate([[0], inner]).astype(np.int64)
        sizes = np.diff(bounds[begin : begin + ended + 1])[:, np.newaxis]
        self.samples += ended
        for name, values in segment.values.items():
            for side in _sides(name):
                sums = np.add.reduceat(self._holds(name, side, values), starts, dtype=np.int64)
                sums[0] += self._begun[name, side]
                share = STUCK if side else 1.0
                self.counts[name, side] += (sums[:ended] >= share * sizes).sum(axis=0)
                complete = len(sums) == ended
                self._begun[name, side] = np.zeros_like(sums[0]) if complete else sums[-1]

    def _holds(self, name: str, side: int, values: Array) -> Array:
        """Return at which steps a gate is on a side, or the state is near the first, (n, H)."""
        with np.errstate(invalid="ignore"):
            if side == 0:
                return np.asarray(np.abs(values - self._first_state) <= CONSTANT_RANGE / 2)
            size = np.abs(values) if name == "candidate" else values
            return np.asarray(size < LOW if side < 0 else size > HIGH)

    def merge(self, later: _Counts) -> None:
        """Add the counts of later sequences."""
        self.samples += later.samples
        for name, count in later.counts.items():
            self.counts[name] += count


def _sides(name: str) -> tuple[int, ...]:
    return (0,) if name == "hidden" else (-1, 1)
