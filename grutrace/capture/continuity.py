"""Which sequence each batch row of a call is a piece of.

A decoder calls its layer once a token, with the state that the call before returned. All those
calls together are one sequence per batch row. A row of the state that goes in continues a
sequence if it is, bit for bit, a row of the state that the call before gave out; so a batch that
shrinks while it is decoded stays whole, and so does one that beam search reorders. If two rows go
on from the same state, the first continues the sequence and the second begins one of its own, a
fork. Any other row begins a sequence.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.record import Fork


class Assignment(NamedTuple):
    """The sequences of one call, in the order of the user's batch.

    Attributes:
        sequences: (B,) their numbers.
        begun: (B,) whether this call began them.
        forks: Origins of those begun in the middle of another.
        steps_before: (B,) how many steps each had before this call.
    """

    sequences: npt.NDArray[np.uint64]
    begun: npt.NDArray[np.bool_]
    forks: tuple[Fork, ...]
    steps_before: npt.NDArray[np.int64]


class _Reached(NamedTuple):
    """Where the call before ended: states (B, L * H), sequences and their steps (B,)."""

    states: Tensor
    sequences: npt.NDArray[np.uint64]
    steps: npt.NDArray[np.int64]


class Continuity:
    """Numbers the sequences of one module. The calls of each thread are followed on their own.

    Attributes:
        state: What it knows, which never changes itself: who sets it back has undone a call.
    """

    def __init__(self) -> None:
        self.state: tuple[int, dict[int, _Reached]] = (0, {})

    def assign(
        self,
        initial: Tensor | None,
        final: Tensor | None,
        lengths: npt.NDArray[np.int64],
    ) -> Assignment:
        """Number the sequences of a call.

        Args:
            initial: (B, L * H) what each sequence started from, all layers side by side; None
                if the call was given no states, or can continue nothing.
            final: (B, L * H) what each ended with; None if nothing can continue it.
            lengths: (B,) steps of each.
        """
        thread = threading.get_ident()
        count, by_thread = self.state
        reached = by_thread.get(thread)
        if initial is None or reached is None or not len(lengths):
            assignment = _begin_all(count, len(lengths))
        elif torch.equal(initial, reached.states) and _none_is_zero(initial):
            assignment = _continue_all(reached)
        elif not initial.any():
            assignment = _begin_all(count, len(lengths))
        else:
            assignment = _match(count, initial, reached)
        count += int(np.count_nonzero(assignment.begun))
        if final is not None:
            steps = assignment.steps_before + lengths
            reached = _Reached(final.clone(), assignment.sequences, steps)
            self.state = count, {**by_thread, thread: reached}
        else:
            others = {each: ends for each, ends in by_thread.items() if each != thread}
            self.state = count, others
        return assignment


def _begin_all(count: int, batch: int) -> Assignment:
    sequences = np.arange(count, count + batch, dtype=np.uint64)
    return Assignment(sequences, np.ones(batch, bool), (), np.zeros(batch, np.int64))


def _none_is_zero(states: Tensor) -> bool:
    """Whether each row has something else than zeros; mostly there is no zero at all."""
    return bool(states.all()) or bool(states.any(1).all())


def _match(count: int, initial: Tensor, reached: _Reached) -> Assignment:
    places, parents = _match_rows(_as_bytes(initial), _as_bytes(reached.states))
    batch = len(places)
    sequences, steps = np.empty(batch, np.uint64), np.zeros(batch, np.int64)
    begun = np.ones(batch, bool)
    forks = []
    for row, (place, parent) in enumerate(zip(places, parents, strict=True)):
        if place is not None:
            begun[row] = False
            sequences[row], steps[row] = reached.sequences[place], reached.steps[place]
            continue
        sequences[row] = count
        count += 1
        if parent is not None:
            origin = int(reached.sequences[parent]), int(reached.steps[parent])
            forks.append(Fork(int(sequences[row]), *origin))
    return Assignment(sequences, begun, tuple(forks), steps)


def _continue_all(reached: _Reached) -> Assignment:
    batch = len(reached.sequences)
    return Assignment(reached.sequences, np.zeros(batch, bool), (), reached.steps)


def _as_bytes(states: Tensor) -> list[bytes]:
    rows = states.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in rows]


def _match_rows(
    initial: list[bytes], reached: list[bytes]
) -> tuple[list[int | None], list[int | None]]:
    """Return, for each initial state, the place that it continues, and the one it forks from.

    States of nothing but zeros match nothing: they are what a fresh sequence starts from.
    """
    unclaimed: dict[bytes, deque[int]] = defaultdict(deque)
    for place, state in enumerate(reached):
        if state.strip(b"\0"):
            unclaimed[state].append(place)
    known = {state: places[0] for state, places in unclaimed.items()}
    continues: list[int | None] = []
    forks: list[int | None] = []
    for state in initial:
        places = unclaimed.get(state)
        continues.append(places.popleft() if places else None)
        forks.append(known.get(state) if continues[-1] is None else None)
    return continues, forks
