"""The final states of calls, and the sequences that they belong to.

B sequences in a batch, W width of a state: all layers of a module side by side.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Integers: TypeAlias = npt.NDArray[np.int64]
Numbers: TypeAlias = npt.NDArray[np.uint64]

# Empty values for calls whose data was freed.
_NO_KEYS: list[float] = []
_NO_NUMBERS, _NO_STEPS = np.empty(0, np.uint64), np.empty(0, np.int64)
_NO_STATES = torch.empty((0, 0))


class SequenceEnd(NamedTuple):
    """The end of one sequence of a call.

    Attributes:
        sequence: Number of the sequence, or of its last segment.
        root: Number of its first segment.
        steps: Number of its steps so far, in all segments.
        offset: Number of its steps before its last segment.
    """

    sequence: int
    root: int
    steps: int
    offset: int


class FinalStates:
    """The final states of one call, and the sequences that they belong to.

    Attributes:
        states: (B, W) the states. `StateMemory` replaces them with a copy.
        sequences: (B,) the number of each sequence, or of its last segment.
        roots: (B,) number of each sequence's first segment. The same array as `sequences` if no
            sequence has several segments.
        steps: (B,) number of steps of each sequence so far.
        offsets: (B,) number of steps of each sequence before its last segment; None if all are 0.
        names: The user's name of each sequence, None for a sequence without one; None if no
            sequence has a name.
        is_open: (B,) whether no call has continued from the state so far; a single value if it is
            the same for all.
        is_dropped: Whether the states are no longer in memory.
        is_counted: Whether the memory has counted the open states.
        ring: The ring buffer that holds the states; None if they have memory of their own.
        start: Position of the states in the ring buffer.
    """

    __slots__ = (
        *("_column", "_keys", "_range", "_size", "is_counted", "is_dropped", "is_open", "names"),
        *("offsets", "ring", "roots", "sequences", "start", "states", "steps"),
    )

    def __init__(
        self,
        states: Tensor,
        sequences: Numbers,
        roots: Numbers,
        steps: Integers,
        offsets: Integers | None,
        names: tuple[Hashable, ...] | None = None,
    ) -> None:
        self.states, self.sequences, self.roots = states, sequences, roots
        self.steps, self.offsets, self.names = steps, offsets, names
        self.is_open: npt.NDArray[np.bool_] | bool = True
        self.is_dropped = self.is_counted = False
        self.ring: object = None
        self.start, self._size = 0, len(sequences)
        self._column, self._keys = -1, _NO_KEYS
        self._range: tuple[range, int] | None = None

    def __len__(self) -> int:
        return self._size

    def compress(self) -> None:
        """Use less memory for an earlier call whose sequences have consecutive numbers."""
        if self.roots is not self.sequences or self.offsets is not None:
            return
        first, steps = int(self.sequences[0]), int(self.steps[0])
        numbers = range(first, first + len(self))
        is_range = (self.sequences == np.arange(first, first + len(self), dtype=np.uint64)).all()
        if is_range and (self.steps == steps).all():
            self._range = numbers, steps
            self.sequences, self.roots, self.steps = _NO_NUMBERS, _NO_NUMBERS, _NO_STEPS

    def end(self, index: int) -> SequenceEnd:
        """Return the end of the sequence in a row."""
        if self._range is not None:
            sequences, steps = self._range
            return SequenceEnd(sequences[index], sequences[index], steps, 0)
        offset = 0 if self.offsets is None else int(self.offsets[index])
        sequence, root = int(self.sequences[index]), int(self.roots[index])
        return SequenceEnd(sequence, root, int(self.steps[index]), offset)

    def numbers(self) -> Sequence[int]:
        """(B,) the number of each sequence, or of its last segment."""
        if self._range is not None:
            return self._range[0]
        numbers: list[int] = self.sequences.tolist()
        return numbers

    def drop(self) -> None:
        """Free all data. Remaining references to this object do not need it."""
        self.is_dropped, self._keys, self.names, self._range = True, _NO_KEYS, None, None
        self.states, self.ring = _NO_STATES, None
        self.sequences, self.roots, self.steps = _NO_NUMBERS, _NO_NUMBERS, _NO_STEPS
        self.offsets, self.is_open = None, False

    def keys(self, column: int) -> list[float]:
        """Return the value of each state in this column, (B,). The values are cached."""
        if column != self._column:
            self._column, self._keys = column, self.states[:, column].tolist()
        return self._keys

    def open_rows(self) -> list[int]:
        """Return the rows that no call has continued."""
        if isinstance(self.is_open, bool):
            return list(range(len(self))) if self.is_open else []
        indices: list[int] = np.flatnonzero(self.is_open).tolist()
        return indices

    def is_open_at(self, index: int) -> bool:
        """Whether no call has continued from the state in this row."""
        return self.is_open if isinstance(self.is_open, bool) else bool(self.is_open[index])

    def close_row(self, index: int) -> None:
        """Mark the state in this row as continued."""
        if isinstance(self.is_open, bool):
            self.is_open = np.full(len(self), self.is_open)
        self.is_open[index] = False

    def close(self) -> None:
        """Mark all states as continued, and free the cached keys."""
        self.is_open, self._column, self._keys = False, -1, _NO_KEYS


class CallEnds(NamedTuple):
    """The ends of a call's sequences, (B,) each; see `FinalStates`."""

    sequences: Numbers
    roots: Numbers
    steps: Integers
    offsets: Integers | None


class FinalStatesBlock:
    """The final states of consecutive calls, kept together until one of the states is looked up.

    Args:
        states: (n, B, W) the states.
        ends: (n,) the ends of each call's sequences.
        is_open: Whether no call has continued from the states so far.
    """

    __slots__ = (
        *("_calls", "_ends", "is_counted", "is_dropped", "is_open", "ring", "start", "states"),
    )

    def __init__(self, states: Tensor, ends: Sequence[CallEnds], *, is_open: bool) -> None:
        self.states, self._ends, self.is_open = states, ends, is_open
        self.is_dropped = self.is_counted = False
        self.ring: object = None
        self.start = 0
        self._calls: list[FinalStates] | None = None

    def __len__(self) -> int:
        return self.states.shape[0] * self.states.shape[1]

    def calls(self) -> list[FinalStates]:
        """Return the calls that are still in the block's memory."""
        if self._calls is None:
            self._calls = []
            for states, ends in zip(self.states, self._ends, strict=True):
                call = FinalStates(states, *ends)
                call.is_open, call.is_counted = self.is_open, self.is_counted
                call.ring, call.start = self.ring, self.start
                call.compress()
                self._calls.append(call)
        return [call for call in self._calls if call.ring is self.ring and call.start == self.start]

    @property
    def is_split(self) -> bool:
        """Whether `calls` was called. From then on, the single calls replace the block."""
        return self._calls is not None

    def drop(self) -> None:
        """Free all data."""
        self.is_dropped, self.ring, self._ends = True, None, ()
        self.states = _NO_STATES


#: A state: the call that ended with it, and its row in that call.
StateRow: TypeAlias = tuple[FinalStates, int]
