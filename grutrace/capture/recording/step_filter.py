"""Select the recorded steps of each sequence (option `steps`), and number the sequences.

Steps count over all calls of a sequence. So whether a step of a call is recorded depends on the
steps of its sequence before the call. A sequence without a recorded step has no number in the
trace yet. B sequences in a batch, L layers, D directions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from grutrace.capture.kernel_calls.observation import Observation
from grutrace.capture.kernel_calls.replacement import GatesAsSet
from grutrace.capture.sequences.assignment import SequenceAssignment
from grutrace.capture.sequences.tracker import SequenceTracker
from grutrace.gru.kernel import Layer
from grutrace.gru.step_window import StepWindow, make_window
from grutrace.records import Fork, Origin

Integers = npt.NDArray[np.int64]

#: Minimum number of sequences before finished sequences are dropped from the table.
MIN_REMEMBERED = 4096


class _Known(NamedTuple):
    """A sequence in the trace, or one segment of a sequence.

    Attributes:
        number: Number of the segment in the trace.
        root: Number in the trace of the sequence's first segment.
        kept: Number of recorded steps.
    """

    number: int
    root: int
    kept: int


@dataclass(frozen=True)
class StepSelection:
    """The recorded steps of one call.

    Attributes:
        numbers: (B,) number in the trace of each sequence's first segment; -1 for none so far.
        assignment: The assignment of the recorded steps, with numbers of the trace; None if no
            step is recorded.
        first: (B,) the first recorded step of each sequence, within the call.
        count: (B,) number of recorded steps of each sequence.
        known: The call's sequences in the trace after the call.
        begun: Number of sequences in the trace after the call.
    """

    numbers: Integers
    assignment: SequenceAssignment | None
    first: Integers
    count: Integers
    known: dict[int, _Known]
    begun: int


class StepFilter:
    """Selects steps of the sequences of one module, and numbers the sequences.

    Every batch row of a recorded call gets a part of a sequence, perhaps without steps, so that
    batch indices do not change. A sequence without recorded steps starts again under a new number
    at its first recorded step. Its initial state is the state before this step.

    Args:
        start: The first recorded step.
        stop: The step after the last recorded step; None for no end.
    """

    def __init__(self, start: int, stop: int | None) -> None:
        self.start, self.stop = start, stop
        self._count = 0
        self._known: dict[int, _Known] = {}
        self._most = MIN_REMEMBERED

    def select(self, assignment: SequenceAssignment, lengths: Integers) -> StepSelection:
        """Select the recorded steps of a call. The selection takes effect with `commit`.

        Args:
            assignment: The sequences of the call, as `SequenceTracker` assigned them.
            lengths: (B,) number of steps of each sequence.
        """
        before = assignment.steps_before
        first = np.clip(self.start - before, 0, lengths)
        stop = lengths if self.stop is None else np.clip(self.stop - before, 0, lengths)
        count = np.maximum(stop - first, 0)
        sequences = assignment.sequences.tolist()
        if not count.any():
            tracked = {
                sequence: self._known[sequence] for sequence in sequences if sequence in self._known
            }
            numbers = np.array(
                [tracked[sequence].root if sequence in tracked else -1 for sequence in sequences],
                np.int64,
            )
            return StepSelection(numbers, None, first, count, tracked, self._count)
        continued = self._continued(assignment)
        begun = np.zeros(len(sequences), bool)
        tracked, total = {}, self._count
        for row, sequence in enumerate(sequences):
            known = self._known.get(sequence)
            if known is None or (count[row] and not known.kept):
                begun[row] = True
                parent = continued.get(sequence)
                known = _Known(total, total if parent is None else parent.root, 0)
                total += 1
            tracked[sequence] = known._replace(kept=known.kept + int(count[row]))
        numbers, roots = (
            np.array([getattr(tracked[sequence], name) for sequence in sequences], np.int64)
            for name in ("number", "root")
        )
        forks = tuple(self._forks(assignment.forks, tracked, continued))
        marked = tuple(
            Origin(tracked[origin.sequence].number, origin.mark)
            for origin in assignment.origins
            if origin.mark != "continued" or origin.sequence in continued
        )
        kept_assignment = SequenceAssignment(
            numbers.astype(np.uint64),
            begun,
            forks,
            np.maximum(before - self.start, 0),
            roots.astype(np.uint64),
            marked,
        )
        return StepSelection(roots, kept_assignment, first, count, tracked, total)

    def commit(self, selection: StepSelection, tracker: SequenceTracker) -> None:
        """Apply the selection of a recorded call, and drop sequences that cannot continue."""
        self._known |= selection.known
        self._count = selection.begun
        if len(self._known) > self._most:
            alive = tracker.sequences()
            self._known = {
                sequence: known for sequence, known in self._known.items() if sequence in alive
            }
            self._most = max(MIN_REMEMBERED, 2 * len(self._known))

    def _continued(self, assignment: SequenceAssignment) -> dict[int, _Known]:
        """Return the previous segment in the trace, for each sequence that continues one.

        A segment without recorded steps before it is a sequence of its own.
        """
        segments = {origin.sequence for origin in assignment.origins if origin.mark == "continued"}
        parents = {
            fork.sequence: self._known.get(fork.parent)
            for fork in assignment.forks
            if fork.sequence in segments
        }
        return {
            sequence: known
            for sequence, known in parents.items()
            if known is not None and known.kept
        }

    def _forks(
        self, forks: Iterable[Fork], now: dict[int, _Known], continued: dict[int, _Known]
    ) -> Iterable[Fork]:
        """Return the forks that started from a state in the trace."""
        for fork in forks:
            number = now[fork.sequence].number
            if fork.sequence in continued:
                parent = continued[fork.sequence]
                yield Fork(number, parent.number, parent.kept)
                continue
            known = now.get(fork.parent) or self._known.get(fork.parent)
            if known is not None and self.start == 0 and fork.steps <= known.kept:
                yield Fork(number, known.number, fork.steps)


def slice_observation(
    observation: Observation, selection: StepSelection, layers: Iterable[int]
) -> Observation:
    """Return a call with the recorded steps only, in these layers. Other layers do not change.

    Raises:
        ValueError: No step is recorded.
    """
    call, part = observation.call, make_window(observation.steps, selection.first, selection.count)
    layers_of_part, states = list(observation.layers), list(call.initial)
    for number in set(layers):
        layer = observation.layers[number]
        layers_of_part[number] = Layer(part.rows(layer.input), part.rows(layer.output))
        for reverse, hidden in enumerate(layer.output.chunk(call.directions, -1)):
            index = number * call.directions + reverse
            states[index] = part.initial(hidden, states[index], reverse=bool(reverse))
    gates_as_set = observation.gates_as_set
    if gates_as_set is not None:
        gates_as_set = [
            directions and [_slice_gates(direction, part) for direction in directions]
            for directions in gates_as_set
        ]
    return observation._replace(
        call=call._replace(initial=torch.stack([state.to(states[0].dtype) for state in states])),
        steps=part.steps,
        layers=layers_of_part,
        gates_as_set=gates_as_set,
    )


def _slice_gates(direction: GatesAsSet, part: StepWindow) -> GatesAsSet:
    """Return the gates of the recorded steps."""
    gates = {name: part.rows(gate) for name, gate in direction.gates.items()}
    return direction._replace(gates=gates, codes=part.rows(direction.codes))
