"""Mean age of the information in a state, exactly, over all states of a site.

The recurrence h(t) = (1 - z(t)) n(t) + z(t) h(t - 1) makes a state a weighted mean of all earlier
candidates and of the initial state:

    h(t) = w(0) h(0) + sum over s of w(s) n(s)      w(s) = (1 - z(s)) prod over k > s of z(k)
                                                    w(0) = prod over all k of z(k)

The weights of a unit are non-negative and sum to 1, so they have a mean age, the sum of
w(s) (t - s). It has a recurrence of its own:

    age(t) = z(t) (age(t - 1) + 1)                  age(0) = 0

The age of h(0) is counted from the start of the sequence, which is its lower bound. For a constant
z the age converges to z / (1 - z), about half a step less than -1 / log z.

z is PyTorch's update gate: where it is 1 the previous state is kept. `decomposition` gives the
contribution of each past step to a state.

S sequences, H units, n steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_sequences
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.segments import RESTARTS, SequenceSegment
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: Size of the sequences that are processed together, in bytes.
BATCH_BYTES = 8 * 1024 * 1024

#: Number of steps of a chunk; all chunks are processed in parallel.
CHUNK_STEPS = 64


@dataclass(frozen=True, eq=False)
class StateAge(Result):
    """Mean age of the information in the states of a site.

    Values are NaN where there are no steps or where a gate is NaN.

    Attributes:
        steps: N, number of steps of all sequences.
        sequences: Number of sequences with steps.
        units: (H,) numbers of the units.
        age: (H,) mean age over all steps, in steps.
        age_at_end: (H,) mean age in the last state of each sequence, in steps.
        initial_left: (H,) weight of the initial state in the last state, from 0 to 1, mean over
            sequences.
    """

    steps: int
    sequences: int
    units: Integers
    age: Array
    age_at_end: Array
    initial_left: Array


def state_age(site: SiteLike) -> StateAge:
    """Compute the mean age of the information in the states of each unit.

    Args:
        site: A site with the update gate. The last state of a sequence is the one computed last;
            for a reverse direction that is the first in time.

    Returns:
        The ages of each unit. The equations are those of the module.

    Raises:
        NotRecordedError: The update gate was not recorded.

    Examples:
        A constant gate z gives the age z / (1 - z) after enough steps.

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, state_age
        >>> ages = state_age(SiteArrays(update=np.tile([0.5, 0.9], (200, 1))))
        >>> ages.age_at_end.round(3)
        array([1., 9.])
    """
    data = as_site_data(site)
    sums = reduce_sequences(data, ("update", RESTARTS), partial(_AgeSums, len(data.units)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return StateAge(
            site=data.name,
            steps=data.steps,
            sequences=sums.sequences,
            units=data.units,
            age=sums.ages / (sums.steps or np.nan),
            age_at_end=sums.last_ages / (sums.sequences or np.nan),
            initial_left=sums.initial_weight / (sums.sequences or np.nan),
        )


class _AgeSums:
    """Sums of ages over steps, and of what there is at the ends of sequences."""

    def __init__(self, width: int) -> None:
        self.steps = self.sequences = 0
        self.ages, self.last_ages, self.initial_weight = np.zeros((3, width))
        # Age and remaining initial state of the current sequence, after its last segment.
        self._age, self._initial_weight = np.zeros(width), np.ones(width)
        self._waiting: list[SequenceSegment] = []
        self._rows = 0

    def add(self, segment: SequenceSegment) -> None:
        self._waiting.append(segment)
        self._rows += len(segment)
        if 8 * self._rows * len(self.ages) >= BATCH_BYTES:
            self._process()

    def merge(self, later: _AgeSums) -> None:
        later._process()
        self.steps += later.steps
        self.sequences += later.sequences
        self.ages += later.ages
        self.last_ages += later.last_ages
        self.initial_weight += later.initial_weight

    def _process(self) -> None:
        waiting, self._waiting, self._rows = self._waiting, [], 0
        if not waiting:
            return
        lengths = np.array([len(segment) for segment in waiting])
        ends, starts = np.cumsum(lengths) - 1, np.cumsum(lengths) - lengths
        is_first = np.array([segment.is_first for segment in waiting])
        last = np.array([segment.ends for segment in waiting])
        update = np.concatenate([segment.values["update"] for segment in waiting], dtype=np.float64)
        factor = update.copy()
        factor[starts[is_first]] = 0.0
        ages = _linear_recurrence(factor, update, self._age)
        # The product of gates may underflow to 0.
        starts_segment = is_first.copy()
        starts_segment[0] = True
        remaining = np.multiply.reduceat(update, starts[starts_segment], axis=0)
        if not is_first[0]:
            remaining[0] *= self._initial_weight
        self.steps += len(update)
        self.sequences += int(np.count_nonzero(last))
        self.ages += ages.sum(axis=0)
        self.last_ages += ages[ends[last]].sum(axis=0)
        self.initial_weight += remaining[np.cumsum(starts_segment)[last] - 1].sum(axis=0)
        self._age, self._initial_weight = ages[-1].copy(), remaining[-1].copy()


def _linear_recurrence(factor: Array, more: Array, before: Array) -> Array:
    """(n, H) a(t) = factor(t) a(t - 1) + more(t), from (H,) the one before the first.

    Chunks of steps are gone through at once, as if each began from 0, and what they began from is
    added afterwards.
    """
    steps, width = factor.shape
    chunks = -(-steps // CHUNK_STEPS)
    values, products = np.zeros((2, chunks * CHUNK_STEPS, width))
    values[:steps], products[:steps] = more, factor
    values_by_chunk, products_by_chunk = (
        values.reshape(chunks, CHUNK_STEPS, width),
        products.reshape(chunks, CHUNK_STEPS, width),
    )
    for step in range(1, CHUNK_STEPS):
        values_by_chunk[:, step] += products_by_chunk[:, step] * values_by_chunk[:, step - 1]
        products_by_chunk[:, step] *= products_by_chunk[:, step - 1]
    for chunk in range(chunks):
        values_by_chunk[chunk] += products_by_chunk[chunk] * before
        before = values_by_chunk[chunk, -1]
    return np.asarray(values[:steps])
