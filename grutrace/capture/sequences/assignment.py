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
        steps_before: (B,) number of steps of each before this call, in all its segments.
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
    """What is known of the states that a call of a series started from."""

    COPIED = 0
    ZEROS = 1
    #: They are, bit for bit, the states that the call before in the series ended with.
    CHAINED = 2


class SeriesStates(Protocol):
    """The states of n calls of one step, of the same sequences or of others, (B, W) each."""

    @property
    def final(self) -> Tensor:
        """(n, B, W) the states that the calls ended with, which no other code can change."""

    @property
    def kinds(self) -> Sequence[InitialState]:
        """(n,) what is known of the states that they started from."""

    def initial(self, call: int) -> Tensor:
        """Return (B, W), the states that a call started from."""


class Commitment:
    """Whether calls that were assigned to sequences are appended to the sink.

    Attributes:
        is_done: Whether they are.
    """

    def __init__(self, *, is_done: bool = False) -> None:
        self.is_done = is_done


class SeriesAssignment:
    """The sequences of several calls of one step.

    Attributes:
        begun: (n, B) whether each sequence starts in the call.
        forks: By index of the call, as in `SequenceAssignment`.
        origins: Likewise.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.begun = np.zeros(size, bool)
        self.forks: dict[int, tuple[Fork, ...]] = {}
        self.origins: dict[int, tuple[Origin, ...]] = {}
        self._ends: list[CallEnds] = []

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, ends: Sequence[CallEnds], *, begun: bool) -> None:
        """Add calls whose sequences all begin, or all continue those of the call before."""
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
        assignment: Its sequences.
        final: (B, W) the states that it ended with; None if nothing can continue from them.
        steps: (B,) steps of each sequence after it.
        offsets: (B,) steps that each had before its segment; None if none had any.
        names: (B,) of the sequences, None for none; None if none has a name.
        whole: The call that it continues as a whole, if it does.
        used: The states that it continues or forks from, otherwise.
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
        batch: How many there are, B.
        count: How many sequences have begun before.
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
        """Begin a sequence."""
        self._sequences[row] = self._roots[row] = self._count
        self._count += 1
        if mark is not None:
            self.mark(row, mark)

    def mark(self, row: int, mark: str) -> None:
        """Mark how a sequence began."""
        self._origins.append(Origin(int(self._sequences[row]), mark))

    def continue_from(self, row: int, state: StateRow) -> None:
        """Continue a sequence from the state that it ended with."""
        call, index = state
        self._begun[row] = False
        end = call.end(index)
        self._sequences[row], self._roots[row] = end.sequence, end.root
        self._steps[row], self._offsets[row] = end.steps, end.offset
        self._names[row] = None if call.names is None else call.names[index]
        self._used.append(state)

    def fork(self, row: int, state: StateRow) -> None:
        """Begin a sequence inside another one."""
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
        """Whether a row goes on from this state already."""
        return state in self._used

    def finish(self) -> PendingAssignment:
        """Return what there is."""
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
