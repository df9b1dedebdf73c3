"""The ends of the sequences that the user has named."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from grutrace.capture.sequences.digests import Digests
from grutrace.capture.sequences.final_states import FinalStates, SequenceEnd
from grutrace.capture.sequences.state_memory import equal_rows

#: Estimated bytes of one name.
NAME_BYTES = 512


class NamedEnd(NamedTuple):
    """The end of a named sequence.

    Attributes:
        call: The last call of the sequence. Its states may be dropped; the sequence can still be
            continued.
        row: The row of the sequence in that call.
        end: The end of the sequence.
    """

    call: FinalStates
    row: int
    end: SequenceEnd


class NamedSequences:
    """The ends of the named sequences.

    Args:
        limit: Maximum bytes.
    """

    def __init__(self, limit: int) -> None:
        self._most = max(1, int(limit * 7 / 8) // NAME_BYTES)
        self._dropped = Digests(int(limit / 8))
        # The least recently used name is first.
        self._ends: OrderedDict[Hashable, NamedEnd] = OrderedDict()

    def get(self, name: Hashable) -> NamedEnd | None:
        """Return the end of a sequence; None if it is unknown."""
        return self._ends.get(name)

    def was_dropped(self, name: Hashable) -> bool:
        """Whether the sequence was known and then dropped."""
        return self._dropped.hold_hashes(_hashes([name]))[0]

    def add(self, call: FinalStates) -> None:
        """Add the ends of the named sequences of a call."""
        for index, name in enumerate(call.names or ()):
            if name is not None:
                self._ends[name] = NamedEnd(call, index, call.end(index))
                self._ends.move_to_end(name)
        too_many = len(self._ends) - max(self._most, len(call.names or ()))
        if too_many > 0:
            names = [self._ends.popitem(last=False)[0] for _ in range(too_many)]
            self._dropped.add_hashes(_hashes(names))

    def sequences(self) -> set[int]:
        """Return the numbers of the last segments of all named sequences."""
        return {named.end.sequence for named in self._ends.values()}


def _hashes(names: Sequence[Hashable]) -> npt.NDArray[np.uint64]:
    return np.array([hash(name) % (1 << 64) for name in names], np.uint64)


def same_as_ended(initial: Tensor | None, ends: Sequence[NamedEnd | None]) -> list[bool]:
    """Whether each row of (B, W) states equals the final state of its sequence."""
    same = [False] * len(ends)
    if initial is None:
        return same
    by_call: dict[FinalStates, tuple[list[int], list[int]]] = {}
    for row, end in enumerate(ends):
        if end is not None and not end.call.is_dropped:
            rows, indices = by_call.setdefault(end.call, ([], []))
            rows.append(row)
            indices.append(end.row)
    for call, (rows, indices) in by_call.items():
        equal = equal_rows(initial, rows, call.states, indices)
        for row, is_equal in zip(rows, equal, strict=True):
            same[row] = is_equal
    return same
