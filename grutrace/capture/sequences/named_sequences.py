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
        call: The call that ended there. Its state may be dropped: the sequence goes on even so.
        row: Its row in that call.
        end: Its numbers.
    """

    call: FinalStates
    row: int
    end: SequenceEnd


class NamedSequences:
    """The ends of the named sequences.

    Args:
        limit: Bytes that it may take.
    """

    def __init__(self, limit: int) -> None:
        self._most = max(1, int(limit * 7 / 8) // NAME_BYTES)
        self._dropped = Digests(int(limit / 8))
        # Ordered by when they were last used.
        self._ends: OrderedDict[Hashable, NamedEnd] = OrderedDict()

    def get(self, name: Hashable) -> NamedEnd | None:
        """Where a sequence has ended; None if it has not begun."""
        return self._ends.get(name)

    def was_dropped(self, name: Hashable) -> bool:
        """Whether it has begun, and was dropped."""
        return self._dropped.hold_hashes(_hashes([name]))[0]

    def add(self, call: FinalStates) -> None:
        """Note where the named sequences of a call have ended."""
        for index, name in enumerate(call.names or ()):
            if name is not None:
                self._ends[name] = NamedEnd(call, index, call.end(index))
                self._ends.move_to_end(name)
        too_many = len(self._ends) - max(self._most, len(call.names or ()))
        if too_many > 0:
            names = [self._ends.popitem(last=False)[0] for _ in range(too_many)]
            self._dropped.add_hashes(_hashes(names))

    def sequences(self) -> set[int]:
        """The numbers of their last segments."""
        return {named.end.sequence for named in self._ends.values()}


def _hashes(names: Sequence[Hashable]) -> npt.NDArray[np.uint64]:
    return np.array([hash(name) % (1 << 64) for name in names], np.uint64)


def same_as_ended(initial: Tensor | None, ends: Sequence[NamedEnd | None]) -> list[bool]:
    """Whether each row of (B, W) states is the state that its sequence ended with."""
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
