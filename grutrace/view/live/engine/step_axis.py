"""`StepAxis`: the steps of the sequences of a site, laid one after another on one axis."""

from __future__ import annotations

import numpy as np

from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers, SequenceIndex, as_slice, ranges
from grutrace.storage.read.site import SiteTrace


class StepAxis:
    """The steps of sequences of a module, one sequence after another. S sequences, N positions.

    A position is a place on the axis, from 0 to N - 1. A sequence of no steps has no position.

    Args:
        index: The sequences of the module.
        sequences: (S,) numbers of the sequences on the axis, rising; all sequences by default.

    Attributes:
        sequences: (S,) numbers of the sequences.
        bounds: (S + 1,) first position of each sequence, and N.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> from grutrace.view.live.engine.step_axis import step_axis
        >>> gru = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(gru) as trace:
        ...     output, state = gru(torch.randn(5, 4, 2))  # 5 steps, 4 sequences
        >>> axis = step_axis(trace["l0"])
        >>> len(axis), axis.locate(7), axis.position(1, 2)
        (20, (1, 2), 7)
    """

    def __init__(self, index: SequenceIndex, sequences: Array | None = None) -> None:
        self._index = index
        self._complete = sequences is None
        if sequences is None:
            sequences = np.arange(len(index))
        self.sequences: Integers = np.asarray(sequences, np.int64)
        lengths = index.lengths[self.sequences]
        self.bounds: Integers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def places(self, start: int, stop: int) -> Integers:
        """Return the place in `sequences` of the sequence of each position, (stop - start,)."""
        first, last = self.places_between(start, stop)
        counts = np.minimum(self.bounds[first + 1 : last + 1], stop)
        counts = counts - np.maximum(self.bounds[first:last], start)
        return np.repeat(np.arange(first, last), counts)

    def places_between(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first place with a position in a range, and the last one + 1."""
        if start >= stop:
            return 0, 0
        first = int(np.searchsorted(self.bounds, start, side="right")) - 1
        return first, int(np.searchsorted(self.bounds, stop, side="left"))

    def places_between_all(self, starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
        """Return `places_between` for many ranges, none of them empty."""
        firsts = np.searchsorted(self.bounds, starts, side="right") - 1
        return firsts, np.searchsorted(self.bounds, stops, side="left")

    def locate(self, position: int) -> tuple[int, int]:
        """Return the sequence of a position, and the step within that sequence."""
        place = int(np.searchsorted(self.bounds, position, side="right")) - 1
        return int(self.sequences[place]), position - int(self.bounds[place])

    def position(self, sequence: int, step: int) -> int | None:
        """Return the position of a step; None if the axis does not have it."""
        place = int(np.searchsorted(self.sequences, sequence))
        if place == len(self.sequences) or self.sequences[place] != sequence:
            return None
        position = int(self.bounds[place]) + step
        return position if step >= 0 and position < self.bounds[place + 1] else None

    def extent(self, sequence: int) -> tuple[int, int] | None:
        """Return the first position of a sequence, and its last one + 1; None if it is not here."""
        place = int(np.searchsorted(self.sequences, sequence))
        if place == len(self.sequences) or self.sequences[place] != sequence:
            return None
        return int(self.bounds[place]), int(self.bounds[place + 1])

    def rows(self, start: int, stop: int) -> slice | Integers:
        """Return the rows of the positions from `start` to `stop`, in their order."""
        if self._complete:
            return as_slice(self._index.sequential_rows(np.arange(start, stop)))
        first, last = self.places_between(start, stop)
        low = np.maximum(self.bounds[first:last], start)
        high = np.minimum(self.bounds[first + 1 : last + 1], stop)
        in_all = self._index.first_positions[self.sequences[first:last]] - self.bounds[first:last]
        return as_slice(self._index.sequential_rows(ranges(low + in_all, high - low)))


def step_axis(site: SiteTrace, sequences: Array | None = None) -> StepAxis:
    """Return the axis of a site as it is now; of all sequences by default."""
    return StepAxis(site.snapshot.index(site.module_index), sequences)
