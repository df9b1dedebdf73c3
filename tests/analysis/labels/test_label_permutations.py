"""Tests of label permutations: labels move within sequences, or between them."""

from __future__ import annotations

import numpy as np

from grutrace.analysis.labels.label_coding import LabelPermutations

LENGTHS = np.array([5, 1, 0, 40, 7])
SEQUENCES = np.repeat(np.arange(5), LENGTHS)
PLACES = np.concatenate([np.arange(length) for length in LENGTHS])


def permutations(codes, count=50, seed=0, order=None) -> LabelPermutations:
    order = slice(None) if order is None else order
    return LabelPermutations(
        np.asarray(codes)[order], SEQUENCES[order], PLACES[order], 5, count, seed
    )


def moved_by(permutations: LabelPermutations, rows, numbers) -> np.ndarray:
    return permutations.codes(rows, numbers, permutations.sources(numbers))


def test_labels_are_rotated_within_their_sequence() -> None:
    codes = np.random.default_rng(0).integers(0, 1000, 53)
    result = permutations(codes)
    assert result.kind == "rotated"
    moved = moved_by(result, np.arange(53), range(50))
    shifts = set()
    for own in moved:
        for number in (0, 3, 4):
            rows = number == SEQUENCES
            rotations = [np.roll(codes[rows], by).tolist() for by in range(LENGTHS[number])]
            assert own[rows].tolist() in rotations
            shifts.add((number, rotations.index(own[rows].tolist())))
    # All of them come up, for sequences short enough.
    assert {by for number, by in shifts if number == 0} == set(range(5))
    assert len({by for number, by in shifts if number == 3}) > 20


def test_each_sequence_is_rotated_by_its_own_offset() -> None:
    codes = PLACES.copy()
    # The first steps of two sequences.
    moved = moved_by(permutations(codes, 2000), np.array([0, 6]), range(2000)).T
    assert abs(np.corrcoef(moved)[0, 1]) < 0.08
    np.testing.assert_allclose(moved.mean(1), [2, 19.5], rtol=0.05)


def test_sequences_of_equal_length_swap_labels() -> None:
    lengths = np.array([4] * 12 + [9] * 3)
    sequences = np.repeat(np.arange(15), lengths)
    steps = np.concatenate([np.arange(length) for length in lengths])
    codes = np.random.default_rng(0).integers(0, 1000, len(steps))
    result = LabelPermutations(codes, sequences, steps, 15, 50, 0)
    assert result.kind == "both"
    originals = codes[:48].reshape(12, 4).tolist()
    for own in moved_by(result, np.arange(len(codes)), range(50)):
        rows = own[:48].reshape(12, 4).tolist()
        assert sorted(rows) == sorted(originals)
        for number in (12, 13, 14):
            of = sequences == number
            assert own[of].tolist() in [np.roll(codes[of], by).tolist() for by in range(9)]
    first = moved_by(result, np.arange(4), range(50)).tolist()
    assert len({tuple(row) for row in first}) > 9


def test_steps_without_a_label_keep_none() -> None:
    codes = np.arange(53)
    codes[::3] = -1
    result = permutations(codes)
    assert result.labelled(np.arange(53)).tolist() == (codes >= 0).tolist()
    rows = np.flatnonzero(codes >= 0)
    for own in moved_by(result, rows, range(50)):
        for number in range(5):
            of = SEQUENCES[rows] == number
            assert sorted(own[of]) == sorted(codes[rows][of])


def test_constant_labels_move_to_other_sequences() -> None:
    codes = np.array([3, 1, 4, 1, 5])[SEQUENCES]
    result = permutations(codes)
    assert result.kind == "swapped"
    moved = moved_by(result, np.arange(53), range(50))
    seen = set()
    for own in moved:
        labels_per_length = [set(own[number == SEQUENCES].tolist()) for number in (0, 1, 3, 4)]
        assert all(len(labels) == 1 for labels in labels_per_length)
        assigned = [labels.pop() for labels in labels_per_length]
        assert sorted(assigned) == [1, 1, 3, 5]
        seen.add(tuple(assigned))
    # Of twelve orders.
    assert len(seen) > 9


def test_parts_in_any_order_give_the_same() -> None:
    codes = np.random.default_rng(0).integers(0, 9, 53)
    whole = moved_by(permutations(codes), np.arange(53), range(50))
    part = moved_by(permutations(codes), np.array([50, 7, 8]), range(10, 20))
    np.testing.assert_array_equal(part, whole[10:20][:, [50, 7, 8]])
    order = np.random.default_rng(1).permutation(53)
    other = moved_by(permutations(codes, order=order), np.arange(53), range(50))
    np.testing.assert_array_equal(other, whole[:, order])
    assert (moved_by(permutations(codes, seed=1), np.arange(53), range(50)) != whole).any()
