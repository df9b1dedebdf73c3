"""The sequences of one call, and of several calls of one step.

B sequences in a batch, W width of a state: all layers of a module side by side.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from grutrace.capture.sequences.final_states import (
    CallEnds,
    FinalStates,
    Integers,
    Numbers,
    SequenceEnd,
    StateRow,
)
from grutrace.capture.sequences.named_sequences import NamedEnd
from grutrace.records import Fork, Origin


class SequenceAssignment(NamedTuple):
    """The sequences of one call, in the order of the user's batch.

    Attributes:
        sequences: (B,) number of each sequence, or of its last segment.
        begun: (B,) whether the sequence starts in this call.
        forks: New sequences that start inside another, or continue another.
        steps_before: (B,) number of steps of each sequence before this call, in all segments.
        roots: (B,) number of the first segment of each sequence.
        origins: Marks of the new sequences, if they have one.
    """

    sequences: Numbers
    begun: npt.NDArray[np.bool_]
    forks: tuple[Fork, ...]
    steps_before: Integers
    roots: Numbers
    origins: tuple[Origin, ...] = ()


class InitialState(IntEnum):
    """The kind of initial states of a call in a series."""

    COPIED = 0
    ZEROS = 1
    #: They equal, bit for bit, the final states of the previous call in the series.
    CHAINED = 2


class SeriesStates(Protocol):
    """The states of n calls of one step, (B, W) each. The calls may have different sequences."""

    @property
    def final(self) -> Tensor:
        """(n, B, W) the final states of the calls, which no other code can change."""

    @property
    def kinds(self) -> Sequence[InitialState]:
        """(n,) the kinds of the calls' initial states."""

    def initial(self, call: int) -> Tensor:
        """Return the initial states of a call, (B, W)."""


class Commitment:
    """Whether calls that were assigned to sequences are appended to the sink.

    Attributes:
        is_done: Whether the calls are appended.
    """

    def __init__(self, *, is_done: bool = False) -> None:
        self.is_done = is_done


class SeriesAssignment:
    """The sequences of several calls of one step.

    Attributes:
        begun: (n, B) whether each sequence starts in the call.
        forks: Forks by index of the call, as in `SequenceAssignment`.
        origins: Marks by index of the call, as in `SequenceAssignment`.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.begun = np.zeros(size, bool)
        self.forks: dict[int, tuple[Fork, ...]] = {}
        self.origins: dict[int, tuple[Origin, ...]] = {}
        self._ends: list[CallEnds] = []

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, ends: Sequence[CallEnds], *, begun: bool) -> None:
        """Add calls whose sequences all start, or all continue those of the previous call."""
        self.begun[len(self._ends) : len(self._ends) + len(ends)] = begun
        self._ends += ends

    def add_call(self, assignment: SequenceAssignment, offsets: Integers | None) -> None:
        """Add one call."""
        number = len(self._ends)
        self.begun[number] = assignment.begun
        if assignment.forks:
            self.forks[number] = assignment.forks
        if assignment.origins:
            self.origins[number] = assignment.origins
        steps = assignment.steps_before + 1
        self._ends.append(CallEnds(assignment.sequences, assignment.roots, steps, offsets))

    def sequences(self) -> Numbers:
        """Return (n, B), the number of each sequence, or of its last segment."""
        return np.array([ends.sequences for ends in self._ends])

    def __getitem__(self, call: int) -> SequenceAssignment:
        sequences, roots, steps, _ = self._ends[call]
        forks, origins = self.forks.get(call, ()), self.origins.get(call, ())
        return SequenceAssignment(sequences, self.begun[call], forks, steps - 1, roots, origins)


@dataclass
class PendingAssignment:
    """An assignment that is not committed yet, with the final states of its call.

    Attributes:
        assignment: The sequences of the call.
        final: (B, W) the final states of the call; None if no call can continue from them.
        steps: (B,) number of steps of each sequence after the call.
        offsets: (B,) number of steps of each sequence before its segment; None if all are 0.
        names: (B,) the user's name of each sequence, None for a sequence without one; None if no
            sequence has a name.
        whole: The call that this call continues as a whole; None if there is none.
        used: The states that this call continues or forks from, if `whole` is None.
        is_owned: Whether no other code can change `final`.
    """

    assignment: SequenceAssignment
    final: Tensor | None
    steps: Integers
    offsets: Integers | None
    names: tuple[Hashable, ...] | None = None
    whole: FinalStates | None = None
    used: tuple[StateRow, ...] = ()
    is_owned: bool = False


class AssignmentBuilder:
    """Builds the assignment of a call, row by row.

    Args:
        batch: Number of rows, B.
        count: Number of sequences that started earlier.
    """

    def __init__(self, batch: int, count: int) -> None:
        self._count = count
        self._sequences, self._roots = np.empty((2, batch), np.uint64)
        self._steps, self._offsets = np.zeros((2, batch), np.int64)
        self._begun = np.ones(batch, bool)
        self._forks: list[Fork] = []
        self._origins: list[Origin] = []
        self._used: list[StateRow] = []
        self._names: list[Hashable] = [None] * batch

    def begin(self, row: int, mark: str | None = None) -> None:
        """Start a sequence."""
        self._sequences[row] = self._roots[row] = self._count
        self._count += 1
        if mark is not None:
            self.mark(row, mark)

    def mark(self, row: int, mark: str) -> None:
        """Mark how a sequence started."""
        self._origins.append(Origin(int(self._sequences[row]), mark))

    def continue_from(self, row: int, state: StateRow) -> None:
        """Continue a sequence from its final state."""
        call, index = state
        self._begun[row] = False
        end = call.end(index)
        self._sequences[row], self._roots[row] = end.sequence, end.root
        self._steps[row], self._offsets[row] = end.steps, end.offset
        self._names[row] = None if call.names is None else call.names[index]
        self._used.append(state)

    def fork(self, row: int, state: StateRow) -> None:
        """Start a sequence inside another one."""
        self.begin(row)
        self._used.append(state)
        self._add_fork(row, state[0].end(state[1]))

    def begin_segment(self, row: int, named: NamedEnd) -> None:
        """Continue a sequence with a new segment."""
        self.begin(row, "continued")
        end = named.end
        self._roots[row] = end.root
        self._steps[row] = self._offsets[row] = end.steps
        self._add_fork(row, end)
        if not named.call.is_dropped:
            self._used.append((named.call, named.row))

    def _add_fork(self, row: int, end: SequenceEnd) -> None:
        fork = Fork(int(self._sequences[row]), end.sequence, end.steps - end.offset)
        self._forks.append(fork)

    def is_used(self, state: StateRow) -> bool:
        """Whether a row already continues from this state."""
        return state in self._used

    def finish(self) -> PendingAssignment:
        """Return the assignment of all rows."""
        assignment = SequenceAssignment(
            self._sequences,
            self._begun,
            tuple(self._forks),
            self._steps,
            self._roots if (self._roots != self._sequences).any() else self._sequences,
            tuple(self._origins),
        )
        names = tuple(self._names) if any(name is not None for name in self._names) else None
        offsets = self._offsets if self._offsets.any() else None
        return PendingAssignment(
            assignment, None, self._steps, offsets, names, used=tuple(self._used)
        )
