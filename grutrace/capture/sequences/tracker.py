"""Track which sequence each batch row of a call belongs to.

A decoder calls its layer once per token, with the state that an earlier call returned. All these
calls together are one sequence per batch row. The states identify a sequence, not the order of
calls:

- A row continues a sequence if its initial state equals, bit for bit, the final state of an earlier
  call that no call has continued yet. So several streams may take turns on one module, one stream
  may move between threads, and a batch may shrink or be reordered.
- A row whose initial state was already continued is a fork: a new sequence that starts inside
  another one. Beams are forks, and so are all continuations of one prompt except the first, which
  continues the prompt's own sequence.
- A row whose initial state is the final state of several sequences is ambiguous. It starts a new
  sequence with a mark.
- Any other row starts a new sequence, and so does a row whose initial state is all zeros.

If rows of one batch have equal states, and as many rows continue them, the order decides.

If the user names the sequences, the names decide. A named sequence may continue from any state. If
that is not its final state, a new segment starts: in the file, a sequence with its own initial
state that continues the earlier one.

B sequences in a batch, W width of a state: all layers of a module side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from grutrace.capture.sequences.assignment import (
    AssignmentBuilder,
    Commitment,
    InitialState,
    PendingAssignment,
    SequenceAssignment,
    SeriesAssignment,
    SeriesStates,
)
from grutrace.capture.sequences.final_states import (
    CallEnds,
    FinalStates,
    Integers,
    StateRow,
)
from grutrace.capture.sequences.named_sequences import NamedEnd, NamedSequences, same_as_ended
from grutrace.capture.sequences.state_memory import StateMemory, equal

#: Fraction of the memory for names.
NAMES_FRACTION = 1 / 8

Result = TypeVar("Result")


class SequenceTracker:
    """Assigns the calls of one module to sequences. Only one thread may use it at a time.

    Args:
        memory: Maximum bytes of remembered states and names.
    """

    def __init__(self, memory: int) -> None:
        self._bytes = memory
        self._count = 0
        self._next: PendingAssignment | None = None
        # The next count, and the commitment of the call that is being appended.
        self._appending: tuple[int, Commitment] | None = None
        # The count before a series whose calls may not be appended yet.
        self._unsettled: tuple[int, Commitment] | None = None
        self._forget()

    def _forget(self) -> None:
        self._memory = StateMemory(int(self._bytes * (1 - NAMES_FRACTION)))
        self._names = NamedSequences(int(self._bytes * NAMES_FRACTION))

    def assign(
        self,
        initial: Tensor | None,
        final: Tensor | None,
        lengths: Integers,
        names: Sequence[Hashable] | None = None,
        *,
        is_owned: bool = False,
    ) -> SequenceAssignment:
        """Assign a call to sequences. The assignment takes effect with `commit`.

        Args:
            initial: (B, W) the initial states; None if the call got no states, or cannot continue
                a sequence.
            final: (B, W) the final states; None if no call can continue them.
            lengths: (B,) number of steps of each sequence.
            names: (B,) the user's names, all different; None to identify sequences by states.
            is_owned: Whether no other code can change these states.
        """
        self._settle()
        self._next = self._assign(initial, final, lengths, names, is_owned=is_owned)
        return self._next.assignment

    def _assign(
        self,
        initial: Tensor | None,
        final: Tensor | None,
        lengths: Integers,
        names: Sequence[Hashable] | None = None,
        *,
        is_owned: bool = False,
    ) -> PendingAssignment:
        last = self._memory.last
        if not len(lengths) or final is None or not final.shape[1]:
            pending = self._begin_all(len(lengths))
        elif names is not None:
            pending = self._assign_named(initial, tuple(names))
        elif initial is None or last is None:
            pending = self._begin_all(len(lengths))
        elif equal(initial, last.states) and self._memory.is_only(last):
            pending = self._continue_all(last)
        elif _all_zero(initial, is_owned):
            pending = self._begin_all(len(lengths))
        else:
            pending = self._match(initial)
        pending.final, pending.is_owned = final, is_owned
        pending.steps = pending.assignment.steps_before + lengths
        return pending

    def _settle(self) -> None:
        if self._unsettled is not None:
            count, commitment = self._unsettled
            if not commitment.is_done:
                # The series was never appended, so its numbers are free.
                self._count = count
                self._forget()
            self._unsettled = None
        if self._appending is not None:
            count, commitment = self._appending
            if commitment.is_done:
                # An interruption came before the last call was remembered as a whole.
                self._count = count
                self._forget()
            self._appending = None

    def assign_series(self, states: SeriesStates, commitment: Commitment) -> SeriesAssignment:
        """Assign several calls of one step, as `assign` and `commit` would one by one.

        Args:
            states: Their states.
            commitment: Marked as done once the calls are appended. If it is not done when the next
                call is assigned, the numbers of these calls are used again.
        """
        self._settle()
        final, kinds = states.final, states.kinds
        calls, batch, _ = final.shape
        series = SeriesAssignment((calls, batch))
        self._unsettled = self._count, commitment
        while (start := len(series)) < calls:
            kind, stop = kinds[start], start + 1
            while kind is not InitialState.COPIED and stop < calls and kinds[stop] is kind:
                stop += 1
            if kind is InitialState.ZEROS:
                series.add(self._begin_run(final[start:stop]), begun=True)
            elif kind is InitialState.CHAINED and start and self._is_plain(final[start - 1 : stop]):
                series.add(self._continue_run(final[start:stop]), begun=False)
            else:
                lengths = np.ones(batch, np.int64)
                for call in range(start, stop):
                    accepted = self._assign(
                        states.initial(call), final[call], lengths, is_owned=True
                    )
                    series.add_call(accepted.assignment, accepted.offsets)
                    self._count += int(np.count_nonzero(accepted.assignment.begun))
                    self._remember(accepted)
        return series

    def _is_plain(self, states: Tensor) -> bool:
        """Whether each of n - 1 calls continues exactly the whole previous call.

        Args:
            states: (n, B, W) the final states of the n calls.
        """
        last = self._memory.last
        if last is None or last.names is not None:
            return False
        # NaN is not equal to NaN, so no sequence continues from it.
        return not math.isnan(states.sum().item()) and self._memory.are_only(states[:-1])

    def _begin_run(self, final: Tensor) -> list[CallEnds]:
        calls, batch = final.shape[:2]
        count = self._count + calls * batch
        numbers = np.arange(self._count, count, dtype=np.uint64).reshape(calls, batch)
        steps = np.ones(batch, np.int64)
        ends = [CallEnds(sequences, sequences, steps, None) for sequences in numbers]
        self._memory.add_run(final, ends, are_open=True)
        self._count = count
        return ends

    def _continue_run(self, final: Tensor) -> list[CallEnds]:
        last = self._memory.last
        assert last is not None
        sequences, roots, offsets = last.sequences, last.roots, last.offsets
        steps = last.steps + np.arange(1, 1 + len(final))[:, np.newaxis]
        ends = [CallEnds(sequences, roots, steps_after, offsets) for steps_after in steps]
        self._memory.close(last)
        self._memory.add_run(final, ends, are_open=False)
        return ends

    def commit(self, append: Callable[[], Result], commitment: Commitment) -> Result:
        """Append the call that was assigned last, and remember its final states.

        Args:
            append: Appends the call.
            commitment: Marked as done once the call is appended, even if an interruption follows.
                If it is not done, the numbers of the call are used again.

        Returns:
            The result of `append`.
        """
        accepted = self._next
        assert accepted is not None
        count = self._count + int(np.count_nonzero(accepted.assignment.begun))
        self._appending = count, commitment
        try:
            return append()
        finally:
            if commitment.is_done:
                self._remember(accepted)
                self._count, self._next = count, None
            self._appending = None

    def _remember(self, accepted: PendingAssignment) -> None:
        assignment = accepted.assignment
        if accepted.whole is not None:
            self._memory.close(accepted.whole)
        else:
            self._memory.close_rows(accepted.used)
        if accepted.final is None or not accepted.final.numel():
            return
        final = accepted.final
        call = FinalStates(
            # The states may be remembered for long, so their graph is dropped.
            final.detach() if final.requires_grad else final,
            assignment.sequences,
            assignment.roots,
            accepted.steps,
            accepted.offsets,
            accepted.names,
        )
        self._memory.add(call, is_owned=accepted.is_owned)
        if accepted.names is not None:
            self._names.add(call)

    def sequences(self) -> set[int]:
        """Return the numbers of all sequences that can be continued."""
        return self._memory.sequences() | self._names.sequences()

    def _begin_all(self, batch: int) -> PendingAssignment:
        sequences = np.arange(self._count, self._count + batch, dtype=np.uint64)
        before = np.zeros(batch, np.int64)
        begun = np.ones(batch, bool)
        return PendingAssignment(
            SequenceAssignment(sequences, begun, (), before, sequences), None, before, None
        )

    def _continue_all(self, last: FinalStates) -> PendingAssignment:
        begun = np.zeros(len(last.sequences), bool)
        assignment = SequenceAssignment(last.sequences, begun, (), last.steps, last.roots)
        return PendingAssignment(assignment, None, last.steps, last.offsets, last.names, whole=last)

    def _match(self, initial: Tensor) -> PendingAssignment:
        """Match each row of a call to the remembered states."""
        matches = self._memory.find(initial)
        rows = AssignmentBuilder(len(matches), self._count)
        fresh = [not nonzero for nonzero in initial.any(1).tolist()]
        claims: dict[StateRow, int] = {}
        for is_fresh, states in zip(fresh, matches, strict=True):
            if states and not is_fresh:
                claims[states[0]] = claims.get(states[0], 0) + 1
        claimed: set[StateRow] = set()
        unknown = []
        for row, states in enumerate(matches):
            if fresh[row]:
                rows.begin(row)
                continue
            if not states:
                unknown.append(row)
                rows.begin(row)
                continue
            still_open = [state for state in states if state[0].is_open_at(state[1])]
            unclaimed = [state for state in still_open if state not in claimed]
            calls = {call for call, _ in still_open}
            if len(calls) > 1 or (unclaimed and claims[states[0]] < len(still_open)):
                rows.begin(row, "ambiguous")
            elif unclaimed:
                claimed.add(unclaimed[0])
                rows.continue_from(row, unclaimed[0])
            elif still_open:
                rows.fork(row, still_open[0])
            else:
                self._fork_from_earlier(rows, row, states)
        if unknown:
            dropped = self._memory.were_dropped(initial[unknown])
            for row, was_dropped in zip(unknown, dropped, strict=True):
                if was_dropped:
                    rows.mark(row, "dropped")
        return rows.finish()

    @staticmethod
    def _fork_from_earlier(rows: AssignmentBuilder, row: int, states: Sequence[StateRow]) -> None:
        if len({call for call, _ in states}) == 1:
            # Equal rows of one batch, as for a repeated prompt: each forks from its own row.
            rows.fork(row, next((state for state in states if state[1] == row), states[0]))
        elif len({call.end(index).sequence for call, index in states}) == 1:
            # The state of one sequence repeats: fork at its latest step.
            rows.fork(row, max(states, key=lambda state: state[0].end(state[1]).steps))
        else:
            rows.begin(row, "ambiguous")

    def _assign_named(
        self, initial: Tensor | None, names: tuple[Hashable, ...]
    ) -> PendingAssignment:
        ends = [self._names.get(name) for name in names]
        same = same_as_ended(initial, ends)
        known = self._first_states(initial, ends)
        rows = AssignmentBuilder(len(names), self._count)
        for row, (end, is_same) in enumerate(zip(ends, same, strict=True)):
            if end is None:
                self._begin_new_name(rows, row, names[row], known.get(row))
            elif is_same:
                rows.continue_from(row, (end.call, end.row))
            else:
                rows.begin_segment(row, end)
        pending = rows.finish()
        pending.names = names
        return pending

    def _first_states(
        self, initial: Tensor | None, ends: Sequence[NamedEnd | None]
    ) -> dict[int, StateRow | None]:
        """Return the remembered initial state of each sequence with a new name, by row.

        The state is None if several remembered states are equal to it. Rows whose initial state is
        all zeros or not remembered are left out.
        """
        new = [row for row, end in enumerate(ends) if end is None]
        if initial is None or not new or self._memory.last is None:
            return {}
        fresh = (initial[new] == 0).all(1).tolist()
        candidates = zip(new, self._memory.find(initial[new]), fresh, strict=True)
        return {
            row: states[0] if len(states) == 1 else None
            for row, states, is_fresh in candidates
            if states and not is_fresh
        }

    def _begin_new_name(
        self, rows: AssignmentBuilder, row: int, name: Hashable, state: StateRow | None
    ) -> None:
        """Let a new name continue a sequence without a name, fork a sequence, or start one."""
        if self._names.was_dropped(name):
            rows.begin(row, "dropped")
        elif state is None:
            rows.begin(row)
        else:
            call, index = state
            has_name = call.names is not None and call.names[index] is not None
            if call.is_open_at(index) and not has_name and not rows.is_used(state):
                rows.continue_from(row, state)
            else:
                rows.fork(row, state)


def _all_zero(states: Tensor, is_owned: bool) -> bool:
    # NumPy takes a third of the time, but would make the storage of a user's tensor unresizable.
    if is_owned and states.device.type == "cpu" and states.dtype is not torch.bfloat16:
        return not states.numpy().any()
    return not states.any()
