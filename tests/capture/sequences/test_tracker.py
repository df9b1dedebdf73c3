"""Sequences over several calls: whole chains, shrinking batches, beams, fresh starts."""

from __future__ import annotations

import threading

import numpy as np
import torch

from grutrace.capture.sequences import tracker
from grutrace.capture.sequences.assignment import Commitment, SequenceAssignment
from grutrace.capture.sequences.tracker import SequenceTracker
from grutrace.records import Fork
from tests.interruptions import AtLine, Interruption


def states(*rows: float) -> torch.Tensor:
    """(B, 2) states that tell each other apart."""
    return torch.tensor([[row, row + 0.5] for row in rows]).reshape(-1, 2)


class Followed(SequenceTracker):
    """Numbers calls that are all recorded."""

    def __init__(self, memory: int = 1 << 20) -> None:
        super().__init__(memory)

    def assign(self, *args, **kwargs) -> SequenceAssignment:
        assignment = super().assign(*args, **kwargs)
        self.commit(lambda: None, Commitment(is_done=True))
        return assignment


def ones(batch: int) -> np.ndarray:
    return np.ones(batch, np.int64)


def test_the_state_that_came_out_continues_row_by_row() -> None:
    continuity = Followed()
    first = continuity.assign(None, states(1, 2), ones(2))
    second = continuity.assign(states(1, 2), states(3, 4), 5 * ones(2))
    third = continuity.assign(states(3, 4), states(5, 6), ones(2))
    assert first.sequences.tolist() == [0, 1]
    assert first.begun.all()
    assert second.sequences.tolist() == third.sequences.tolist() == [0, 1]
    assert not second.begun.any()
    assert third.steps_before.tolist() == [6, 6]


def test_a_shrunk_and_reordered_batch_stays_whole() -> None:
    continuity = Followed()
    continuity.assign(None, states(1, 2, 3), ones(3))
    assignment = continuity.assign(states(3, 1), states(4, 5), ones(2))
    assert assignment.sequences.tolist() == [2, 0]
    assert not assignment.begun.any()
    assert assignment.forks == ()


def test_a_beam_forks() -> None:
    continuity = Followed()
    continuity.assign(None, states(1, 2), 3 * ones(2))
    assignment = continuity.assign(states(2, 2, 7), states(4, 5, 6), ones(3))
    assert assignment.sequences.tolist() == [1, 2, 3]
    assert assignment.begun.tolist() == [False, True, True]
    assert assignment.forks == (Fork(sequence=2, parent=1, steps=3),)


def test_rows_that_are_the_same_continue_each_its_own() -> None:
    continuity = Followed()
    continuity.assign(None, states(1, 1, 2), ones(3))
    assignment = continuity.assign(states(1, 1), states(3, 3), ones(2))
    assert assignment.sequences.tolist() == [0, 1]
    assert assignment.forks == ()


def test_anything_else_begins() -> None:
    continuity = Followed()
    continuity.assign(None, states(1, 2), ones(2))
    nudged = torch.nextafter(states(1, 2), torch.tensor(9.0))
    assert continuity.assign(nudged, states(3, 4), ones(2)).sequences.tolist() == [2, 3]
    assert continuity.assign(None, states(5, 6), ones(2)).sequences.tolist() == [4, 5]
    assert continuity.assign(states(3, 4), None, ones(2)).sequences.tolist() == [6, 7]


def test_zeros_continue_nothing() -> None:
    continuity = Followed()
    zeros = torch.zeros(2, 2)
    continuity.assign(None, zeros, ones(2))
    assert continuity.assign(zeros, zeros, ones(2)).sequences.tolist() == [2, 3]


def test_what_came_out_may_be_changed_in_place_afterwards() -> None:
    continuity = Followed()
    final = states(1, 2)
    continuity.assign(None, final, ones(2))
    final.neg_()
    assert continuity.assign(final, states(3, 4), ones(2)).sequences.tolist() == [2, 3]
    continuity.assign(None, final, ones(2))


def test_an_empty_batch() -> None:
    continuity = Followed()
    assignment = continuity.assign(None, states(), ones(0))
    assert assignment.sequences.shape == (0,)
    assert continuity.assign(states(), states(), ones(0)).begun.shape == (0,)


def test_a_call_that_is_not_recorded_leaves_nothing() -> None:
    continuity = SequenceTracker(1 << 20)
    for _ in range(2):
        assert continuity.assign(None, states(1, 2), ones(2)).sequences.tolist() == [0, 1]
    continuity.commit(lambda: None, Commitment(is_done=True))
    for _ in range(2):
        assignment = continuity.assign(states(1, 2), states(3, 4), ones(2))
        assert assignment.sequences.tolist() == [0, 1]
        assert assignment.steps_before.tolist() == [1, 1]


def test_the_thread_does_not_matter() -> None:
    continuity = Followed()
    continuity.assign(None, states(1), ones(1))
    elsewhere = threading.Thread(target=continuity.assign, args=(None, states(9), ones(1)))
    elsewhere.start()
    elsewhere.join()
    assert continuity.assign(states(1), states(2), ones(1)).sequences.tolist() == [0]
    assert continuity.assign(states(9), states(3), ones(1)).sequences.tolist() == [1]
    assert continuity.assign(states(2), states(4), ones(1)).sequences.tolist() == [0]


def test_an_interruption_at_any_line_uses_a_number_twice_for_no_two_calls() -> None:
    line = 0
    is_interrupted = True
    while is_interrupted:
        line += 1
        sequences, commitment = SequenceTracker(1 << 20), Commitment()
        sequences.assign(None, states(1, 2), ones(2))

        def append(commitment: Commitment = commitment) -> None:
            commitment.is_done = True

        try:
            with AtLine(line, Interruption, (tracker.__file__,)):
                sequences.commit(append, commitment)
            is_interrupted = False
        except Interruption:
            pass
        following = sequences.assign(None, states(3, 4), ones(2)).sequences.tolist()
        assert following == ([2, 3] if commitment.is_done else [0, 1])
    assert line > 5
