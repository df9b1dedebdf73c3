"""Remember the final states of earlier calls, within a memory limit, and find them by value.

B sequences in a batch, W width of a state: all layers of a module side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from grutrace.capture.sequences.digests import Digests
from grutrace.capture.sequences.final_states import (
    CallEnds,
    FinalStates,
    FinalStatesBlock,
    StateRow,
)
from grutrace.capture.sequences.ring_buffer import RingBuffer

#: Fraction of the memory that is freed at a time when it is full: of the memory for states that
#: wait to be continued, and of the memory for continued states.
WAITING_FREE_FRACTION, RECENT_FREE_FRACTION = 1 / 8, 1 / 2

#: Fraction of the memory for continued states. A decoder leaves such states behind with each step,
#: and they are needed only for forks. A small fraction stays in the processor's cache.
RECENT_FRACTION = 1 / 10

#: Fraction of the memory for digests of dropped states.
DIGEST_FRACTION = 1 / 8

#: The column of keys is checked once there are this many states. Another column is chosen if a key
#: has more than this many states on average, for example because the unit never changes.
MIN_STATES_TO_CHECK, MAX_SHARED_KEYS = 256, 8

#: Maximum number of calls whose states with the same key are compared: of open states, and of
#: continued states. A network at a fixed point repeats the same state.
MAX_OPEN_CANDIDATES, MAX_CLOSED_CANDIDATES = 64, 8


class StateMemory:
    """Remembers the final states of calls.

    A state is looked up by its value in one column. The states of the last call are always
    remembered. Older states are dropped, the oldest first, when newer states need the memory. Calls
    whose states were all continued share one part of the memory, all other calls the other part.

    Args:
        limit: Maximum bytes.

    Attributes:
        last: The last call; None before the first.
    """

    def __init__(self, limit: int) -> None:
        self._recent = RingBuffer(int(limit * RECENT_FRACTION), RECENT_FREE_FRACTION, self._drop)
        self._waiting = RingBuffer(
            int(limit * (1 - RECENT_FRACTION - DIGEST_FRACTION)), WAITING_FREE_FRACTION, self._drop
        )
        self._digests = Digests(int(limit * DIGEST_FRACTION))
        self.last: FinalStates | None = None
        self._rows = 0
        # Calls that `is_only` and `find` have not processed yet. Most calls are never looked up.
        self._uncounted: list[FinalStates | FinalStatesBlock] = []
        self._unindexed: list[FinalStates | FinalStatesBlock] = []
        # For each key, the number of open states with it in all calls but the last.
        self._open_keys: dict[float, int] = {}
        self._index: dict[float, StateRow | list[StateRow]] = {}
        self._indexed, self._column, self._retry = 0, 0, MIN_STATES_TO_CHECK

    def __iter__(self) -> Iterator[FinalStates]:
        """Iterate over all remembered calls."""
        yield from self._recent
        yield from self._waiting
        if self.last is not None and self.last.ring is None:
            yield self.last

    def add(self, call: FinalStates, *, is_owned: bool = False) -> None:
        """Remember a call, which becomes the last.

        Args:
            call: The call.
            is_owned: Whether no other code can change its states: they are copied only when another
                call becomes the last.
        """
        before, self.last = self.last, call
        if before is not None:
            self._displace(before)
        if not is_owned and not self._recent.put(call, call.states):
            call.states = call.states.clone()
        self._unindexed.append(call)
        self._rows += len(call)

    def add_run(self, states: Tensor, ends: Sequence[CallEnds], *, are_open: bool) -> None:
        """Remember several consecutive calls. The last of them becomes the last call.

        The same as `add` for each call and, if the next call continues it, `close`.

        Args:
            states: (n, B, W) their states, which no other code can change.
            ends: (n,) the ends of their sequences.
            are_open: Whether no call continues the previous one.
        """
        ring = self._waiting if are_open else self._recent
        size, others = ring.calls_per_block(states[0]), len(states) - 1
        if not size:
            for number, (of_call, end) in enumerate(zip(states, ends, strict=True)):
                call = FinalStates(of_call, *end)
                self.add(call, is_owned=True)
                if number < others and not are_open:
                    call.close()
            return
        before, self.last = self.last, FinalStates(states[-1], *ends[-1])
        if before is not None:
            self._displace(before)
        first = 0
        if not are_open and others > size:
            # The next calls would replace these immediately.
            first = others - size
            self._digests.add([states[:first].flatten(0, 1)])
        for start in range(first, others, size):
            of_block = slice(start, min(start + size, others))
            block = FinalStatesBlock(states[of_block], ends[of_block], is_open=are_open)
            ring.put(block, block.states)
            self._unindexed.append(block)
            if are_open:
                self._uncounted.append(block)
            self._rows += len(block)
        self._unindexed.append(self.last)
        self._rows += len(self.last)

    def _displace(self, call: FinalStates) -> None:
        """Move the last call to the memory for open or for continued states."""
        if call.is_open is True or call.open_rows():
            call.compress()
            if self._waiting.put(call, call.states):
                self._uncounted.append(call)
                return
            call.ring = None
        elif call.ring is None:
            self._recent.put(call, call.states)
        if call.ring is None:
            self._drop([call])

    def close(self, call: FinalStates) -> None:
        """Mark every state of the last call as continued."""
        call.close()

    def close_rows(self, rows: Iterable[StateRow]) -> None:
        """Mark these states as continued or forked."""
        forked = dict[FinalStates, None]()
        for call, index in rows:
            if call.is_open_at(index):
                call.close_row(index)
                if call.is_counted:
                    self._uncount(call.keys(self._column)[index])
            elif call is not self.last:
                forked[call] = None
        for call in forked:
            # More forks may follow, so the call counts as new.
            ring = self._waiting if call.ring is self._waiting else self._recent
            if call.ring is not None:
                call.ring = None
                states = call.states.clone()
                ring.put(call, states)

    def is_only(self, call: FinalStates) -> bool:
        """Whether surely no open state of another call equals a state of the last call.

        False if one of the states is zero. The result may also be False if no states are equal,
        because only the keys are compared.
        """
        return self._are_only(call.keys(self._column), call.states)

    def are_only(self, states: Tensor) -> bool:
        """Return the same for consecutive calls, (n, B, W). Each continues the previous one."""
        return self._are_only(states[..., self._column].flatten().tolist(), states)

    def _are_only(self, keys: list[float], states: Tensor) -> bool:
        if self._uncounted:
            for call in self._uncounted:
                self._count(call)
            self._uncounted.clear()
        if 0.0 in keys and not states.any(-1).all():
            return False
        return not self._open_keys or self._open_keys.keys().isdisjoint(keys)

    def find(self, states: Tensor) -> list[list[StateRow]]:
        """Return, for each of (B, W) states, the remembered states that are equal."""
        self._index_all()
        matches: list[list[StateRow]] = [[] for _ in range(len(states))]
        candidates: dict[FinalStates, tuple[list[int], list[int]]] = {}
        for row, key in enumerate(states[:, self._column].tolist()):
            known = self._index.get(key)
            for call, index in [known] if isinstance(known, tuple) else known or ():
                if not call.is_dropped:
                    rows, indices = candidates.setdefault(call, ([], []))
                    rows.append(row)
                    indices.append(index)
        for call, (rows, indices) in candidates.items():
            equal = equal_rows(states, rows, call.states, indices)
            for row, index, is_equal in zip(rows, indices, equal, strict=True):
                if is_equal:
                    matches[row].append((call, index))
        return matches

    def were_dropped(self, states: Tensor) -> list[bool]:
        """Return whether each of (B, W) states was remembered and then dropped."""
        return self._digests.hold(states)

    def sequences(self) -> set[int]:
        """Return the numbers of all sequences with a remembered state."""
        return {number for call in self for number in call.numbers()}

    def _drop(self, calls: list[FinalStates | FinalStatesBlock]) -> None:
        whole = [part for call in calls for part in _parts(call)]
        self._digests.add([call.states.flatten(0, -2) for call in whole])
        for call in whole:
            self._rows -= len(call)
            if call.is_counted:
                for key in self._open_keys_of(call):
                    self._uncount(key)
        for call in (*whole, *calls):
            call.drop()
        self._uncounted = [call for call in self._uncounted if not call.is_dropped]
        self._unindexed = [call for call in self._unindexed if not call.is_dropped]

    def _count(self, counted: FinalStates | FinalStatesBlock) -> None:
        for call in _parts(counted):
            call.is_counted = True
            for key in self._open_keys_of(call):
                # NaN is not equal to itself, so it would never be found.
                if key == key:
                    self._open_keys[key] = self._open_keys.get(key, 0) + 1

    def _open_keys_of(self, call: FinalStates | FinalStatesBlock) -> list[float]:
        if isinstance(call, FinalStates):
            keys = call.keys(self._column)
            return [keys[index] for index in call.open_rows()]
        of_block: list[float] = []
        if call.is_open:
            of_block = call.states[..., self._column].flatten().tolist()
        return of_block

    def _uncount(self, key: float) -> None:
        remaining = self._open_keys.get(key, 0) - 1
        if remaining > 0:
            self._open_keys[key] = remaining
        else:
            self._open_keys.pop(key, None)

    def _index_all(self) -> None:
        if self._indexed > 2 * self._rows + MIN_STATES_TO_CHECK:
            # Half of the entries belong to dropped calls.
            self._start_index()
        unindexed = [
            call
            for entry in self._unindexed
            for call in (entry.calls() if isinstance(entry, FinalStatesBlock) else (entry,))
        ]
        if len(unindexed) > len(self._unindexed):
            self._uncounted = [call for entry in self._uncounted for call in _parts(entry)]
        for call in unindexed:
            self._indexed += len(call)
            for index, key in enumerate(call.keys(self._column)):
                known = self._index.setdefault(key, (call, index))
                if isinstance(known, list):
                    known.append((call, index))
                    if len(known) % MAX_OPEN_CANDIDATES == 0:
                        known[:] = _latest(known)
                elif known != (call, index):
                    self._index[key] = [known, (call, index)]
        self._unindexed.clear()
        if self._indexed >= self._retry and len(self._index) < self._indexed / MAX_SHARED_KEYS:
            self._retry = 2 * self._indexed
            self._choose_column()

    def _start_index(self) -> None:
        self._index, self._indexed, self._unindexed = {}, 0, list(self)

    def _choose_column(self) -> None:
        """Choose the column with the most distinct values for looking up states."""
        first_calls = list(islice(self, MIN_STATES_TO_CHECK))
        values = torch.cat([call.states[:MIN_STATES_TO_CHECK].cpu() for call in first_calls])
        values = values[:MIN_STATES_TO_CHECK]
        distinct = [len(set(column)) for column in values.T.tolist()]
        best = distinct.index(max(distinct))
        if distinct[best] > distinct[self._column]:
            self._column = best
            self._start_index()
            self._open_keys.clear()
            for call in self:
                call.is_counted = False
            self._uncounted = [call for call in self if call is not self.last]
            self._index_all()


def _parts(
    call: FinalStates | FinalStatesBlock,
) -> Sequence[FinalStates | FinalStatesBlock]:
    """Return the calls of a block that was split, or the call or block itself."""
    if isinstance(call, FinalStatesBlock) and call.is_split:
        return call.calls()
    return (call,)


def _latest(rows: list[StateRow]) -> list[StateRow]:
    """Return the rows of the latest calls, the latest last."""
    calls = {True: dict[FinalStates, None](), False: dict[FinalStates, None]()}
    rows_of_calls = []
    for call, index in reversed(rows):
        if call.is_dropped:
            continue
        is_open = call.is_open_at(index)
        known = calls[is_open]
        if call in known or len(known) < (
            MAX_OPEN_CANDIDATES if is_open else MAX_CLOSED_CANDIDATES
        ):
            known[call] = None
            rows_of_calls.append((call, index))
    return rows_of_calls[::-1]


def equal_rows(a: Tensor, rows: list[int], b: Tensor, indices: list[int]) -> list[bool]:
    """Whether row ``rows[i]`` of (B, W) a equals row ``indices[i]`` of (C, W) b, for each i."""
    if not _same_type(a, b):
        return [False] * len(rows)
    equal: list[bool] = (a[rows] == b[indices]).all(1).tolist()
    return equal


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two batches of states are the same."""
    return _same_type(a, b) and torch.equal(a, b)


def _same_type(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.device == b.device
