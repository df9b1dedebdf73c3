"""Remember the final states of earlier calls, within a memory limit, and find them by value.

B sequences in a batch, W width of a state: all layers of a module side by side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Estimated Python overhead of each call, and of each of its states. Bytes.
CALL_OVERHEAD, ROW_OVERHEAD = 1024, 256

#: Where the bytes are used up, so much of them is freed at once: of states that something is still
#: to continue from, and of others, which a decoder leaves behind with each step.
WAITING_FREE_FRACTION, RECENT_FREE_FRACTION = 1 / 8, 1 / 2

#: The part of the bytes that states may take which something has continued from: a decoder leaves
#: them behind with each step, and they are needed only if a sequence is to fork there. The smaller,
#: the more of what is written to is in the processor's cache.
RECENT_FRACTION = 1 / 10

#: The part of the bytes that holds digests of the states that were dropped.
DIGEST_FRACTION = 1 / 8

#: The part of a ring buffer's bytes that a block of calls may take, at least.
MIN_BLOCK_FRACTION = 1 / 4

#: Values of a state that its digest is made of, spread over all units.
DIGEST_COLUMNS = 16

#: Of so many states, at least, it is asked whether the column of their keys tells them apart: it
#: does not where a key is that of so many states, as of a unit that never changes.
MIN_STATES_TO_CHECK, MAX_SHARED_KEYS = 256, 8

#: Of so many calls the states with one key are compared: those that something may go on from, and
#: others. A network that has come to rest has one state for ever.
MAX_OPEN_CANDIDATES, MAX_CLOSED_CANDIDATES = 64, 8

#: Odd constants of multiplicative hashing.
_FACTOR, _MIXER = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93

Integers: TypeAlias = npt.NDArray[np.int64]
Numbers: TypeAlias = npt.NDArray[np.uint64]
Hashes: TypeAlias = npt.NDArray[np.uint64]


# What a call has that has nothing any more.
_NO_KEYS: list[float] = []
_NO_NUMBERS, _NO_STEPS = np.empty(0, np.uint64), np.empty(0, np.int64)
_NO_STATES = torch.empty((0, 0))


class SequenceEnd(NamedTuple):
    """The end of one sequence of a call.

    Attributes:
        sequence: Its number; of a sequence with several segments, the last one's.
        root: The number that it began under.
        steps: How many it has so far, in all segments.
        offset: How many it had before its last segment.
    """

    sequence: int
    root: int
    steps: int
    offset: int


class FinalStates:
    """The final states of one call, and the sequences that they belong to.

    Attributes:
        states: (B, W) the states; a copy, once they are remembered.
        sequences: (B,) the number of each sequence, or of its last segment.
        roots: (B,) the number that each sequence began under. The same array as `sequences` where
            no sequence has several segments.
        steps: (B,) steps of each sequence so far.
        offsets: (B,) steps that each had before its last segment; None if none had any.
        names: The user's name of each sequence, None if it has none; None if none has one.
        is_open: (B,) whether nothing has continued from the state so far; one answer if it is the
            same for all.
        is_dropped: Whether the state is no longer in memory.
        is_counted: Whether its open states are among those that the memory has counted.
        ring: Where the states lie; None if in memory of their own.
        start: At which place there.
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
        self.ring: RingBuffer | None = None
        self.start, self._size = 0, len(sequences)
        self._column, self._keys = -1, _NO_KEYS
        self._range: tuple[range, int] | None = None

    def __len__(self) -> int:
        return self._size

    def compress(self) -> None:
        """Keep less of a call that is not the last any more, and began neighbouring sequences."""
        if self.roots is not self.sequences or self.offsets is not None:
            return
        first, steps = int(self.sequences[0]), int(self.steps[0])
        numbers = range(first, first + len(self))
        is_range = (self.sequences == np.arange(first, first + len(self), dtype=np.uint64)).all()
        if is_range and (self.steps == steps).all():
            self._range = numbers, steps
            self.sequences, self.roots, self.steps = _NO_NUMBERS, _NO_NUMBERS, _NO_STEPS

    def end(self, index: int) -> SequenceEnd:
        """Where the sequence in a row has ended."""
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
        """(B,) the value of each state in this column, read once."""
        if column != self._column:
            self._column, self._keys = column, self.states[:, column].tolist()
        return self._keys

    def open_rows(self) -> list[int]:
        """The rows that nothing has continued from."""
        if isinstance(self.is_open, bool):
            return list(range(len(self))) if self.is_open else []
        indices: list[int] = np.flatnonzero(self.is_open).tolist()
        return indices

    def is_open_at(self, index: int) -> bool:
        """Whether nothing has continued from the state in this row."""
        return self.is_open if isinstance(self.is_open, bool) else bool(self.is_open[index])

    def close_row(self, index: int) -> None:
        """Note that the state in this row was continued from."""
        if isinstance(self.is_open, bool):
            self.is_open = np.full(len(self), self.is_open)
        self.is_open[index] = False

    def close(self) -> None:
        """Note that all were continued from. What can be had again is not kept."""
        self.is_open, self._column, self._keys = False, -1, _NO_KEYS


class CallEnds(NamedTuple):
    """Where the sequences of a call have ended, as in `FinalStates`, (B,) each."""

    sequences: Numbers
    roots: Numbers
    steps: Integers
    offsets: Integers | None


class FinalStatesBlock:
    """The final states of several calls in a row, as one until a state is looked up among them.

    Args:
        states: (n, B, W) the states.
        ends: (n,) where the sequences of each call have ended.
        is_open: Whether nothing has continued from them so far.
    """

    __slots__ = (
        *("_calls", "_ends", "is_counted", "is_dropped", "is_open", "ring", "start", "states"),
    )

    def __init__(self, states: Tensor, ends: Sequence[CallEnds], *, is_open: bool) -> None:
        self.states, self._ends, self.is_open = states, ends, is_open
        self.is_dropped = self.is_counted = False
        self.ring: RingBuffer | None = None
        self.start = 0
        self._calls: list[FinalStates] | None = None

    def __len__(self) -> int:
        return self.states.shape[0] * self.states.shape[1]

    def calls(self) -> list[FinalStates]:
        """Return the calls that are still where the block is."""
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
        """Whether the calls have been asked for: they are what counts from then on."""
        return self._calls is not None

    def drop(self) -> None:
        """Free all data."""
        self.is_dropped, self.ring, self._ends = True, None, ()
        self.states = _NO_STATES


#: A state: the call that it came out of, and its row there.
StateRow: TypeAlias = tuple[FinalStates, int]


class RingBuffer:
    """Memory of a fixed size that calls' states lie in, one call after another.

    Allocated one by one, between what the model allocates and frees, states would fragment the heap
    by much more than they take themselves.

    Args:
        limit: Bytes, with what is estimated beside the states.
        freed: The part of them that is freed at once.
        drop: Is told of calls that have to go, while their states are still there.
    """

    def __init__(
        self,
        limit: int,
        freed: float,
        drop: Callable[[list[FinalStates | FinalStatesBlock]], None],
    ) -> None:
        self._limit, self._freed, self._drop = limit, freed, drop
        self._room: Tensor | None = None
        self._next = 0
        # Where each begins, and the call. One that was moved since lies elsewhere by now.
        self._calls: deque[tuple[int, FinalStates | FinalStatesBlock]] = deque()

    def __iter__(self) -> Iterator[FinalStates]:
        """All calls that lie here, the oldest first."""
        for start, call in self._calls:
            if self._has(start, call):
                yield from call.calls() if isinstance(call, FinalStatesBlock) else (call,)

    def calls_per_block(self, states: Tensor) -> int:
        """Return how many calls with states like these, (B, W), may be put here as one block."""
        overhead = ROW_OVERHEAD * states.shape[0] + CALL_OVERHEAD
        return int(self._limit * max(self._freed, MIN_BLOCK_FRACTION)) // (states.nbytes + overhead)

    def put(self, call: FinalStates | FinalStatesBlock, states: Tensor) -> bool:
        """Copy the states of a call to here, where the oldest make room; whether they fit at all.

        Args:
            call: The call, or a block of calls.
            states: (B, W) its states, which do not lie here; (n, B, W) of a block.
        """
        calls = len(states) if isinstance(call, FinalStatesBlock) else 1
        overhead = ROW_OVERHEAD * len(call) + CALL_OVERHEAD * calls
        size = states.numel() + overhead // states.element_size()
        capacity = self._limit // states.element_size()
        if size > capacity:
            return False
        room = self._room
        if room is None or room.dtype is not states.dtype or room.device != states.device:
            self._next = 0
            self._clear(math.inf)
            # It is written to in any mode that the model is called in.
            with torch.inference_mode(False):
                room = torch.empty(capacity, dtype=states.dtype, device=states.device)
            self._room = room
        if self._next + size > capacity:
            self._clear(math.inf)
            self._next = 0
        if self._calls and self._next <= self._calls[0][0] < self._next + size:
            # Some more at once: it costs less than one by one.
            self._clear(self._next + max(size, capacity * self._freed))
        call.ring, call.start = self, self._next
        strides = (states[0].numel(), states.shape[-1], 1)[-states.dim() :]
        call.states = room.as_strided(states.shape, strides, self._next)
        call.states.copy_(states)
        self._calls.append((self._next, call))
        self._next += size
        return True

    def _clear(self, stop: float) -> None:
        """Have the oldest calls go that lie from the present place to this one."""
        dropped = []
        while self._calls and self._next <= self._calls[0][0] < stop:
            start, call = self._calls.popleft()
            if self._has(start, call):
                dropped.append(call)
        if dropped:
            self._drop(dropped)

    def _has(self, start: int, call: FinalStates | FinalStatesBlock) -> bool:
        return call.ring is self and call.start == start


class StateMemory:
    """Remembers the final states of calls.

    A state is looked up by its value in one column. The states of the last call are always
    remembered. Others are dropped, the oldest first, when newer ones need their room: on one side
    those that were all continued from, on the other those of which some were not when another call
    came.

    Args:
        limit: Bytes that may be remembered.

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
        # What `is_only` and `find` have not looked at yet: most calls are never looked for.
        self._uncounted: list[FinalStates | FinalStatesBlock] = []
        self._unindexed: list[FinalStates | FinalStatesBlock] = []
        # How many open states of other calls than the last have a key.
        self._open_keys: dict[float, int] = {}
        self._index: dict[float, StateRow | list[StateRow]] = {}
        self._indexed, self._column, self._retry = 0, 0, MIN_STATES_TO_CHECK

    def __iter__(self) -> Iterator[FinalStates]:
        """All calls that are remembered."""
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
        """Remember several calls in a row, of which the last becomes the last.

        The same as `add` for each call and, if the next call continues it, `close`.

        Args:
            states: (n, B, W) their states, which no other code can change.
            ends: (n,) where their sequences have ended.
            are_open: Whether no call continues the one before it.
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
            # The next ones would displace these at once.
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
        """Move the last call to where it waits, or to where it is soon dropped.

        It waits if something is still to continue from it.
        """
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
        """Note that every state of the last call was continued from."""
        call.close()

    def close_rows(self, rows: Iterable[StateRow]) -> None:
        """Note that these states were continued or forked from."""
        forked = dict[FinalStates, None]()
        for call, index in rows:
            if call.is_open_at(index):
                call.close_row(index)
                if call.is_counted:
                    self._uncount(call.keys(self._column)[index])
            elif call is not self.last:
                forked[call] = None
        for call in forked:
            # There may be more forks from there: it is as good as new.
            ring = call.ring
            if ring is not None:
                call.ring = None
                states = call.states.clone()
                ring.put(call, states)

    def is_only(self, call: FinalStates) -> bool:
        """Whether no open state of another call may equal one of the last call, nor is any zero.

        It may be so even if the answer is no.
        """
        return self._are_only(call.keys(self._column), call.states)

    def are_only(self, states: Tensor) -> bool:
        """Return the same of several calls in a row, (n, B, W), which continue one another."""
        return self._are_only(states[..., self._column].flatten().tolist(), states)

    def _are_only(self, keys: list[float], states: Tensor) -> bool:
        if self._uncounted:
            for each in self._uncounted:
                self._count(each)
            self._uncounted.clear()
        if 0.0 in keys and not states.any(-1).all():
            return False
        return not self._open_keys or self._open_keys.keys().isdisjoint(keys)

    def find(self, states: Tensor) -> list[list[StateRow]]:
        """Return, for each of (B, W) states, the remembered states that are equal."""
        self._index_all()
        found: list[list[StateRow]] = [[] for _ in range(len(states))]
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
                    found[row].append((call, index))
        return found

    def were_dropped(self, states: Tensor) -> list[bool]:
        """Return whether each of (B, W) states was remembered and then dropped."""
        return self._digests.hold(states)

    def sequences(self) -> set[int]:
        """The numbers of all sequences of which a state is remembered."""
        return {number for call in self for number in call.numbers()}

    def _drop(self, calls: list[FinalStates | FinalStatesBlock]) -> None:
        whole = [each for call in calls for each in _parts(call)]
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
                # A state with NaN equals nothing, and NaN would never be found again.
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
        left = self._open_keys.get(key, 0) - 1
        if left > 0:
            self._open_keys[key] = left
        else:
            self._open_keys.pop(key, None)

    def _index_all(self) -> None:
        if self._indexed > 2 * self._rows + MIN_STATES_TO_CHECK:
            # Half of the entries are of calls that were dropped since.
            self._start_index()
        unindexed = [
            call
            for each in self._unindexed
            for call in (each.calls() if isinstance(each, FinalStatesBlock) else (each,))
        ]
        if len(unindexed) > len(self._unindexed):
            self._uncounted = [call for each in self._uncounted for call in _parts(each)]
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
        """Look states up by the column that tells most of them apart."""
        some = list(islice(self, MIN_STATES_TO_CHECK))
        values = torch.cat([call.states[:MIN_STATES_TO_CHECK].cpu() for call in some])
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


class Digests:
    """64-bit digests of dropped states and names, in a table of fixed size.

    A digest may replace an older one, so states that were dropped long ago may be missing.

    Args:
        limit: Bytes of the table.
    """

    def __init__(self, limit: int) -> None:
        self._bits = max(4, (limit // 8).bit_length() - 1)
        self._table: Hashes | None = None

    def add(self, states: Sequence[Tensor]) -> None:
        """Note states, (B, W) each."""
        if states:
            self.add_hashes(_digests(states))

    def hold(self, states: Tensor) -> list[bool]:
        """Whether each of (B, W) states was noted."""
        if self._table is None:
            return [False] * len(states)
        return self.hold_hashes(_digests([states]))

    def add_hashes(self, found: Hashes) -> None:
        """Note (n,) numbers."""
        # An empty place is 0.
        found = found | np.uint64(1)
        if self._table is None:
            table = torch.zeros(1 << self._bits, dtype=torch.int64, device="cpu")
            self._table = table.numpy().view(np.uint64)
        self._table[self._slots(found)] = found

    def hold_hashes(self, found: Hashes) -> list[bool]:
        """Whether each of (n,) numbers was noted."""
        if self._table is None:
            return [False] * len(found)
        found = found | np.uint64(1)
        held: list[bool] = (self._table[self._slots(found)] == found).tolist()
        return held

    def _slots(self, found: Hashes) -> Hashes:
        return (found * np.uint64(_MIXER)) >> np.uint64(64 - self._bits)


def _parts(
    call: FinalStates | FinalStatesBlock,
) -> Sequence[FinalStates | FinalStatesBlock]:
    """Return what is counted on its own: the calls of a block that was split."""
    if isinstance(call, FinalStatesBlock) and call.is_split:
        return call.calls()
    return (call,)


def _latest(rows: list[StateRow]) -> list[StateRow]:
    """Return those of the latest calls, the latest last."""
    calls = {True: dict[FinalStates, None](), False: dict[FinalStates, None]()}
    kept = []
    for call, index in reversed(rows):
        if call.is_dropped:
            continue
        is_open = call.is_open_at(index)
        known = calls[is_open]
        if call in known or len(known) < (
            MAX_OPEN_CANDIDATES if is_open else MAX_CLOSED_CANDIDATES
        ):
            known[call] = None
            kept.append((call, index))
    return kept[::-1]


def equal_rows(a: Tensor, rows: list[int], b: Tensor, indices: list[int]) -> list[bool]:
    """Whether row ``rows[i]`` of (B, W) a is row ``places[i]`` of (C, W) b, for each i."""
    if not _same_type(a, b):
        return [False] * len(rows)
    found: list[bool] = (a[rows] == b[indices]).all(1).tolist()
    return found


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two batches of states are the same."""
    return _same_type(a, b) and torch.equal(a, b)


def _same_type(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.device == b.device


def _digests(states: Sequence[Tensor]) -> Hashes:
    """Return a digest of each of several batches of states, end to end."""
    stride = max(1, -(-states[0].shape[1] // DIGEST_COLUMNS))
    # A copy, as float64: that holds every value of any floating-point type.
    columns = torch.cat([each[:, ::stride] for each in states]).to("cpu", torch.float64)
    # Adding 0 makes -0 a 0, which it is equal to.
    bits = (columns.numpy() + 0.0).view(np.uint64)
    factors = np.arange(1, 1 + bits.shape[1], dtype=np.uint64) * np.uint64(_FACTOR)
    bits = (bits ^ (bits >> np.uint64(29))) * (factors | np.uint64(1))
    found: Hashes = (bits ^ (bits >> np.uint64(32))).sum(1, dtype=np.uint64)
    return found
