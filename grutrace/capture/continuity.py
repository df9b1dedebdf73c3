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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.record import Fork


@dataclass(frozen=True)
class Assignment:
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


@dataclass(frozen=True)
class _Reached:
    """Where the call before ended: states (B, L * H), sequences and their steps (B,)."""

    states: Tensor
    sequences: npt.NDArray[np.uint64]
    steps: npt.NDArray[np.int64]


class Continuity:
    """Numbers the sequences of one module. The calls of each thread are followed on their own."""

    def __init__(self) -> None:
        self._count = 0
        self._reached: dict[int, _Reached] = {}

    def __copy__(self) -> Continuity:
        twin = Continuity()
        twin._count, twin._reached = self._count, self._reached.copy()
        return twin

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
        reached = self._reached.get(thread)
        if initial is None or reached is None or not len(lengths):
            assignment = self._begin_all(len(lengths))
        elif torch.equal(initial, reached.states) and bool(initial.any(1).all()):
            assignment = _continue_all(reached)
        else:
            assignment = self._match(initial, reached)
        if final is None:
            self._reached.pop(thread, None)
        else:
            steps = assignment.steps_before + lengths
            self._reached[thread] = _Reached(final.clone(), assignment.sequences, steps)
        return assignment

    def _begin_all(self, batch: int) -> Assignment:
        sequences = np.arange(self._count, self._count + batch, dtype=np.uint64)
        self._count += batch
        return Assignment(sequences, np.ones(batch, bool), (), np.zeros(batch, np.int64))

    def _match(self, initial: Tensor, reached: _Reached) -> Assignment:
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
            sequences[row] = self._count
            self._count += 1
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
