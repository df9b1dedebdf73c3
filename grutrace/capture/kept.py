"""Which steps of each sequence are kept, and what the kept ones are numbered as.

Steps count through all calls of a sequence. So whether a step of a call is kept depends on how many
its sequence made before, and a sequence that has made none of the kept steps yet has no number in
the trace. B sequences in a batch, L layers, D directions, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from grutrace.capture.continuity import Assignment
from grutrace.capture.observe import Observation
from grutrace.gru.kernel import Layer
from grutrace.gru.window import window
from grutrace.record import Fork

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Kept:
    """What is kept of one call.

    Attributes:
        numbers: (B,) the number that each sequence has in the trace; -1 for none so far.
        assignment: As of a call of just the kept steps, numbered so; None if there are none.
        first: (B,) the first kept step of each sequence, within the call.
        count: (B,) how many of each are kept.
    """

    numbers: Integers
    assignment: Assignment | None
    first: Integers
    count: Integers


class KeptSteps:
    """Numbers the sequences of one module of which some steps are kept.

    Every batch row of a call that is recorded has a piece, be it of no steps, so that places in
    the batch stay what they were. A sequence that had only such pieces begins anew, under another
    number, with its first kept step: its initial state is the one before that.

    Args:
        start: The first step that is kept.
        stop: The first one after them that is not; None for all.
    """

    def __init__(self, start: int, stop: int | None) -> None:
        self.start, self.stop = start, stop
        self._count = 0
        # By thread, of the sequences that its last call reached: number, and whether it has steps.
        self._known: dict[int, dict[int, tuple[int, bool]]] = {}

    def __copy__(self) -> KeptSteps:
        twin = KeptSteps(self.start, self.stop)
        twin._count, twin._known = self._count, self._known.copy()
        return twin

    def of(self, assignment: Assignment, lengths: Integers) -> Kept:
        """Number what is kept of a call, of sequences that `Continuity` has told."""
        before = assignment.steps_before
        first = np.clip(self.start - before, 0, lengths)
        stop = lengths if self.stop is None else np.clip(self.stop - before, 0, lengths)
        count = np.maximum(stop - first, 0)
        thread = threading.get_ident()
        known = self._known.get(thread, {})
        sequences = assignment.sequences.tolist()
        if not count.any():
            found = {each: known[each] for each in sequences if each in known}
            self._known[thread] = found
            numbers = np.array([found.get(each, (-1,))[0] for each in sequences], np.int64)
            return Kept(numbers, None, first, count)
        begun = np.zeros(len(sequences), bool)
        found = {}
        for row, sequence in enumerate(sequences):
            number, has_steps = known.get(sequence, (-1, False))
            if number < 0 or (count[row] and not has_steps):
                begun[row] = True
                number, self._count = self._count, self._count + 1
            found[sequence] = number, has_steps or bool(count[row])
        self._known[thread] = found
        numbers = np.array([found[each][0] for each in sequences], np.int64)
        forks = tuple(self._forks(assignment.forks, found, known))
        kept_before = np.maximum(before - self.start, 0)
        kept = Assignment(numbers.astype(np.uint64), begun, forks, kept_before)
        return Kept(numbers, kept, first, count)

    def _forks(
        self,
        forks: Iterable[Fork],
        now: dict[int, tuple[int, bool]],
        before: dict[int, tuple[int, bool]],
    ) -> Iterable[Fork]:
        """Those that began from a state that is in the trace."""
        for fork in forks:
            parent = now.get(fork.parent) or before.get(fork.parent)
            in_range = self.start == 0 and (self.stop is None or fork.steps <= self.stop)
            if parent is not None and in_range:
                yield Fork(now[fork.sequence][0], parent[0], fork.steps)


def only_kept(observation: Observation, kept: Kept, layers: Iterable[int]) -> Observation:
    """Return a call as if it had made only the kept steps; of these layers, the others as it was.

    Raises:
        ValueError: None are kept.
    """
    call, part = observation.call, window(observation.steps, kept.first, kept.count)
    found, states = list(observation.layers), list(call.initial)
    for number in set(layers):
        layer = observation.layers[number]
        found[number] = Layer(part.rows(layer.input), part.rows(layer.output))
        for reverse, hidden in enumerate(layer.output.chunk(call.directions, -1)):
            place = number * call.directions + reverse
            states[place] = part.initial(hidden, states[place], reverse=bool(reverse))
    return observation._replace(
        call=call._replace(initial=torch.stack([each.to(states[0].dtype) for each in states])),
        steps=part.steps,
        layers=found,
    )
