"""Tests of the layouts, against loops over sequences and steps."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from grutrace.gru.layout import PackedLayout, PaddedLayout
from tests.oracles import previous_states

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def numbered(lengths: list[int], width: int = 2) -> list[torch.Tensor]:
    """Sequences whose every value tells its sequence, step and column."""
    return [
        torch.tensor([[100.0 * b + 10 * t + k for k in range(width)] for t in range(length)])
        for b, length in enumerate(lengths)
    ]


@given(lengths, st.booleans())
def test_packed_steps(lengths: list[int], reverse: bool) -> None:
    sequences = numbered(lengths)
    packed = pack_sequence(sequences, enforce_sorted=False)
    steps = PackedLayout(packed.batch_sizes, packed.sorted_indices)
    assert steps.lengths.tolist() == lengths
    rows = steps.to_rows(packed.data, "float64")
    np.testing.assert_array_equal(rows, torch.cat(sequences).numpy())

    initial = -torch.arange(2.0 * len(lengths)).reshape(-1, 2) - 1
    in_kernel_order = initial[packed.sorted_indices]
    assert torch.equal(steps.unsort_batch(in_kernel_order), initial)
    previous = steps.previous(packed.data, in_kernel_order, reverse=reverse)
    padded, _ = pad_packed_sequence(packed._replace(data=previous), batch_first=True)
    for b, sequence in enumerate(sequences):
        expected = previous_states(sequence.numpy(), initial[b].numpy(), reverse)
        np.testing.assert_array_equal(padded[b, : lengths[b]].numpy(), expected)

    final = steps.final(packed.data, reverse=reverse)
    ends = torch.stack([sequence[0] if reverse else sequence[-1] for sequence in sequences])
    assert torch.equal(final, ends)


@given(st.integers(1, 5), st.integers(0, 4), st.booleans())
def test_padded_steps(length: int, batch: int, reverse: bool) -> None:
    sequences = numbered([length] * batch)
    padded = torch.stack(sequences, 1) if batch else torch.empty(length, 0, 2)
    steps = PaddedLayout(length, batch)
    assert steps.lengths.tolist() == [length] * batch
    rows = steps.to_rows(padded, "float32")
    np.testing.assert_array_equal(rows, torch.cat([torch.empty(0, 2), *sequences]).numpy())

    initial = -torch.arange(2.0 * batch).reshape(-1, 2) - 1
    previous = steps.previous(padded, initial, reverse=reverse)
    for b, sequence in enumerate(sequences):
        expected = previous_states(sequence.numpy(), initial[b].numpy(), reverse)
        np.testing.assert_array_equal(previous[:, b].numpy(), expected)

    before = rows.copy()
    padded.add_(1)
    np.testing.assert_array_equal(rows, before)


def test_control_the_other_direction_differs() -> None:
    packed = pack_sequence(numbered([3, 2]), enforce_sorted=False)
    steps = PackedLayout(packed.batch_sizes, packed.sorted_indices)
    initial = torch.zeros(2, 2)
    forward = steps.previous(packed.data, initial, reverse=False)
    assert not torch.equal(forward, steps.previous(packed.data, initial, reverse=True))


@pytest.mark.parametrize("lengths", [[4, 4], [1], [5, 1, 1]])
def test_sorted_input_needs_no_indices(lengths: list[int]) -> None:
    packed = pack_sequence(numbered(lengths))
    assert packed.sorted_indices is None
    assert PackedLayout(packed.batch_sizes, None).lengths.tolist() == lengths


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_rounded_once(packed: bool) -> None:
    values = torch.rand(
        100, 10, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    steps = PackedLayout(torch.full((100,), 10), None) if packed else PaddedLayout(100, 10)
    rows = steps.to_rows(values.flatten(0, 1) if packed else values, "float16")
    expected = values.transpose(0, 1).reshape(1000, 300).numpy().astype("float16")
    np.testing.assert_array_equal(rows, expected)
    # The control: torch rounds to float32 first.
    assert (values.transpose(0, 1).reshape(1000, 300).half().numpy() != expected).any()
